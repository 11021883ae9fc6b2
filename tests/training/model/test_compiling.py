"""Layers compiled one by one: the same result, one graph for all layers and all packings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from tiny import tiny_llama

from hf_attn_patch.losses.chunked import IGNORE
from hf_attn_patch.training.data.packing import PackedBatch
from hf_attn_patch.training.model import compiling
from hf_attn_patch.training.model.objectives import CausalObjective
from hf_attn_patch.training.model.other_objectives import EncoderObjective, Seq2SeqObjective


def batch(cuts: list[int], seed: int = 0) -> PackedBatch:
    """Documents that end at ``cuts`` in a row of 48 tokens."""
    torch.manual_seed(seed)
    ends = torch.tensor([0, *cuts, 48], dtype=torch.int32)
    lengths = ends.diff().tolist()
    ids = torch.randint(0, 512, (1, 48))
    labels = ids.roll(-1, 1)
    labels[0, ends[1:].long() - 1] = IGNORE
    return PackedBatch(ids, labels, torch.cat([torch.arange(n) for n in lengths])[None], ends, max(lengths))


@pytest.fixture
def objective():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_llama(2, num_hidden_layers=3)
    model.set_attn_implementation("hf_attn_patch")
    yield CausalObjective(model)
    torch._dynamo.reset()


def compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def quick(monkeypatch):
    """Traced by dynamo, differentiated by AOTAutograd, and not handed to Inductor, which takes its time."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: plain(self, backend="aot_eager", **how))


def result(objective: CausalObjective, given: PackedBatch) -> list[torch.Tensor]:
    objective.zero_grad()
    sums = objective(given)
    sums.loss.backward()
    return [sums.loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_stay_and_nothing_is_compiled_twice(objective, quick, checkpointing):
    if checkpointing:
        objective.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batches = [batch([7, 20]), batch([40], 1), batch([3, 11, 12, 30, 41], 2), batch([], 3)]
    plain = [result(objective, b) for b in batches]
    objective.compile_layers()
    ours = [result(objective, batches[0])]
    graphs = compiled()
    assert graphs > 0
    ours += [result(objective, b) for b in batches[1:]]
    assert compiled() == graphs
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_more_layers_are_no_more_graphs(quick):
    found = []
    for layers in (2, 5):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_llama(2, num_hidden_layers=layers)
        model.set_attn_implementation("hf_attn_patch")
        objective = CausalObjective(model)
        objective.compile_layers()
        result(objective, batch([9]))
        found.append(compiled())
    assert found[0] == found[1] > 0


def test_borders_hold_in_compiled_layers(objective, quick):
    """The second document's hidden states do not change with the first's words."""
    objective.compile_layers()
    one = batch([20])
    other = PackedBatch(one.ids.clone(), one.labels, one.positions, one.cu_seqlens, one.longest)
    other.ids[:, :20] = (other.ids[:, :20] + 5) % 512
    with torch.no_grad():
        a, b = (objective(x, mode="hidden") for x in (one, other))
    torch.testing.assert_close(a[20:], b[20:], rtol=0, atol=0)
    assert (a[:20] - b[:20]).abs().max() > 0.1


def test_attention_is_ours_but_not_traced(objective, quick):
    objective.compile_layers()
    assert objective.model.config._attn_implementation == compiling.UNTRACED
    result(objective, batch([9]))
    reasons = " ".join(torch._dynamo.utils.counters["graph_break"])
    assert "attention_forward" in reasons


def tiny_families():
    torch.manual_seed(0)
    small = {"vocab_size": 512, "pad_token_id": 0}
    return {
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        ),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **small, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        "bert": transformers.BertForMaskedLM(
            transformers.BertConfig(
                **small, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
            )
        ),
    }


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(f, marks=pytest.mark.once) for f in ("t5", "bert"))])
def test_other_families_stay_as_they_are(family, quick):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_families()[family].eval()  # without dropout
    model.set_attn_implementation("hf_attn_patch")
    make = {"gpt2": CausalObjective, "t5": Seq2SeqObjective, "bert": EncoderObjective}[family]
    objective = make(model)
    if family == "gpt2":
        batches = [batch([7, 20]), batch([40], 1)]
    else:  # padded ones of other lengths
        batches = [objective.check_batch(torch.device("cpu")) for _ in range(2)]
        batches[1] = replace(batches[1], ids=batches[1].ids.roll(1, 1))
    plain = [objective(b, mode="hidden").detach() for b in batches]
    objective.compile_layers()
    ours = [objective(b, mode="hidden").detach() for b in batches]
    assert compiled() > 0
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
