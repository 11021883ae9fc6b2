"""Packed documents under context parallelism on two GPUs: the loss and gradients of each document by itself."""

from __future__ import annotations

import pytest
import torch
from scripts import on_two

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_two_gpus_train_as_one() -> None:
    told = on_two("tests/helpers/context_parallel_training.py", devices="cuda")
    assert told.count("as each document by itself") in (2 * 2 * 4, 2 * 2 * 5)  # by what torch can split
    assert told.count("what cannot be split was refused") == 2


def test_fsdp2_by_accelerate() -> None:
    told = on_two("tests/helpers/accelerate_context_parallel.py", devices="cuda")
    assert told.count("the step of each document by itself") == 2
