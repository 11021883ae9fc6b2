"""The masks of GroupedQueryAttention: how they are read or refused, with weights, windows and caches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_attention import HQ, D, E, close, pair
from transformers import DynamicCache, LlamaConfig, StaticCache

from hf_attn_patch.modeling import GroupedQueryAttention, Rope


def test_a_query_that_sees_nothing_is_zero():
    _, ours = pair(2)
    x = torch.randn(2, 3, E, dtype=torch.float64)
    for masks in (
        {"key_padding_mask": torch.tensor([[False] * 3, [True] * 3])},
        {"attention_mask": torch.tensor([[1] * 3, [0] * 3])},
    ):
        out, weights = ours(x, need_weights=True, **masks)
        assert not weights[1].any()
        close(out[1], ours.o_proj.bias.expand(3, E))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_weights_with_windows_and_caches(causal, window, cached):
    """The weights are over all keys, those that a window cuts off included, and make the output."""
    torch.manual_seed(0)
    module = GroupedQueryAttention(E, HQ, 2, causal=causal, window=window, position=Rope(D)).double()
    x = torch.randn(2, 6, E, dtype=torch.float64)
    want, whole = module(x, need_weights=True, average_attn_weights=False)
    causal = causal or window is not None
    see = torch.ones(6, 6, dtype=torch.bool)
    see = see.tril() if causal else see
    see = see & ~see.tril(-window) if window else see
    assert torch.equal(whole > 0, see.expand(2, HQ, 6, 6))
    close(whole.sum(-1), torch.ones(2, HQ, 6, dtype=torch.float64))
    if cached and causal:
        cache = DynamicCache()
        module(x[:, :4], past_key_values=cache)
        out, weights = module(x[:, 4:], past_key_values=cache, need_weights=True, average_attn_weights=False)
        close(weights, whole[:, :, 4:])
        close(out, want[:, 4:])


SHAPES = ["B Sk", "Sq Sk", "1 Sk", "B 1 Sk", "HQ Sq Sk", "B Sq Sk", "B 1 1 Sk", "B HQ Sq Sk", "1 1 Sq Sk"]


@settings(max_examples=100, deadline=None)
@given(
    B=st.integers(1, 4), Sq=st.integers(1, 4), Sk=st.integers(1, 4), seed=st.integers(0, 99),
    form=st.sampled_from(["long", "bool", "float"]), shape=st.sampled_from(SHAPES),
)  # fmt: skip
def test_attention_mask_is_read_in_the_one_way_or_refused(B, Sq, Sk, seed, form, shape):
    """All readings of a shape and dtype that the documentation allows; where they differ, none is taken."""
    _, ours = pair(2)
    g = torch.Generator().manual_seed(seed)
    sizes = {"B": B, "Sq": Sq, "Sk": Sk, "HQ": HQ, "1": 1}
    see = torch.rand(tuple(sizes[n] for n in shape.split()), generator=g) < 0.6
    mask = {"long": see.long(), "bool": see, "float": torch.zeros(see.shape).double().masked_fill(~see, -math.inf)}[
        form
    ]
    x, source = (torch.randn(B, S, E, dtype=torch.float64, generator=g) for S in (Sq, Sk))
    readings = []
    if see.dim() == 2 and see.shape[0] in (1, B):
        readings.append(see[:, None, None])
    if form != "long" and all(n in (1, m) for n, m in zip(reversed(see.shape), (Sk, Sq, HQ, B), strict=False)):
        readings.append(see.reshape((1,) * (4 - see.dim()) + see.shape))
    if see.dim() == 3 and see.shape[0] == B and see.shape[1] in (1, Sq) and form != "long":
        readings.append(see[:, None])  # as some models have it
    outs = []
    for reading in readings:
        hidden = ~reading.expand(B, HQ, Sq, Sk).flatten(0, 1)
        outs.append(ours(x, source, attn_mask=hidden))
    got, refusal = attempt(lambda: ours(x, source, attention_mask=mask))
    if refusal:
        assert "attention_mask" in refusal
        assert len(outs) != 1 or form == "float" or see.dim() == 3
    else:
        assert any(torch.allclose(got, out) for out in outs)
        if see.dim() != 3:
            for out in outs:
                close(got, out)


def attempt(call):
    """(what it gives, None), or (None, why it is refused)."""
    try:
        return call(), None
    except ValueError as error:
        return None, str(error)


def test_masks_that_are_refused():
    _, ours = pair(2)
    x = torch.randn(4, 4, E)
    ours = ours.float()
    lower = torch.ones(4, 4).tril()
    for name, mask, message in (
        ("attention_mask", lower.log(), "floats may be ones and zeros or scores to add"),
        ("attention_mask", lower, "floats may be ones and zeros or scores to add"),
        ("attention_mask", lower.bool(), r"may be \[B, Sk\] or \[Sq, Sk\], as there are 4 of both"),
        ("attention_mask", torch.ones(4, 4, 4, dtype=torch.bool), r"may be \[B, Sq, Sk\] or \[HQ, Sq, Sk\]"),
        ("attention_mask", torch.ones(4, 1, 4, 4, dtype=torch.long), "of int64: it is"),
        ("attention_mask", torch.ones(3, 4, dtype=torch.long), r"of int64: it is \[B, Sk\] of ones and zeros"),
        ("attention_mask", torch.ones(4, 9, dtype=torch.long), "covers 9 keys, but there are 4"),
        ("attn_mask", lower.long(), "int64: it is bool"),
        ("attn_mask", torch.ones(4, 4, 4, dtype=torch.bool), r"B = 4, HQ = 4 query heads and Sq = 4"),
        ("attn_mask", torch.ones(3, 4, dtype=torch.bool), r"it is \[Sq, Sk\] or \[B \* HQ, Sq, Sk\]"),
        ("attn_mask", torch.ones(4, 3, dtype=torch.bool), "covers 3 keys, but there are 4"),
        ("key_padding_mask", torch.ones(4, 4, dtype=torch.long), "go into attention_mask"),
        ("key_padding_mask", torch.ones(3, 4, dtype=torch.bool), r"it is \[B, Sk\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(x, **{name: mask})
    with pytest.raises(ValueError, match="masks of one convention"):
        ours(x, attention_mask=torch.ones(4, 4, dtype=torch.long), key_padding_mask=torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="two names for one argument"):
        ours(x, hidden_states=x)
    with pytest.raises(ValueError, match="a key"):
        ours(x, value=x)
    with pytest.raises(ValueError, match="packed"):
        ours(x[:1], cu_seqlens=torch.tensor([0, 4]), key_padding_mask=torch.zeros(1, 4, dtype=torch.bool))
    close(ours(hidden_states=x, key_value_states=x + 1), ours(x, x + 1))


def test_integers_are_padding_whatever_their_shape():
    _, ours = pair(2)
    x = torch.randn(4, 4, E, dtype=torch.float64)
    mask = torch.ones(4, 4, dtype=torch.long).tril()
    close(ours(x, attention_mask=mask), ours(x, key_padding_mask=mask == 0))
    assert not torch.allclose(ours(x, attention_mask=mask), ours(x, attn_mask=mask == 0))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", ["attention_mask", "bool", "float", "rows"])
def test_masks_count_what_is_cached(static, form):
    """Steps with a cache are the whole forward, with every kind of mask over all keys so far."""
    torch.manual_seed(0)
    module = GroupedQueryAttention(E, HQ, 2, causal=True, position=Rope(D)).double()
    config = LlamaConfig(hidden_size=E, num_attention_heads=HQ, num_key_value_heads=2, num_hidden_layers=1)
    cache = StaticCache(config, max_cache_len=9) if static else DynamicCache()
    x = torch.randn(2, 6, E, dtype=torch.float64)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 1:3] = True

    def masks(begin, end):
        if form == "attention_mask":
            return {"attention_mask": (~hidden[:, :end]).long()}
        if form == "rows":
            rows = hidden[1, :end].expand(end - begin, end) & (torch.arange(begin, end)[:, None] > 3)
            return {"attn_mask": rows, "key_padding_mask": hidden[:, :end]}
        scores = torch.zeros(2, end, dtype=torch.float64).masked_fill(hidden[:, :end], -math.inf)
        return {"key_padding_mask": hidden[:, :end] if form == "bool" else scores}

    whole = module(x, **masks(0, 6))
    steps, at = [], 0
    for n in (3, 2, 1):
        steps.append(module(x[:, at : at + n], past_key_values=cache, **masks(at, at + n)))
        at += n
    close(torch.cat(steps, 1), whole)
    if not static:
        before = cache.get_seq_length()
        with pytest.raises(ValueError, match="covers 2 keys, but with the cached ones there are 7"):
            module(x[:, :1], past_key_values=cache, key_padding_mask=hidden[:, :2])
        assert cache.get_seq_length() == before  # nothing was written
