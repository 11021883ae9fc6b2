"""Kernels run in Triton's interpreter where there is no GPU; that is decided before the first of them is imported.

Nothing is read from the user's home or left there: what Hugging Face's libraries keep, and a GPU's own crossovers.
"""

import gc
import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from whoever started them
    _kept = tempfile.TemporaryDirectory(prefix="hf-attn-tests-", ignore_cleanup_errors=True)
    os.environ |= {"HF_HOME": _kept.name, "HF_ATTN_TUNING": os.path.join(_kept.name, "crossovers.json")}

import interpreter  # noqa: F401
import pytest
from hypothesis import settings

# the first example of a test pays for imports: a deadline would fail it by chance on a busy machine
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

#: what no version of transformers can change: attention, methods and losses themselves, texts and sums over them,
#: several processes, damaged files, kills, packaging; and notebooks, which install the newest
ONCE = (
    "attn/",
    "benchmarks/",
    "conversion/calibration/test_memory.py",
    "conversion/calibration/test_refit.py",
    "conversion/calibration/test_together.py",
    "conversion/checkpoints/test_bad_weights.py",
    "conversion/checkpoints/test_faults.py",
    "conversion/checkpoints/test_hunt.py",
    "conversion/checkpoints/test_safetensors_header.py",
    "conversion/checkpoints/test_strange_folders.py",
    "conversion/methods/",
    "conversion/reports/test_plots.py",
    "documents/test_bars.py",
    "examples/test_demo_text.py",
    "examples/test_kills.py",
    "examples/test_minilm.py",
    "examples/test_notebooks.py",
    "examples/test_t5_paper.py",
    "examples/test_uptrain_folders.py",
    "examples/test_uptrain_launcher.py",
    "examples/test_uptrain_trackers.py",
    "losses/test_chunked.py",
    "modeling/test_torch_attention.py",
    "test_clean_install.py",
    "test_directions.py",
    "test_dockerfile.py",
    "test_errors.py",
    "test_grouping.py",
    "test_moved.py",
    "test_notebooks.py",
    "test_packaging.py",
    "test_sizes.py",
    "training/data/",
    "training/loop/",
    "training/test_options.py",
)


def pytest_collection_finish() -> None:
    """What is imported by now stays: transformers often collects garbage, and need not look for it there."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if path.startswith(ONCE):
            item.add_marker(pytest.mark.once)
