"""Kernels run in Triton's interpreter where there is no GPU; that is decided before the first of them is imported."""

import interpreter  # noqa: F401
