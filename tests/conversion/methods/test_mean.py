"""The pooling methods against arithmetic written out, and the layouts against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights, join, split
from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.families.table import Projection, Stack
from hf_attn_patch.conversion.methods.mean import first, mean, mean_norm, mean_of
from hf_attn_patch.grouping import KVGrouping


def layer(kv_heads: int, new: int, head_dim: int = 3, width: int = 5, heads: int | None = None) -> LayerAttention:
    number = heads or kv_heads
    return LayerAttention(
        Stack(),
        0,
        "layer.",
        number,
        kv_heads,
        new,
        head_dim,
        width,
        width,
        rope="half",
        rotary_dims=0,
        fixed_heads=False,
    )


def weights(at: LayerAttention, *, bias: bool = True) -> AttentionWeights:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    biases = {n: draw(at.kv_heads, at.head_dim) for n in ("k_bias", "v_bias")} if bias else {}
    kv = {n: draw(at.kv_heads, at.head_dim, at.width) for n in ("k", "v")}
    return AttentionWeights(at, **kv, **biases, k_norm=draw(at.kv_heads, at.head_dim))


groupings = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(groupings)
def test_mean_element_by_element(sizes: tuple[int, int]) -> None:
    new, per = sizes
    old = weights(layer(new * per, new))
    out = mean()(old)
    for name in ("k", "v", "k_bias", "v_bias", "k_norm"):
        before, after = getattr(old, name), getattr(out, name)
        for g in range(new):
            total = torch.zeros_like(before[0])
            for h in range(g * per, (g + 1) * per):
                total = total + before[h]
            torch.testing.assert_close(after[g], total / per)


@given(groupings)
def test_first_takes_the_first(sizes: tuple[int, int]) -> None:
    new, per = sizes
    old = weights(layer(new * per, new))
    out = first()(old)
    assert out.k is not None
    assert old.k is not None
    assert all(torch.equal(out.k[g], old.k[g * per]) for g in range(new))


@given(groupings)
def test_mean_norm_points_like_the_mean_and_is_as_long_as_the_heads(sizes: tuple[int, int]) -> None:
    new, per = sizes
    old = weights(layer(new * per, new))
    plain, out = mean()(old), mean_norm()(old)
    for name in ("k", "v"):
        before = torch.cat([getattr(old, name), getattr(old, f"{name}_bias")[..., None]], dim=-1)
        pooled = torch.cat([getattr(plain, name), getattr(plain, f"{name}_bias")[..., None]], dim=-1)
        after = torch.cat([getattr(out, name), getattr(out, f"{name}_bias")[..., None]], dim=-1)
        for g in range(new):
            wanted = sum(float(before[h].norm()) for h in range(g * per, (g + 1) * per)) / per
            assert float(after[g].norm()) == pytest.approx(wanted)
            torch.testing.assert_close(after[g] / after[g].norm(), pooled[g] / pooled[g].norm())


def test_mean_norm_of_heads_that_cancel_is_zero_not_nan() -> None:
    at = layer(2, 1)
    k = torch.ones(1, 3, 5)
    out = mean_norm()(AttentionWeights(at, k=torch.cat([k, -k])))
    assert out.k is not None
    assert torch.equal(out.k, torch.zeros(1, 3, 5))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_mean_composes(a: int, b: int, c: int) -> None:
    heads = torch.randn(a * b * c, 2, 3, dtype=torch.float64)
    staged = mean_of(mean_of(heads, KVGrouping(a * b * c, a * b * c).merged(a * b)), KVGrouping(a * b, a * b).merged(a))
    torch.testing.assert_close(staged, mean_of(heads, KVGrouping(a * b * c, a * b * c).merged(a)))


def test_one_head_per_group_is_bitwise_itself() -> None:
    heads = torch.randn(4, 3, 5)
    assert torch.equal(mean_of(heads, KVGrouping(4, 4).merged(4)), heads)


PROJECTIONS = [
    Projection("x", "q"), Projection("x", "k"), Projection("x", "kv"), Projection("x", "qkv"), Projection("x", "qvk"),
    Projection("x", "qvk", blocks=2), Projection("x", "qkv", "groups"),
]  # fmt: skip


@given(st.sampled_from(PROJECTIONS), st.sampled_from([(4, 4), (4, 2), (8, 2)]), st.booleans())
def test_join_undoes_split(projection: Projection, heads: tuple[int, int], bias: bool) -> None:
    rows = 3 * sum(heads[0] if role == "q" else heads[1] for role in projection.holds)
    out = torch.arange(rows * (1 if bias else 2)).reshape(rows, *([] if bias else [2]))
    parts = split(projection, out, *heads, 3)
    assert {role: part.shape[0] for role, part in parts.items()} == {
        role: heads[0] if role == "q" else heads[1] for role in projection.holds
    }
    assert torch.equal(join(projection, parts), out)


def test_where_every_layout_keeps_a_head() -> None:
    """Row numbers by hand: 4 query heads, 2 KV heads, D = 1."""
    row = torch.arange(8)
    contiguous = split(Projection("x", "qkv"), row, 4, 2, 1)
    assert [contiguous[r].flatten().tolist() for r in "qkv"] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    grouped = split(Projection("x", "qkv", "groups"), row, 4, 2, 1)
    assert [grouped[r].flatten().tolist() for r in "qkv"] == [[0, 1, 4, 5], [2, 6], [3, 7]]
    blocks = split(Projection("x", "qvk", blocks=2), row, 4, 2, 1)
    assert [blocks[r].flatten().tolist() for r in "qkv"] == [[0, 1, 4, 5], [3, 7], [2, 6]]
    per_head = split(Projection("x", "qkv", "groups"), torch.arange(12), 4, 4, 1)
    assert [per_head[r].flatten().tolist() for r in "qkv"] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
