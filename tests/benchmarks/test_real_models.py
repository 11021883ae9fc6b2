"""The readers and rivals of ``benchmarks/real_models.py``: what they give, worked out another way."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rounded import RoundedCache
from tiny import tiny_llama
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks import real_measure, real_methods, real_report, real_sources
from benchmarks.real_checkpoints import ctranslate2_variables
from hf_attn_patch.compat.calls import generate_keyword
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.families.layer import stack_layers
from hf_attn_patch.conversion.families.table import Stack


def test_ctranslate2_reader() -> None:
    """A file written by hand: two variables of two dtypes."""

    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    a, b = np.arange(6, dtype=np.float16).reshape(2, 3), np.array(5, dtype=np.int8)
    raw = struct.pack("<I", 6) + word("Spec") + struct.pack("<II", 3, 2)
    raw += word("a/b") + struct.pack("<B2IBI", 2, 2, 3, 4, 12) + a.tobytes()
    raw += word("c") + struct.pack("<BBI", 0, 1, 1) + b.tobytes()
    found = ctranslate2_variables(raw)
    assert list(found) == ["a/b", "c"] and found["c"].shape == ()
    np.testing.assert_array_equal(found["a/b"], a)


def heads(turned: bool) -> tuple[AttentionWeights, torch.Tensor]:
    """Two KV heads that are one head in two bases, each with two query heads."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    layer = replace(stack_layers(Stack(), config, "here")[0], new_kv_heads=1)
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 4, 16, generator=draw).double().repeat(2, 1, 1) for _ in range(2))
    q, o = torch.randn(4, 4, 16, generator=draw).double(), torch.randn(4, 16, 4, generator=draw).double()
    if turned:
        turn = torch.linalg.qr(torch.randn(4, 4, generator=draw).double())[0]
        v[1], angles = turn @ v[1], torch.tensor([0.3, 2.0]).double()
        c, s = angles.cos()[:, None], angles.sin()[:, None]
        k[1] = torch.cat([c * k[1, :2] - s * k[1, 2:], s * k[1, :2] + c * k[1, 2:]])
    x = torch.randn(64, 16, generator=draw).double()
    x = torch.cat([x, torch.ones(64, 1)], 1)
    return AttentionWeights(layer, q=q, k=k, v=v, o=o), x.T @ x / 64


def test_procrustes_finds_the_turn_back() -> None:
    """Scores of two positions and outputs are those of the source, where heads differ by a turn alone."""
    weights, moment = heads(turned=True)
    made = real_methods.procrustes(weights, moment, rounds=200)
    assert weights.k is not None and weights.q is not None and weights.v is not None and weights.o is not None
    assert made.k is not None and made.q is not None and made.v is not None and made.o is not None
    for h in range(4):
        torch.testing.assert_close(made.o[h] @ made.v[0], weights.o[h] @ weights.v[h // 2], atol=1e-6, rtol=1e-6)
        for part in (torch.real, torch.imag):  # <q, R k> of every plane: both parts of conj(q) k, summed with R's
            q, k = (torch.complex(t[:2], t[2:]) for t in (made.q[h], made.k[0]))
            wq, wk = (torch.complex(t[:2], t[2:]) for t in (weights.q[h], weights.k[h // 2]))
            got, want = (torch.einsum("pe,pf->pef", x.conj(), y) for x, y in ((q, k), (wq, wk)))
            torch.testing.assert_close(part(got), part(want), atol=1e-6, rtol=1e-6)


def test_a_projected_cache_of_equal_heads_loses_nothing() -> None:
    model: LlamaForCausalLM = tiny_llama(4).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                p.view(4, -1, p.shape[1])[1:] = p.view(4, -1, p.shape[1])[0]
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        cache = real_methods.ProjectedCache(model, (range(4),), ids)
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert cache.bases is not None and cache.bases[0][0].shape == (64, 16)


def test_a_mix_takes_equal_shares_and_gives_on_what_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "texts").mkdir()
    for name, text in (("a", "a" * 10), ("b", "b" * 100), ("c", "c" * 100)):
        (folder / "texts" / f"{name}.txt").write_text(text)
    found = real_sources.mixed(folder, ("a", "b", "c"), 90)
    assert [found.count(letter) for letter in "abc"] == [10, 40, 40]


def test_rows_without_the_long_test_say_so() -> None:
    domains = {"a": {"loss_before": 2.0, "loss_after": 2.5, "kl": 0.25}}
    common = {"model": "m", "kv_heads": 1, "kv_bytes": 8, "seconds": 1.0, "domains": domains}
    with_test = {**common, "row": "with", "seed": 0, "passkey": {"4096": 0.5}}
    *_, first, second = real_report.lines([with_test, {**common, "row": "without", "seed": 1}])
    assert first == "| with | 0 | 8 | +0.500 | 0.250 | 50% | 1 | 0.0 |"
    assert second == "| without | 1 | 8 | +0.500 | 0.250 | not run | 1 | 0.0 |"


def test_the_figure_is_the_committed_numbers() -> None:
    """Every line from the source's bytes and mean loss to a row's, by numbers read out of the file by hand."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "real_models.json"
    records = json.loads(file.read_text())
    drawn = real_report.figure(records)
    found = {tuple(map(float, line.get_xdata())) for line in drawn.axes[0].lines}
    assert found == {(7680.0, 23040.0)}
    ends = sorted(round(float(line.get_ydata()[0]), 4) for line in drawn.axes[0].lines)
    rows = ["mean", "procrustes", "svd", "merged, own", "default", "wide", "wide + KD 20M"]
    want = [np.mean([d["loss_after"] for d in r["domains"].values()]) for r in records if r["row"] in rows]
    assert ends == sorted(round(float(x), 4) for x in want) and len(ends) == 7
    said = " ".join(text.get_text() for text in drawn.axes[0].texts)
    assert f"({min(want):.2f})" in said and "(2.89)" in said
    pyplot.close(drawn)


def test_loss_by_caches_is_that_of_a_cache_that_rounds() -> None:
    """A tiny model that reads 200 tokens in chunks of 64; the truth rounds by itself."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **sizes)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 128, (2, 200))
    found = real_measure.by_caches(model, {"a": ids}, (None, "int8"))["a"]
    losses = {}
    for kind, make in {"None": DynamicCache, "int8": lambda: RoundedCache("int8", config)}.items():
        total = 0.0
        for row in ids:
            cache, logits = make(), []
            with torch.no_grad():
                for chunk in row[None].split(64, 1):
                    logits.append(model(chunk, **{generate_keyword(): cache}).logits[0])
            total += float(torch.nn.functional.cross_entropy(torch.cat(logits)[:-1], row[1:]))
        losses[kind] = total / 2
    assert found["None"]["loss"] == pytest.approx(losses["None"], abs=1e-5)
    assert found["int8"]["loss"] == pytest.approx(losses["int8"], abs=1e-5)
    assert found["None"]["kl"] == 0 < found["int8"]["kl"] < 0.01
    assert losses["int8"] != losses["None"]
