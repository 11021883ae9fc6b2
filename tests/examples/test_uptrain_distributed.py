"""examples/uptrain.py in two processes (gloo on the CPU), each started as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT
from tiny import python_sources, save_tiny, tiny_llama

pytestmark = pytest.mark.slow

LAUNCH = ["-m", "accelerate.commands.launch"]
#: how each is started
SCRIPT = "examples/uptrain.py"
ONE = [*LAUNCH, "--config_file", "examples/accelerate/cpu.yaml", SCRIPT]
DDP = [*LAUNCH, "--config_file", "examples/accelerate/ddp.yaml", "--mixed_precision", "no", SCRIPT]
FSDP2 = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "tests/helpers/fsdp2_on_cpu.py", SCRIPT]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    save_tiny(root / "T", tiny_llama(4))
    save_tiny(root / "S", tiny_llama(2, seed=1, tie_word_embeddings=True))
    (root / "text").mkdir()
    for path in python_sources()[:15]:
        shutil.copy(path, root / "text")
    return root


def train(world: Path, how: list[str], output: str, *more: str, **changes: object) -> str:
    options = {
        "model": world / "S", "teacher": world / "T", "dataset": world / "text", "output": world / output,
        "tokens": 64 * 4 * 6, "sequence_length": 64, "batch_size": 4, "micro_batch_size": 1, "ce": 1, "lr": 1e-3,
        "held_out_every": 5, "eval_tokens": 256, "eval_every": 3, "checkpoint_every": 3, "keep": 2, **changes,
    }  # fmt: skip
    arguments = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *how, *arguments, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, cwd=ROOT, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def losses(world: Path, output: str) -> list[float]:
    entries = [json.loads(line) for line in (world / output / "training_log.jsonl").open()]
    return [value for e in entries for k, value in e.items() if k in ("train/loss", "train/kl", "eval/loss", "eval/kl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "more"),
    [(DDP, []), (FSDP2, []), (FSDP2, ["--compile", "true"]), (FSDP2, ["--mode", "lora", "--gradient-checkpointing"])],
    ids=["ddp", "fsdp2", "fsdp2 compiled", "fsdp2 lora checkpointed"],
)
def test_two_processes_train_as_one_does(world, how, more):
    lora = "lora" in more
    alone, together = "one-lora" if lora else "one", "two-" + "".join(more).replace("--", "-") + how[1]
    if not (world / alone).exists():
        train(world, ONE, alone, *(["--mode", "lora"] if lora else []))
    train(world, how, together, *more)
    ours, theirs = losses(world, alone), losses(world, together)
    assert len(ours) == 2 * (6 + 3)
    assert ours[-2] < ours[0] - (0.001 if lora else 0.05)  # they learn something
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=2e-6)
    before, after = weights(world / alone), weights(world / together)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


def test_a_sharded_run_goes_on_bitwise_from_its_checkpoint(world):
    train(world, FSDP2, "whole")
    shutil.copytree(world / "whole" / "checkpoints" / "step-00000003", world / "rest/checkpoints/step-00000003")
    train(world, FSDP2, "rest", "--resume")
    ours, theirs = weights(world / "whole"), weights(world / "rest")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sharding_in_bf16_rounds_neither_the_loss_nor_the_sum_of_gradients(world):
    """Without the policy of ``keep_fp32_in_fsdp2`` sums of losses come back in bf16, up to 0.012 from the truth."""
    train(world, ONE, "bf16-one", precision="bf16")
    train(world, FSDP2, "bf16-two", precision="bf16")
    alone, shared = (torch.tensor(losses(world, name)) for name in ("bf16-one", "bf16-two"))
    torch.testing.assert_close(shared, alone, rtol=0, atol=2e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_its_config_says_what_to_install(world):
    with pytest.raises(AssertionError, match=r"(?is)deepspeed is not installed.*pip3? install deepspeed"):
        train(world, [*LAUNCH, "--config_file", "examples/accelerate/deepspeed_zero2.yaml", SCRIPT], "deepspeed")
