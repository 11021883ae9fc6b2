"""One file a kernel family: ``missing``, ``refuses`` and ``run`` (:mod:`.base` says what they take)."""
