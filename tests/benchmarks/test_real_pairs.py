"""``benchmarks/real_pairs.py``: what it counts, its table, and the reader of quantized ONNX graphs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from zoo_cases import BY_NAME

from benchmarks import real_checkpoints, real_pairs, real_sources
from hf_attn_patch.conversion.calibration.samples import Samples


def test_a_table_of_differences() -> None:
    source = {"loss_before": 0.3, "loss_after": 0.3, "kl": 0.0}
    known: dict[str, Any] = {"model": "m", "kv_heads": 3, "device": "CPU", "seconds": 1.0}
    records = [
        known | {"row": "source", "speech": source | {"wer": 0.1}, "text": source},
        known | {"row": "mean", "speech": source | {"loss_after": 1.5, "kl": 1.25, "wer": 0.5}, "text": source},
    ]
    table = real_pairs.lines(records)
    assert table[-2:] == [
        "| source | 0.300 | 0 | 0.100 | 0.300 | 0 | 1 |",
        "| mean | +1.200 | 1.250 | 0.500 | +0.000 | 0.000 | 1 |",
    ]
    assert len({line.count("|") for line in table[-4:]}) == 1


def test_the_text_columns_are_the_models_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' loss of the same words; the source loses nothing to itself."""
    from tiny import trained_tokenizer

    monkeypatch.setattr(real_pairs, "PARAGRAPHS", 8)
    source = tmp_path / "data" / "models" / "flan-tiny"
    BY_NAME["t5"].make(None, vocab_size=512, eos_token_id=1).save_pretrained(source)
    trained_tokenizer().save_pretrained(source)
    (tmp_path / "data" / "texts").mkdir()
    for name in real_sources.PAIRS:
        (tmp_path / "data" / "texts" / f"{name}.test.txt").write_text(f"{name} import numpy def main " * 2000)
    options = argparse.Namespace(
        data=tmp_path / "data", out=tmp_path / "out", model="flan-tiny", kv_heads=1, recordings=None
    )  # fmt: skip
    bench = real_pairs.Bench(options)
    bench.run("source", {})
    bench.run("mean", {"method": "mean"})
    first, second = bench.records
    model = T5ForConditionalGeneration.from_pretrained(source)
    for name, samples in bench.tests.items():
        assert first[name]["loss_after"] == first[name]["loss_before"] and first[name]["kl"] < 1e-6
        assert second[name]["kl"] > 0
        with torch.no_grad():
            want = model(input_ids=samples.inputs[0], decoder_input_ids=samples.inputs[1], labels=samples.labels).loss
        assert first[name]["loss_before"] == pytest.approx(float(want), abs=1e-4)


def test_quantized_products_and_embeddings_of_an_onnx_graph(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    draw = torch.Generator().manual_seed(0)
    product = torch.randint(-127, 128, (4, 3), generator=draw, dtype=torch.int8)
    words = torch.randint(0, 256, (5, 4), generator=draw, dtype=torch.uint8)
    norm = torch.randn(4, generator=draw)
    initializers = [
        numpy_helper.from_array(value.numpy(), name)
        for name, value in {
            "onnx::MatMul_7_quantized": product,
            "onnx::MatMul_7_scale": torch.tensor(0.5),
            "onnx::MatMul_7_zero_point": torch.tensor(0, dtype=torch.int8),
            "enc.embed_tokens.weight_quantized": words,
            "enc.embed_tokens.weight_scale": torch.tensor(0.25),
            "enc.embed_tokens.weight_zero_point": torch.tensor(100, dtype=torch.uint8),
            "enc.final_layer_norm.weight": norm,
        }.items()
    ]
    node = helper.make_node(
        "MatMulInteger",
        ["x", "onnx::MatMul_7_quantized"],
        ["y"],
        name="/enc/block.0/layer.0/SelfAttention/q/MatMul_quant",
    )
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 3])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], initializers)), str(tmp_path / "a.onnx"))
    found = real_checkpoints.dequantized(tmp_path / "a.onnx")
    torch.testing.assert_close(found["enc.block.0.layer.0.SelfAttention.q.weight"], 0.5 * product.float().T)
    torch.testing.assert_close(found["enc.embed_tokens.weight"], (words.float() - 100) / 4)
    torch.testing.assert_close(found["enc.final_layer_norm.weight"], norm)


def test_an_untied_t5_keeps_its_head(tmp_path: Path) -> None:
    """transformers ties every T5 that it makes; a checkpoint with a head of its own must come back with it."""
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.tie_word_embeddings = False
    state = {n: torch.randn_like(p) for n, p in T5ForConditionalGeneration(config).state_dict().items()}
    state["encoder.embed_tokens.weight"] = state["decoder.embed_tokens.weight"] = state["shared.weight"]
    real_checkpoints.save(tmp_path, T5ForConditionalGeneration, config, state, torch.float32)
    back = T5ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_the_prefix_is_what_stands_before_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first row that is shorter than the others ends with padding, which has no labels either."""
    ids = torch.tensor([[5, 6, 1, 2, 9, 9, 9], [5, 6, 1, 2, 3, 4, 9]])
    labels = torch.tensor([[-100, 1, 2, 9, -100, -100, -100], [-100, 1, 2, 3, 4, 9, -100]])
    samples = Samples([torch.zeros(2, 3), ids], {}, [], ids != 9, labels, torch.zeros(2, 3, 4))
    bench = real_pairs.Bench.__new__(real_pairs.Bench)
    begun: list[list[int]] = []

    class Words:
        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return " ".join(["one", "two", "three", "four"][int(i) - 1] for i in ids if int(i) != 9)

    def greedy(model: Any, memory: torch.Tensor, given: torch.Tensor) -> list[list[int]]:
        begun.extend(given.tolist())
        return [[1, 2]] * len(given)

    bench.tokenizer, bench.device = Words(), torch.device("cpu")
    monkeypatch.setattr(real_pairs, "greedy", greedy)
    assert bench.wer(None, samples) == 2 / 6
    assert begun == [[5, 6], [5, 6]]


def test_greedy_writes_what_each_row_alone_would_without_a_cache() -> None:
    model: Any = BY_NAME["whisper"].make(None, eos_token_id=30, begin_suppress_tokens=[3, 4]).eval()
    draw = torch.Generator().manual_seed(1)
    memory = torch.randn(3, 5, model.config.d_model, generator=draw)
    begun = torch.randint(1, model.config.eos_token_id, (3, 2), generator=draw)
    found = real_pairs.greedy(model, memory, begun, most=4)
    for row, heard, ids in zip(found, memory, begun, strict=True):
        want = ids[None]
        while len(want[0]) < 6:
            hidden = model.get_decoder()(input_ids=want, encoder_hidden_states=heard[None])[0][0, -1]
            scores = model.proj_out(hidden)
            if len(want[0]) == 2:
                scores[model.config.begin_suppress_tokens] = -torch.inf
            best = int(scores[: model.config.eos_token_id + 1].argmax())
            if best == model.config.eos_token_id:
                break
            want = torch.cat([want, torch.tensor([[best]])], 1)
        assert row == want[0, 2:].tolist()
