"""Kernels run in Triton's interpreter where there is no GPU; that is decided before the first of them is imported."""

import interpreter  # noqa: F401
from hypothesis import settings

# the first example of a test pays for imports: a deadline would fail it by chance on a busy machine
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
