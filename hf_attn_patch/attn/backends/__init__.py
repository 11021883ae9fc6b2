"""One file a kernel family: ``missing()``, ``refuses(request)`` and ``run(q, k, v, request, operands)`` (:mod:`.base`)."""
