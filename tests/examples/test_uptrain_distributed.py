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
ZERO_CONFIG = [*LAUNCH, "--config_file", "examples/accelerate/deepspeed_zero2.yaml", "--mixed_precision", "no"]
ZERO2 = [*ZERO_CONFIG, "tests/helpers/deepspeed_on_cpu.py", SCRIPT]
ZERO1, ZERO3 = ([*ZERO_CONFIG, "--zero_stage", stage, "tests/helpers/deepspeed_on_cpu.py", SCRIPT] for stage in "13")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
with_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")

LORA, FIRST_PHASE = ["--mode", "lora"], ["--layerwise-tokens", "1024"]
COMPILED, CHECKPOINTED = ["--compile", "true"], ["--gradient-checkpointing"]


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
        env=environment, cwd=ROOT, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def losses(world: Path, output: str) -> list[float]:
    entries = [json.loads(line) for line in (world / output / "training_log.jsonl").open()]
    return [value for e in entries for k, value in e.items() if k in ("train/loss", "train/kl", "eval/loss", "eval/kl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "what", "more"),
    [
        pytest.param(DDP, [], [], id="ddp"),
        pytest.param(DDP, FIRST_PHASE, [], id="ddp first phase"),
        pytest.param(FSDP2, [], [], id="fsdp2"),
        pytest.param(FSDP2, [], COMPILED, id="fsdp2 compiled"),
        pytest.param(FSDP2, LORA, CHECKPOINTED, id="fsdp2 lora checkpointed"),
        pytest.param(FSDP2, FIRST_PHASE, [], id="fsdp2 first phase"),
        pytest.param(ZERO2, [], [], id="zero2", marks=with_deepspeed),
        pytest.param(ZERO2, [], COMPILED, id="zero2 compiled", marks=with_deepspeed),
        pytest.param(ZERO2, ["--mode", "attention"], [], id="zero2 attention", marks=with_deepspeed),
        pytest.param(ZERO1, LORA, CHECKPOINTED, id="zero1 lora checkpointed", marks=with_deepspeed),
        pytest.param(ZERO1, ["--clip", "0.05"], [], id="zero1 clipped", marks=with_deepspeed),
    ],
)
def test_two_processes_train_as_one_does(world, how, what, more, request):
    alone, together = "one" + "".join(what), request.node.callspec.id.replace(" ", "-")
    if not (world / alone).exists():
        train(world, ONE, alone, *what)
    train(world, how, together, *what, *more)
    ours, theirs = losses(world, alone), losses(world, together)
    assert len(ours) == 2 * (10 + 5 if what is FIRST_PHASE else 6 + 3)
    assert ours[-2] < ours[0] - (0.001 if "--mode" in what else 0.05)  # they learn something
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=2e-6)
    for folder in ("", "best"):
        before, after = weights(world / alone / folder), weights(world / together / folder)
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [FSDP2, pytest.param(ZERO2, marks=with_deepspeed)], ids=["fsdp2", "zero2"])
def test_a_sharded_run_goes_on_bitwise_from_its_checkpoint(world, how, request):
    whole, rest = (f"{name}-{request.node.callspec.id}" for name in ("whole", "rest"))
    train(world, how, whole)
    shutil.copytree(world / whole / "checkpoints" / "step-00000003", world / rest / "checkpoints/step-00000003")
    train(world, how, rest, "--resume")
    ours, theirs = weights(world / whole), weights(world / rest)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_resumed_only_where_it_can_be_read(world):
    train(world, ONE, "plain-checkpoint", tokens=64 * 4 * 3)
    with pytest.raises(AssertionError, match="step-00000003 is whole, and this run's are FSDP2's: --resume with"):
        train(world, FSDP2, "plain-checkpoint", "--resume", tokens=64 * 4 * 3)


@pytest.mark.parametrize("how", [FSDP2, pytest.param(ZERO2, marks=with_deepspeed)], ids=["fsdp2", "zero2"])
def test_sharding_in_bf16_rounds_neither_the_loss_nor_the_sum_of_gradients(world, how, request):
    """Without the policy of ``keep_fp32_in_fsdp2`` sums of losses come back in bf16, up to 0.012 from the truth."""
    two = f"bf16-{request.node.callspec.id}"
    if not (world / "bf16-one").exists():
        train(world, ONE, "bf16-one", precision="bf16")
    train(world, how, two, precision="bf16")
    alone, shared = (torch.tensor(losses(world, name)) for name in ("bf16-one", two))
    torch.testing.assert_close(shared, alone, rtol=0, atol=2e-3)


@with_deepspeed
@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        (ZERO3, [], "zero_stage 3 is not supported, 1 and 2 are; where .* examples/accelerate/fsdp2.yaml"),
        (ZERO2, FIRST_PHASE, "--layerwise-tokens is not supported under DeepSpeed, .* use examples/accelerate/fsdp2"),
        (ZERO2, ["--dtype", "bfloat16"], "DeepSpeed keeps fp32 weights: leave out --dtype"),
        (ZERO2, ["--precision", "fp16"], "--precision fp16 is not supported under DeepSpeed; use bf16 or no"),
        pytest.param(
            [*ZERO_CONFIG, SCRIPT],
            [],
            "DeepSpeed only on GPUs, and there is none; use examples/accelerate/ddp.yaml",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=["zero3", "first phase", "bf16 weights", "fp16", "no gpu"],
)
def test_what_deepspeed_cannot_do_is_refused_with_a_way_out(world, how, more, message):
    with pytest.raises(AssertionError, match=f"uptrain: .*{message}"):
        train(world, how, "refused", *more)


@with_deepspeed
def test_a_loss_that_is_not_finite_names_its_batch_under_deepspeed(world):
    model = tiny_llama(2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save_tiny(world / "nan", model)
    with pytest.raises(AssertionError, match="uptrain: the loss is nan at step 1, micro-batch 1 of process 0"):
        train(world, ZERO2, "x-nan", model=world / "nan", eval_tokens=0)
    assert not (world / "x-nan" / "config.json").exists()
    assert not (world / "x-nan" / "checkpoints").exists()


@pytest.mark.skipif(HAS_DEEPSPEED, reason="DeepSpeed is installed")
def test_without_deepspeed_its_config_says_what_to_install(world):
    with pytest.raises(AssertionError, match=r"(?is)deepspeed is not installed.*pip3? install deepspeed"):
        train(world, [*LAUNCH, "--config_file", "examples/accelerate/deepspeed_zero2.yaml", SCRIPT], "deepspeed")
