"""``tp_plan="auto"`` on two GPUs with our attention, growing cache and recorded steps: the tokens of one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoding import build
from scripts import on_two

pytestmark = [pytest.mark.gpu, pytest.mark.gpu2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    build("llama", "cpu").save_pretrained(tmp_path)
    told = on_two("tests/helpers/tensor_parallel_generate.py", str(tmp_path), devices="cuda")
    for rank in range(2):
        assert f"rank {rank}: the same tokens; recorded as CUDA graphs" in told
        for turn, known in (("first", False), ("again", True)):
            said = f"rank {rank}, {turn}: the same tokens; recorded as CUDA graphs, with one kernel each for "
            assert said in told
            assert f"4 rotary embeddings with the cache's new token; known {known}" in told.split(said)[1]
