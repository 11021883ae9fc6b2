"""Layers compiled one by one: the same result, one graph for all layers and all packings."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from hf_attn_patch.training import compiling
from hf_attn_patch.training.losses import IGNORE
from hf_attn_patch.training.objectives import CausalObjective
from hf_attn_patch.training.packing import PackedBatch


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


def compiled(objective: CausalObjective) -> int:
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
    return [sums.loss.detach(), *(p.grad.clone() for p in objective.parameters())]


def test_losses_and_gradients_stay_and_nothing_is_compiled_twice(objective, quick):
    batches = [batch([7, 20]), batch([40], 1), batch([3, 11, 12, 30, 41], 2), batch([], 3)]
    plain = [result(objective, b) for b in batches]
    objective.compile_layers()
    ours = [result(objective, batches[0])]
    graphs = compiled(objective)
    ours += [result(objective, b) for b in batches[1:]]
    assert compiled(objective) == graphs
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
        found.append(compiled(objective))
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
