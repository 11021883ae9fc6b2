"""Aligned merging against attention written out, and against the SVDs that it solves in another form."""

import doctest
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import attend

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.families.table import Stack
from hf_attn_patch.conversion.methods import align
from hf_attn_patch.conversion.methods import similar_heads as group
from hf_attn_patch.conversion.methods.align import merge_aligned, shared_head
from hf_attn_patch.conversion.methods.aligned import permuted
from hf_attn_patch.conversion.methods.similar_heads import pair_losses, similar_order

E, D, S = 20, 8, 7
ROTARY = [("half", 8), ("interleaved", 8), ("half", 4), ("interleaved", 2), ("none", 0)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(hq: int, hkv: int, new: int, rope: Any = "half", dims: int = 8, bias: bool = False) -> AttentionWeights:
    biases = {"q_bias": random(hq, D, seed=5), "k_bias": random(hkv, D, seed=6), "v_bias": random(hkv, D, seed=7)}
    return AttentionWeights(
        LayerAttention(Stack(), 0, "layers.0.", hq, hkv, new, D, E, E, rope, dims, False),
        q=random(hq, D, E, seed=1),
        k=random(hkv, D, E, seed=2),
        v=random(hkv, D, E, seed=3),
        o=random(hq, E, D, seed=4),
        **(biases if bias else {}),
    )


def with_layer(weights: AttentionWeights, **changes: Any) -> AttentionWeights:
    return replace(weights, layer=replace(weights.layer, **changes))


def tensors(weights: AttentionWeights) -> list[torch.Tensor]:
    return [t for t in vars(weights).values() if isinstance(t, torch.Tensor)]


def with_one(x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    return x.T @ x / len(x)


def moment() -> torch.Tensor:
    return with_one(random(200, E) @ random(E, E, seed=1))


def turn_key(rope: str, dims: int, seed: int) -> torch.Tensor:
    """A random change of basis that RoPE allows: scaled rotations of the planes, anything on the rest."""
    M = torch.zeros(D, D, dtype=torch.float64)
    for j in range(dims // 2):
        a, b = (j, j + dims // 2) if rope == "half" else (2 * j, 2 * j + 1)
        x, y = random(2, seed=seed + j).tolist()
        M[a, a], M[a, b], M[b, a], M[b, b] = x, -y, y, x
    M[dims:, dims:] = random(D - dims, D - dims, seed=seed + 99)
    return M


def equal_up_to_bases(hq: int, hkv: int, new: int, rope: str, dims: int, bias: bool = False) -> AttentionWeights:
    """KV heads that are one head per group, each in a basis of its own."""
    few, many = layer(hq, new, new, rope, dims, bias), layer(hq, hkv, new, rope, dims, bias)
    of = [h // (hkv // new) for h in range(hkv)]
    turns = {
        "k": torch.stack([turn_key(rope, dims, seed=7 * h) for h in range(hkv)]),
        "v": torch.stack([random(D, D, seed=1000 + h) for h in range(hkv)]),
    }
    for name, M in turns.items():
        setattr(many, name, M @ getattr(few, name)[of])
        if bias:
            setattr(many, f"{name}_bias", (M @ getattr(few, f"{name}_bias")[of][..., None])[..., 0])
    return many


def mean_pooled(weights: AttentionWeights) -> AttentionWeights:
    new = weights.layer.new_kv_heads
    pooled = {
        name: getattr(weights, name).unflatten(0, (new, -1)).mean(1)
        for name in ("k", "v", "k_bias", "v_bias")
        if getattr(weights, name) is not None
    }
    return replace(weights, **pooled)


def error(a: AttentionWeights, b: AttentionWeights) -> float:
    x = random(S, E, seed=42)
    truth = attend(a, x)
    return float((attend(b, x) - truth).abs().max() / truth.abs().max())


def test_docstrings():
    assert doctest.testmod(align).failed == doctest.testmod(group).failed == 0


@pytest.mark.parametrize(("rope", "dims"), ROTARY)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("hq", "hkv", "new"), [(4, 4, 2), (4, 4, 1), (8, 4, 2)])
def test_heads_equal_up_to_their_bases_merge_without_loss(rope, dims, bias, calibrated, hq, hkv, new):
    weights: Any = equal_up_to_bases(hq, hkv, new, rope, dims, bias)
    merged: Any = merge_aligned(weights, moment=moment() if calibrated else None)
    assert merged.k.shape == merged.v.shape == (new, D, E)
    assert error(weights, merged) < 1e-9
    assert error(weights, mean_pooled(weights)) > 0.05


@pytest.mark.parametrize(
    ("made", "taken"), [(("none", 0), ("half", 8)), (("half", 8), ("interleaved", 8)), (("half", 4), ("half", 8))]
)
def test_a_change_of_basis_that_rope_does_not_allow_is_not_taken_for_one(made, taken):
    """Mixing across planes, the other layout's planes, rotary dimensions taken for free ones: all change the scores."""
    weights: Any = equal_up_to_bases(4, 4, 2, *made)
    assert error(weights, merge_aligned(weights)) < 1e-9
    other = with_layer(weights, rope=taken[0], rotary_dims=taken[1])
    assert error(other, merge_aligned(other)) > 1e-3
    wrong = with_layer(merge_aligned(weights), rope=taken[0], rotary_dims=taken[1])
    assert error(other, wrong) > 1e-3


def test_as_many_heads_is_the_identity():
    weights: Any = layer(4, 4, 4)
    assert merge_aligned(weights) is weights


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.sampled_from([4, 8]), st.booleans())
def test_permuted_heads_compute_the_same(order, hq, bias):
    weights: Any = layer(hq, 4, 2, bias=bias)
    assert error(weights, permuted(weights, list(order))) < 1e-12


def test_norms_and_sinks_go_with_their_heads():
    weights: Any = replace(layer(4, 2, 1), sinks=torch.arange(4.0), q_norm=random(4, D), k_norm=random(2, D))
    turned: Any = permuted(weights, [1, 0])
    assert turned.sinks.tolist() == [2, 3, 0, 1]
    assert torch.equal(turned.q_norm, weights.q_norm[[2, 3, 0, 1]])
    assert torch.equal(turned.k_norm, weights.k_norm[[1, 0]])


def test_an_order_with_a_repeat_is_refused():
    with pytest.raises(ValueError, match="no order"):
        permuted(layer(4, 4, 2), [0, 1, 1, 3])


def calibration(calibrated: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """C [E, E] for the explicit SVDs, and the same as the method takes it."""
    C = moment()[:E, :E] if calibrated else torch.eye(E, dtype=torch.float64)
    return C, torch.block_diag(C, torch.ones(1, 1, dtype=torch.float64)) if calibrated else None


@pytest.mark.parametrize("calibrated", [False, True])
def test_values_and_outputs_are_the_truncated_svd(calibrated):
    """The rank-D SVD of [L W_V,h^T W_O,h^T]_h, here with L from a Cholesky factor."""
    weights: Any = layer(4, 4, 1)
    C, given_moment = calibration(calibrated)
    merged: Any = merge_aligned(weights, moment=given_moment)
    L = torch.linalg.cholesky(C).T
    M = torch.cat([L @ weights.v[h].T @ weights.o[h].T for h in range(4)], 1)
    left, singular, right = torch.linalg.svd(M)
    best = left[:, :D] * singular[:D] @ right[:D]
    ours = torch.cat([L @ merged.v[0].T @ merged.o[h].T for h in range(4)], 1)
    torch.testing.assert_close(ours, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("calibrated", [False, True])
def test_keys_are_the_rank_one_svd_of_every_plane(calibrated):
    weights: Any = layer(4, 4, 1)
    C, given_moment = calibration(calibrated)
    merged: Any = merge_aligned(weights, moment=given_moment)
    L = torch.linalg.cholesky(C).T.to(torch.complex128)

    def bilinear(source: Any, h: int, kv: int, a: int) -> torch.Tensor:
        q = torch.complex(source.q[h, a], source.q[h, a + 4])
        k = torch.complex(source.k[kv, a], source.k[kv, a + 4])
        return torch.outer(L @ q.conj(), L @ k)

    for a in range(4):
        M = torch.cat([bilinear(weights, h, h, a) for h in range(4)])
        left, singular, right = torch.linalg.svd(M, full_matrices=False)
        best = singular[0] * torch.outer(left[:, 0], right[0])
        ours = torch.cat([bilinear(merged, h, 0, a) for h in range(4)])
        torch.testing.assert_close(ours, best, rtol=1e-9, atol=1e-9)


def test_calibration_makes_the_error_on_its_inputs_smaller():
    weights: Any = layer(4, 4, 1)
    weights = replace(weights, q=weights.q / 100)  # soft scores: the output is nearly linear in them
    x = random(500, 3, seed=9) @ random(3, E, seed=8) + 0.05 * random(500, E, seed=10)
    truth = attend(weights, x[:50])
    errors = [(attend(merge_aligned(weights, moment=m), x[:50]) - truth).norm() for m in (with_one(x), None)]
    assert errors[0] < 0.7 * errors[1]


def test_cross_attention_weighs_keys_by_what_they_read():
    weights: Any = layer(4, 4, 1, "none", 0)
    memory = random(300, 2, seed=2) @ random(2, E, seed=3)
    merged: Any = merge_aligned(weights, moment=moment(), memory_moment=with_one(memory))
    # two directions and no bias: every head's keys and values fit into one head of 8
    x = random(S, E, seed=1)
    truth = attend(weights, x, memory[:9], causal=False)
    torch.testing.assert_close(attend(merged, x, memory[:9], causal=False), truth, rtol=1e-7, atol=1e-7)


def test_biases_that_are_not_there_stay_away():
    weights: Any = replace(layer(4, 4, 2), q_bias=random(4, D))  # Whisper has no bias on K
    merged: Any = merge_aligned(weights, moment=moment())
    assert merged.k_bias is merged.v_bias is None
    assert merged.q_bias.shape == (4, D)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_moment_of_low_rank_does_no_harm(rank):
    merged: Any = merge_aligned(layer(4, 4, 2, bias=True), moment=with_one(random(50, rank) @ random(rank, E)))
    assert all(t.isfinite().all() for t in tensors(merged))


def test_dead_heads_give_dead_heads():
    weights: Any = layer(4, 4, 1)
    dead: Any = replace(weights, **{n: torch.zeros_like(getattr(weights, n)) for n in "qkvo"})
    assert all((t == 0).all() for t in tensors(merge_aligned(dead)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype):
    weights: Any = layer(4, 4, 2, bias=True)
    low: Any = replace(weights, **{n: t.to(dtype) for n, t in vars(weights).items() if isinstance(t, torch.Tensor)})
    assert {t.dtype for t in tensors(merge_aligned(low))} == {dtype}


def test_scales_stay_as_they_were():
    """A model whose keys are large and whose queries are small keeps it so: optimisers see the scale."""
    weights: Any = layer(4, 4, 2)
    lopsided: Any = replace(weights, q=weights.q / 16, k=weights.k * 16)
    merged: Any = merge_aligned(lopsided)
    before = lopsided.k.square().mean() / lopsided.q.square().mean()
    after = merged.k.square().mean() / merged.q.square().mean()
    assert 0.5 < after / before < 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(4, 9))
def test_shared_head_recovers_what_is_shared(s, d, e):
    Z, B = random(d, e, seed=3), random(s, d, d, seed=4)
    shared, mixes = shared_head(B @ Z, torch.eye(d, dtype=torch.float64).expand(s, d, d), None)
    torch.testing.assert_close(mixes @ shared, B @ Z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rope", "dims"), ROTARY)
def test_grouping_finds_the_heads_that_are_one(rope, dims):
    weights: Any = permuted(equal_up_to_bases(8, 4, 2, rope, dims, bias=True), [0, 2, 1, 3])
    losses = pair_losses(weights, moment=moment())
    assert losses[0, 2] < 1e-9 < 0.01 < losses[0, 1]
    together = permuted(weights, similar_order(losses, 2))
    assert error(weights, merge_aligned(together)) < 1e-9
    assert error(weights, merge_aligned(weights)) > 1e-3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 4)]))
def test_grouping_is_never_worse_than_neighbours(seed, sizes):
    H, groups = sizes
    losses = random(H, H, seed=seed).abs()
    losses = losses + losses.T

    def cost(order: list[int]) -> float:
        parts = [order[i : i + H // groups] for i in range(0, H, H // groups)]
        return sum(float(losses[i, j]) for part in parts for i in part for j in part if i < j)

    order = similar_order(losses, groups)
    assert sorted(order) == list(range(H))
    assert cost(order) <= cost(list(range(H))) + 1e-9
