"""``aligned`` reads random inputs: what it takes from them, that less is lost than by pooling, that it is verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_family import known_here, model_of, with_kv_heads
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama
from zoo_cases import BY_NAME, output

from hf_attn_patch.conversion import convert, plan, verify
from hf_attn_patch.conversion.calibration import meaningless
from hf_attn_patch.conversion.calibration.layers import load
from hf_attn_patch.conversion.calibration.memory import memory_needed
from hf_attn_patch.conversion.methods.align import merge_aligned
from hf_attn_patch.conversion.methods.apply import to_heads


def outlying(folder: Path) -> Path:
    """A model like pretrained ones: its layers' inputs lie in few directions, which the weights alone do not tell.

    The embeddings have a large common part, as real hidden states do, and heads agree on what to make of it alone: so
    their mean keeps what matters, and a merge that weighs all directions alike throws it away.
    """
    torch.manual_seed(0)
    model = tiny_llama(4)
    common = torch.randn(4, 64)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.copy_(0.05 * torch.randn_like(weight) + torch.randn(len(weight), 4) @ common)
        basis = torch.linalg.qr(common.T)[0]
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                p.normal_(0, 0.5)
                heads = p.view(4, 16, 64)
                heads -= heads @ basis @ basis.T
                heads += 0.3 * torch.randn(16, 4) @ basis.T
            layer.self_attn.q_proj.weight.normal_(0, 0.3)
            layer.self_attn.o_proj.weight.normal_(0, 0.3)
        model.lm_head.weight.normal_(0, 0.3)
    save_tiny(folder, model)
    return folder


def lost(kind: Any, source: Path, result: Path, feed: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        before, after = (output(kind.from_pretrained(f).eval(), feed) for f in (source, result))
    return float((after - before).square().mean())


def test_less_is_lost_than_by_the_weights_alone_or_by_pooling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = outlying(tmp_path / "src")
    for method in ("aligned", "mean"):
        convert(src, tmp_path / method, 1, method=method)
    monkeypatch.setattr(meaningless, "load", lambda *_, **__: (_ for _ in ()).throw(meaningless.ConversionError("no")))
    record = convert(src, tmp_path / "weights", 1, method="aligned")
    assert any("weights alone" in note and "--method mean" in note for note in record["details"]["notes"])
    feed = {"input_ids": torch.randint(0, 512, (8, 24), generator=torch.Generator().manual_seed(3))}
    kind = transformers.AutoModelForCausalLM
    found = {name: lost(kind, src, tmp_path / name, feed) for name in ("aligned", "mean", "weights")}
    assert found["mean"] < found["weights"]  # as on real models
    assert found["aligned"] < 0.7 * found["mean"]


def test_what_is_read_is_what_transformers_gives_the_layers(tmp_path: Path) -> None:
    """The merge is that by the hidden states of the model's own output, for the same random ids."""
    src = outlying(tmp_path / "src")
    made = plan(src, 2, method="aligned", seed=3)
    convert(made, tmp_path / "dst")
    model = transformers.AutoModelForCausalLM.from_pretrained(src)
    ids = torch.randint(
        0, 512, (meaningless.ROWS, meaningless.LENGTH), generator=torch.Generator().manual_seed(3)
    )  # fmt: skip
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        for unit, states in zip(made.units, hidden, strict=False):
            x = model.model.layers[unit.layer.index].input_layernorm(states).flatten(0, 1).double()
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            weights = to_heads(unit, {n: made.source.read(n) for n in unit.reads})
            want = merge_aligned(weights, moment=x.T @ x / len(x))
            got = load_file(tmp_path / "dst" / "model.safetensors")[f"{unit.layer.prefix}k_proj.weight"]
            assert want.k is not None
            torch.testing.assert_close(got, want.k.flatten(0, 1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stock", ["whisper", "vit", "clip", "t5", "bert", "bloom"])
def test_every_kind_of_model_reads_its_own_kind_of_noise(stock: str, tmp_path: Path) -> None:
    case = BY_NAME[stock]
    case.make(None).save_pretrained(tmp_path / "src")
    made = plan(tmp_path / "src", case.all_attentions(2), method="aligned")
    merge: Any = made.method.build(made, made.options)
    assert set(merge.read) == {unit.layer.prefix for unit in made.units}
    for unit in made.units:
        shapes = [x.shape[1] for x in merge.read[unit.layer.prefix]]
        assert shapes == [unit.layer.width] * (2 if unit.layer.stack.cross else 1)
    assert not [note for note in merge.record["notes"] if "alone" in note]
    assert set(meaningless.noise(made, load(made))) <= set(case.inputs()) | {"decoder_input_ids"}


@pytest.mark.parametrize("model_type", [name for name in ("sarvam_moe", "molmo2_text") if name in known_here()])
def test_inputs_are_found_where_the_checkpoint_alone_keeps_projections_as_one(model_type: str, tmp_path: Path) -> None:
    model_of(with_kv_heads(model_type, 8)).save_pretrained(tmp_path / "src")
    made = plan(tmp_path / "src", 2, method="aligned")
    assert made.units[0].layer.stack.projections[0].holds == "qkv"
    merge: Any = made.method.build(made, made.options)
    assert [[x.shape[1] for x in rows] for rows in merge.read.values()] == [[32]] * len(made.units)
    assert not [note for note in merge.record["notes"] if "alone" in note]


def test_verified_again_and_on_a_machine_that_rounds_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = outlying(tmp_path / "src")
    convert(src, tmp_path / "dst", 2, method="aligned")
    found = verify(src, tmp_path / "dst")
    assert found.ok and not found.rounded

    def inexact(made: Any, on_text: bool) -> Any:
        model = load(made)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        return model

    monkeypatch.setattr(meaningless, "load", inexact)
    found = verify(src, tmp_path / "dst")
    assert found.ok and found.rounded
    file = tmp_path / "dst" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.self_attn.k_proj.weight"][:4] *= 1.1
    save_file(state, file, {"format": "pt"})
    assert any("layers.1.self_attn.k_proj" in line for line in verify(src, tmp_path / "dst").differences)


def test_a_plan_counts_what_the_pass_takes(tmp_path: Path) -> None:
    src = outlying(tmp_path / "src")
    needed = {method: memory_needed(plan(src, 2, method=method)) for method in ("aligned", "mean")}
    assert needed["aligned"] - needed["mean"] > meaningless.ROWS * meaningless.LENGTH * 64 * 4  # one layer's inputs
