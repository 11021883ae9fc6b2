"""examples/uptrain.py tells the truth (real tokens, the saved file, what is trained) and keeps what is good."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load_script
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer

from hf_attn_patch.training import trained_value
from hf_attn_patch.training.model.trainable import as_saved


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("truth")
    save_tiny(root / "T", tiny_llama(4))
    save_tiny(root / "S", tiny_llama(2, seed=1))
    save_tiny(root / "half", tiny_llama(2, seed=1).bfloat16())
    (root / "text").mkdir()
    for path in python_sources()[:12]:
        shutil.copy(path, root / "text")
    return root


@pytest.fixture
def uptrain():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield load_script("examples/uptrain.py").main
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def arguments(world: Path, output: Path, **changes: object) -> list[str]:
    options = {
        "model": world / "S", "dataset": world / "text", "output": output, "tokens": 64 * 4 * 8,
        "sequence_length": 64, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "held_out_every": 5,
        "eval_tokens": 256, "eval_every": 4, "checkpoint_every": 4, **changes,
    }  # fmt: skip
    return [part for k, v in options.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]


def state_of(output: Path) -> dict[str, Any]:
    (folder,) = (output / "checkpoints").glob("step-*")
    return json.loads((folder / "trainer_state.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("size", [1, 4])
def test_resuming_with_other_micro_batches_is_the_same_run(size: int, world: Path, tmp_path: Path) -> None:
    """accelerate's counter of micro-batches must not come back from another division of the batch."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def run(output: str, **changes: object) -> None:
        load_script("examples/uptrain.py").main(arguments(world, tmp_path / output, **changes))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    run("whole", checkpoint_every=3, tokens=64 * 4 * 8)
    # the first three of eight steps, as a run that was stopped left them: 2 micro-batches a step, so 6 in all
    original = load_script("examples/uptrain.py")

    class StopError(Exception):
        pass

    saved = original.TrainingRun.save_checkpoint

    def save_then_stop(self, model, progress):
        saved(self, model, progress)
        raise StopError

    original.TrainingRun.save_checkpoint = save_then_stop
    try:
        with pytest.raises(StopError):
            original.main(arguments(world, tmp_path / "parts", checkpoint_every=3))
    finally:
        original.TrainingRun.save_checkpoint = saved
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    run("parts", checkpoint_every=3, micro_batch_size=size, resume="true")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_a_gradient_that_is_not_finite_is_never_applied(world: Path, tmp_path: Path, uptrain, monkeypatch) -> None:
    """Without clipping, too: the third step's gradient is infinite; the second step's checkpoint stays."""
    from hf_attn_patch.training.model import objectives

    loss, calls = objectives.CausalObjective.loss, []

    def spoilt(self, hidden, batch, told):
        calls.append(self.training)
        if self.training and sum(calls) == 2 * 2 + 1:  # the loss is as it was; its gradient is not
            hidden.register_hook(lambda gradient: gradient * math.inf)
        return loss(self, hidden, batch, told)

    monkeypatch.setattr(objectives.CausalObjective, "loss", spoilt)
    with pytest.raises(SystemExit, match=r"gradient's norm is (nan|inf) at step 3"):
        uptrain(arguments(world, tmp_path / "out", clip=0, checkpoint_every=1))
    assert state_of(tmp_path / "out")["step"] == 2
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_first_loss_that_is_not_finite_is_not_the_rates_fault(world: Path, tmp_path: Path, uptrain) -> None:
    teacher = tiny_llama(4)
    with torch.no_grad():
        teacher.model.norm.weight[0] = math.nan
    save_tiny(tmp_path / "T", teacher)
    with pytest.raises(SystemExit, match=r"nan at step 1.*at the weights of --model and --teacher"):
        uptrain(arguments(world, tmp_path / "out", teacher=tmp_path / "T", eval_tokens=0))


def test_weights_that_are_not_finite_are_never_written(world: Path, tmp_path: Path, uptrain, monkeypatch) -> None:
    step, count = torch.optim.AdamW.step, [0]

    def spoil(self, closure=None):
        found = step(self, closure)
        count[0] += 1
        if count[0] == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = math.nan
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(SystemExit, match="is not finite after step 3, so nothing is written"):
        uptrain(arguments(world, tmp_path / "out", clip=0, checkpoint_every=1, eval_every=0))
    assert state_of(tmp_path / "out")["step"] == 2
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_norm_of_the_gradient_is_told_without_clipping(world: Path, tmp_path: Path, uptrain) -> None:
    uptrain(arguments(world, tmp_path / "out", clip=0))
    lines = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    norms = [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]
    assert len(norms) == 8 and all(norm > 0 for norm in norms)


def test_best_goes_by_what_is_trained(world: Path, tmp_path: Path, uptrain) -> None:
    """With KL alone, the best step is that of the smallest KL."""
    uptrain(arguments(world, tmp_path / "out", teacher=world / "T", ce=0, kl=1, eval_every=1, lr=3e-3))
    state = state_of(tmp_path / "out")
    assert state["best"] == min(entry["kl"] for entry in state["history"])
    card = (tmp_path / "out" / "README.md").read_text()
    best = min(state["history"], key=lambda entry: entry["kl"])
    assert re.search(rf"\| best \| {best['tokens']:,} \|.* {best['kl']:.4f} \|", card)


def test_trained_value_weighs_the_losses() -> None:
    assert trained_value({"loss": 2.0, "kl": 0.5}, ce=1.0, kl=2.0) == 3.0
    assert trained_value({"loss": 2.0}, ce=1.0, kl=0.0) == 2.0


def test_the_card_tells_the_loss_of_the_file(world: Path, tmp_path: Path, uptrain) -> None:
    """A bf16 checkpoint is trained in fp32 and saved in bf16: "after" is what the saved file has."""
    from transformers import AutoModelForCausalLM

    uptrain(arguments(world, tmp_path / "out", model=world / "half", precision="no", lr=3e-3))
    after = state_of(tmp_path / "out")["history"][-1]["loss"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype is torch.bfloat16
    save_tiny(tmp_path / "again", saved.float())  # the file's numbers, scored by an untrained run
    uptrain_again = load_script("examples/uptrain.py").main
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    uptrain_again(arguments(world, tmp_path / "scored", model=tmp_path / "again", precision="no", eval_every=8))
    before = state_of(tmp_path / "scored")["history"][0]["loss"]
    assert before == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_as_saved_rounds_and_gives_back(lora: bool) -> None:
    model = tiny_llama(2)
    if lora:
        import peft

        torch.manual_seed(0)
        peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
        )
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(1, 20)[None]
    plain = tiny_llama(2)
    if lora:
        for layer, own in zip(plain.model.layers, model.model.layers, strict=True):
            q = own.self_attn.q_proj
            added = 2.0 * q.lora_B["default"].weight @ q.lora_A["default"].weight
            layer.self_attn.q_proj.weight.data += added
    expected = plain.bfloat16().float()(ids).logits
    with as_saved(model, torch.bfloat16, 2.0):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_tokens_are_real_ones(tmp_path: Path, uptrain) -> None:
    """Sixteen short texts in rows with room for 64 tokens: the padding is not counted."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    for name in ("T", "S"):
        save_tiny(tmp_path / name, BertModel(config))
    texts = [f"def number_{i}(): return {i}" for i in range(16)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = trained_tokenizer()
    lengths = [len(words(text)["input_ids"]) for text in texts]
    uptrain(
        arguments(
            tmp_path, tmp_path / "out", model=tmp_path / "S", teacher=tmp_path / "T", dataset=tmp_path / "text.jsonl",
            tokens=2 * sum(lengths), sequence_length=64, batch_size=4, shuffle="false", eval_tokens=0,
            held_out_every=None, checkpoint_every=1000,
        )
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    tokens = [line["train/tokens"] for line in log if "train/tokens" in line]
    ends = len(lengths) // 4
    each = [sum(lengths[4 * i : 4 * i + 4]) for i in range(ends)]
    extra = tokens[0] - each[0]  # an end-of-text token a document, where the framing adds one
    assert extra in (0, 4)
    assert tokens == [sum((each * 2)[: i + 1]) + extra * (i + 1) for i in range(len(tokens))]
    assert tokens[-1] >= 2 * sum(lengths)


def test_records_without_their_field_are_told_or_refused(world: Path, tmp_path: Path, uptrain, caplog) -> None:
    lines = [path.read_text() for path in sorted((world / "text").iterdir())]
    some = [{"text": line[:2000]} if i % 4 else {"other": line} for i, line in enumerate(lines * 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    uptrain(arguments(world, tmp_path / "out", dataset=tmp_path / "a.jsonl", tokens=512, eval_tokens=0))
    assert "has no text in field 'text'" in caplog.text
    most = [{"text": line[:300]} if i < 20 else {"other": line[:300]} for i, line in enumerate(lines * 30)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in most))
    with pytest.raises(SystemExit, match="have no text in field 'text'"):
        uptrain(arguments(world, tmp_path / "out2", dataset=tmp_path / "b.jsonl", eval_tokens=0))
