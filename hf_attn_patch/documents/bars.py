"""Progress bars of the libraries that load models and data: hidden while ours is shown, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, transformers and datasets (where it is installed) show no bars; after it they do what they did before."""
    from transformers.utils import logging as of_transformers

    try:
        import datasets
    except ImportError:
        datasets = None
    models = of_transformers.is_progress_bar_enabled()
    data = datasets is not None and not datasets.are_progress_bars_disabled()
    of_transformers.disable_progress_bar()
    if data:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if models:
            of_transformers.enable_progress_bar()
        if data:
            datasets.enable_progress_bars()
