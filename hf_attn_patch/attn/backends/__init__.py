"""One file a kernel family: ``refuses(request)`` and ``run(q, k, v, request)``."""
