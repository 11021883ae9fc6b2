"""Kernels run in Triton's interpreter where there is no GPU; that is decided before the first of them is imported."""

from pathlib import Path

import interpreter  # noqa: F401
import pytest
from hypothesis import settings

# the first example of a test pays for imports: a deadline would fail it by chance on a busy machine
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

#: what no version of transformers can change: attention, methods and losses themselves, several processes, damaged
#: files, kills, packaging
ONCE = (
    "attn/",
    "benchmarks/",
    "conversion/calibration/test_together.py",
    "conversion/checkpoints/test_faults.py",
    "conversion/checkpoints/test_hunt.py",
    "conversion/checkpoints/test_safetensors_header.py",
    "conversion/methods/",
    "examples/test_kills.py",
    "examples/test_minilm.py",
    "examples/test_t5_paper.py",
    "examples/test_uptrain_folders.py",
    "examples/test_uptrain_trackers.py",
    "losses/test_chunked.py",
    "test_clean_install.py",
    "test_directions.py",
    "test_dockerfile.py",
    "test_moved.py",
    "test_packaging.py",
    "test_sizes.py",
    "training/data/test_data.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if path.startswith(ONCE):
            item.add_marker(pytest.mark.once)
