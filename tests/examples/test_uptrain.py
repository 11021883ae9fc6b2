"""examples/uptrain.py as a user meets it: killed, stopped, resumed, refused, merged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from scripts import load_script, start_script
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer

ATTENTION = "hf_attn_patch"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A teacher T (4 KV heads), a student S (2), and a folder of text."""
    root = tmp_path_factory.mktemp("uptrain")
    save_tiny(root / "T", tiny_llama(4))
    # dropout makes the random number generators a part of what a resumed run must restore
    save_tiny(root / "S", tiny_llama(2, seed=1, attention_dropout=0.1, tie_word_embeddings=True))
    (root / "text").mkdir()
    for path in python_sources()[:15]:
        shutil.copy(path, root / "text")
    return root


@pytest.fixture
def uptrain():
    """The script's main, called in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield load_script("examples/uptrain.py").main
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def arguments(world: Path, output: str, **changes: object) -> list[str]:
    options = {
        "model": world / "S", "teacher": world / "T", "dataset": world / "text", "output": world / output,
        "tokens": 64 * 4 * 24, "sequence_length": 64, "batch_size": 4, "micro_batch_size": 2, "ce": 1, "lr": 1e-3,
        "held_out_every": 5, "eval_tokens": 256, "eval_every": 8, "checkpoint_every": 3,
        "attn_implementation": ATTENTION, **changes,
    }  # fmt: skip
    return [part for k, v in options.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_steps(process: subprocess.Popen[str], log: Path, more: int) -> None:
    """Until the run has written so many more lines than there were when it began to write."""
    deadline, before = time.monotonic() + 120, log.stat().st_mtime_ns
    while log.stat().st_mtime_ns == before:  # a resumed run writes it anew
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    begun = len(log.read_text().splitlines())
    while len(log.read_text().splitlines()) < begun + more:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.once
def test_killed_and_stopped_runs_end_where_an_uninterrupted_one_does(world):
    whole = start_script("examples/uptrain.py", *arguments(world, "whole"))
    killed = start_script("examples/uptrain.py", *arguments(world, "parts"))
    wait_for_checkpoint(killed, world / "parts")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (world / "parts" / "config.json").exists(), "it was over before it was killed"
    assert whole.wait() == 0, whole.communicate()[0]

    stopped = start_script("examples/uptrain.py", *arguments(world, "parts"), "--resume")
    wait_for_steps(stopped, world / "parts" / "training_log.jsonl", 1)
    stopped.send_signal(signal.SIGTERM)
    rest = stopped.communicate()[0]
    assert stopped.returncode == 128 + signal.SIGTERM, rest
    assert "go on with --resume" in rest

    last = start_script("examples/uptrain.py", *arguments(world, "parts"), "--resume")
    assert last.wait() == 0, last.communicate()[0]
    assert_same_weights(world / "whole", world / "parts")
    states = [
        json.loads(next((world / o / "checkpoints").glob("*/trainer_state.json")).read_text())
        for o in ("whole", "parts")
    ]
    for state in states:
        state.pop("settings")
    assert states[0] == states[1]
    assert states[0]["step"] == 24
    assert not list(world.glob("**/.*incomplete"))


def test_the_result_is_a_plain_model_that_learnt(world, uptrain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    uptrain(arguments(world, "plain", lr=3e-3))
    model, loading = AutoModelForCausalLM.from_pretrained(world / "plain", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_key_value_heads == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = AutoTokenizer.from_pretrained(world / "plain")("import os", return_tensors="pt")
    assert torch.isfinite(model(**text).logits).all()
    state = json.loads(next((world / "plain" / "checkpoints").glob("*/trainer_state.json")).read_text())
    before, after = state["history"][0], state["history"][-1]
    assert after["loss"] < before["loss"] - 0.3
    card = (world / "plain" / "README.md").read_text()
    assert f"| before | 0 | {before['loss']:.4f}" in card
    assert f"{after['loss']:.4f}" in card
    assert (world / "plain" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("mode", ["attention", "lora"])
def test_only_attention_changes(world, uptrain, mode):
    uptrain(arguments(world, mode, mode=mode, lr=1e-2, tokens=64 * 4 * 4, eval_tokens=0))
    before, after = weights(world / "S"), weights(world / mode)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name}


def test_gradient_checkpointing_and_micro_batches_leave_the_result(world, uptrain):
    """Exact but for the order of sums."""
    common = {"tokens": 64 * 4 * 3, "eval_tokens": 0, "model": world / "T", "teacher": None, "ce": None}
    uptrain(arguments(world, "a", **common, micro_batch_size=4))
    uptrain([*arguments(world, "b", **common, micro_batch_size=1), "--gradient-checkpointing"])
    a, b = weights(world / "a"), weights(world / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)


def test_the_layerwise_phase_brings_attention_closer_to_the_teachers(world, uptrain):
    """With training switched off after it, only the first phase can have moved the weights."""
    from transformers import AutoModelForCausalLM

    from hf_attn_patch.training.model.layerwise import layerwise_loss, tracing

    save_tiny(world / "S4", tiny_llama(4, seed=3))
    uptrain(
        arguments(
            world, "fit", model=world / "S4", layerwise_tokens=64 * 4 * 30, tokens=64 * 4, decay="constant", lr=3e-3
        )
    )
    teacher = AutoModelForCausalLM.from_pretrained(world / "T", attn_implementation="sdpa")
    ids = torch.tensor([trained_tokenizer()(python_sources()[-1].read_text())["input_ids"][:100]])
    errors = []
    for name in ("S4", "fit"):
        student = AutoModelForCausalLM.from_pretrained(world / name, attn_implementation="sdpa")
        with torch.no_grad():
            with tracing(teacher) as told:
                teacher(ids)
            with tracing(student, told) as trace:
                student(ids)
        errors.append(float(layerwise_loss(trace, told, ids).loss) / ids.numel())
    assert errors[1] < 0.6 * errors[0]


def test_options_from_yaml_and_the_command_line(world, uptrain):
    (world / "uptrain.yaml").write_text(
        f"model: {world / 'S'}\ndataset: {world / 'text'}\ntokens: 1k\nlr: 1e-3\nsequence_length: 64\nbatch_size: 4\n"
        f"held_out_every: 5\neval_tokens: 0\nattn_implementation: {ATTENTION}\nseed: 1\n"
    )
    uptrain(["--config", str(world / "uptrain.yaml"), "--output", str(world / "yaml"), "--seed", "2"])
    state = json.loads(next((world / "yaml" / "checkpoints").glob("*/trainer_state.json")).read_text())
    assert (state["tokens"], state["settings"]["seed"], state["settings"]["lr"]) == (1024, 2, 1e-3)


def refused(call, arguments) -> str:
    with pytest.raises(SystemExit) as raised:
        call(arguments)
    return str(raised.value)


def test_what_cannot_work_is_refused_with_a_way_out(world, uptrain, tmp_path):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    other = world / "other-tokenizer"
    tiny_llama(4).save_pretrained(other)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["other text altogether"] * 9, vocab_size=300, special_tokens=["<pad>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>").save_pretrained(other)
    assert "the teacher's tokenizer is another one" in refused(uptrain, arguments(world, "x", teacher=other))

    save_tiny(world / "wide", tiny_llama(4, vocab_size=520))
    assert "the teacher predicts 520 words and the student 512" in refused(
        uptrain, arguments(world, "x", teacher=world / "wide")
    )
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no text to train on" in refused(
        uptrain, arguments(world, "x", dataset=tmp_path / "empty.txt", eval_tokens=0)
    )
    (tmp_path / "short.txt").write_text("def f(x):\n    return x\n" * 10)
    assert "it does not fill one step" in refused(
        uptrain, arguments(world, "x", dataset=tmp_path / "short.txt", eval_tokens=0)
    )
    assert "there is no file or folder" in refused(uptrain, arguments(world, "x", dataset="./none"))
    assert "is no model that can be loaded" in refused(uptrain, arguments(world, "x", model=tmp_path))
    assert f"--sequence-length 512 is more than the 256 positions of {world / 'T'}" in refused(
        uptrain, arguments(world, "x", sequence_length=512)
    )
    assert "--log-with none-such: that tracker is not installed; installed: " in refused(
        uptrain, arguments(world, "x", log_with="none-such")
    )
    assert "--tokens 50M" in refused(uptrain, arguments(world, "x", tokens=None))
    (tmp_path / "wrong.yaml").write_text("learning_rate: 1\n")
    assert "unknown options: learning_rate" in refused(uptrain, ["--config", str(tmp_path / "wrong.yaml")])


def test_a_run_is_not_resumed_as_another_one(world, uptrain):
    uptrain(arguments(world, "once", tokens=64 * 4 * 3, eval_tokens=0))
    message = refused(uptrain, [*arguments(world, "once", tokens=64 * 4 * 3, eval_tokens=0, lr=5e-3), "--resume"])
    assert "lr (0.001 then, 0.005 now)" in message


def test_a_loss_that_is_not_finite_names_its_batch(world, uptrain):
    model = tiny_llama(2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save_tiny(world / "nan", model)
    message = refused(uptrain, arguments(world, "x-nan", model=world / "nan", teacher=None, eval_tokens=0))
    assert "the loss is nan at step 1, micro-batch 1 of process 0 (documents " in message
    assert not (world / "x-nan" / "config.json").exists()


def test_out_of_memory_says_what_helps(world, uptrain, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hf_attn_patch.training.model.objectives.linear_loss", exhausted)
    message = refused(uptrain, arguments(world, "x-oom", eval_tokens=0))
    assert "out of memory; what helps, the cheapest first: --micro-batch-size 1" in message
    assert "--gradient-checkpointing" in message
