"""GroupedQueryAttention in the place of torch.nn.MultiheadAttention: masks, weights, layouts, and inside its layers."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from hf_attn_patch.modeling import GroupedQueryAttention, Rope

E, HQ, D = 16, 4, 4


def pair(hkv, batch_first=True, dropout=0.0, seed=0):
    """torch's module with its K and V heads written out for each query head, and ours with HKV of them."""
    torch.manual_seed(seed)
    ours = GroupedQueryAttention(E, HQ, hkv, bias=True, batch_first=batch_first, dropout=dropout).double().eval()
    for p in ours.parameters():
        nn.init.normal_(p, 0, 0.5)
    torchs = nn.MultiheadAttention(E, HQ, batch_first=batch_first, dropout=dropout).double().eval()

    def written_out(rows):
        return rows.unflatten(0, (hkv, D)).repeat_interleave(HQ // hkv, 0).flatten(0, 1)

    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        for name, target in (("weight", torchs.in_proj_weight), ("bias", torchs.in_proj_bias)):
            q, k, v = (getattr(p, name) for p in projections)
            target.copy_(torch.cat([q, written_out(k), written_out(v)]))
        torchs.out_proj.weight.copy_(ours.o_proj.weight)
        torchs.out_proj.bias.copy_(ours.o_proj.bias)
    return torchs, ours


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@settings(max_examples=150, deadline=None)
@given(
    hkv=st.sampled_from([4, 2, 1]), B=st.integers(1, 5), Sq=st.integers(1, 5), Sk=st.integers(1, 5),
    attn=st.sampled_from([None, "bool", "float"]), per_head=st.booleans(), pad=st.sampled_from([None, "bool", "float"]),
    weights=st.sampled_from([None, True, False]), average=st.booleans(), shape=st.sampled_from(["BSE", "SBE", "SE"]),
    kind=st.sampled_from(["self", "cross", "own values"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_is_torchs_module(hkv, B, Sq, Sk, attn, per_head, pad, weights, average, shape, kind, seed):
    """B, Sq and Sk meet by chance: what a mask means must not depend on it."""
    torchs, ours = pair(hkv, batch_first=shape != "SBE")
    g = torch.Generator().manual_seed(seed)
    B, Sk = 1 if shape == "SE" else B, Sq if kind == "self" else Sk
    lead = {"BSE": (B,), "SE": ()}.get(shape)

    def states(S):
        size = (S, B, E) if lead is None else (*lead, S, E)
        return torch.randn(size, dtype=torch.float64, generator=g)

    x = states(Sq)
    k = x if kind == "self" else states(Sk)
    v = states(Sk) if kind == "own values" else k

    def mask(form, size):
        hidden = torch.rand(size, generator=g) < 0.4
        hidden[..., 0] = False  # torch has NaN where a query sees nothing
        if form == "bool":
            return hidden
        scores = torch.randn(size, dtype=torch.float64, generator=g)
        return scores.masked_fill(hidden, -math.inf)

    masks = {}
    if attn is not None:
        masks["attn_mask"] = mask(attn, (B * HQ, Sq, Sk) if per_head else (Sq, Sk))
    if pad is not None:
        masks["key_padding_mask"] = mask(pad, (Sk,) if shape == "SE" else (B, Sk))
    options = {"average_attn_weights": average} | ({} if weights is None else {"need_weights": weights})
    if attn and pad and attn != pad:  # which torch deprecates
        with pytest.warns(UserWarning, match="mismatched"):
            want = torchs(x, k, v, **masks, **options)
    else:
        want = torchs(x, k, v, **masks, **options)
    out, found = ours(x, k, v, **masks, **options)
    close(out, want[0])
    assert (found is None) == (want[1] is None) == (weights is False)
    if found is not None:
        close(found, want[1])
    by_name = ours(query=x, key=k, value=v, need_weights=False, **masks)
    close(by_name[0], out)
    if kind == "self":
        close(ours(x, **masks), out)  # as a layer of transformers is called: the output alone


@pytest.mark.parametrize("hkv", [4, 2, 1])
def test_gradients_are_torchs(hkv):
    torchs, ours = pair(hkv)
    x = torch.randn(3, 5, E, dtype=torch.float64)
    masks = {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.zeros(3, 5, dtype=torch.bool),
    }
    masks["key_padding_mask"][1, 3:] = True
    found = []
    for module in (torchs, ours):
        leaf = x.clone().requires_grad_()
        out, weights = module(leaf, leaf, leaf, **masks)
        found.append(torch.autograd.grad(out.square().sum() + weights.square().sum(), leaf)[0])
    close(*found)


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


def test_is_causal():
    torchs, ours = pair(2)
    x = torch.randn(2, 4, E, dtype=torch.float64)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    want = torchs(x, x, x, attn_mask=later, need_weights=False)[0]
    close(ours(x, x, x, is_causal=True)[0], want)
    close(ours(x, is_causal=True), want)
    close(ours(x, x, x, attn_mask=later, is_causal=True)[0], want)
    close(ours(x, x.clone(), x.clone(), is_causal=True, need_weights=False)[0], want)
    other = torch.rand(4, 4) < 0.5
    other[:, 0] = False
    close(ours(x, attn_mask=other, is_causal=True), ours(x, attn_mask=other))  # the mask that is given is the mask
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    both = torchs(x, x, x, attn_mask=later, key_padding_mask=padding, need_weights=False)[0]
    close(ours(x, key_padding_mask=padding, is_causal=True), both)
    close(ours(x, attention_mask=(~padding).long(), is_causal=True), both)
    with pytest.raises(ValueError, match="is_causal between 4 queries and 3 other keys"):
        ours(x, x[:, :3], is_causal=True)
    documents = torch.tensor([0, 3, 4], dtype=torch.int32)
    close(ours(x[:1], cu_seqlens=documents, is_causal=True)[:, :3], ours(x[:1, :3], is_causal=True))


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


@pytest.mark.parametrize("hkv", [4, 2])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_inside_torchs_transformer(hkv, norm_first, batch_first, train):
    options: dict[str, Any] = {
        "dropout": 0.0,
        "batch_first": batch_first,
        "norm_first": norm_first,
        "dtype": torch.float64,
    }
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HQ, 32, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HQ, 32, **options), 2)
    ours = copy.deepcopy(encoder), copy.deepcopy(decoder)
    stack: Any
    changed: Any
    for stack, changed in zip((encoder, decoder), ours, strict=True):
        for layer, other in zip(stack.layers, changed.layers, strict=True):
            for name in ("self_attn", "multihead_attn"):
                if hasattr(layer, name):
                    torchs, grouped = pair(hkv, batch_first)
                    setattr(layer, name, torchs)
                    setattr(other, name, grouped)
    generator = torch.Generator().manual_seed(1)
    source, target = (
        torch.randn((3, S, E) if batch_first else (S, 3, E), dtype=torch.float64, generator=generator) for S in (5, 4)
    )
    later = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    results = []
    for enc, dec in ((encoder, decoder), ours):
        enc.train(train), dec.train(train)
        memory = enc(source, src_key_padding_mask=padding)
        results.append(dec(target, memory, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=padding))
    close(*results)


def test_torchs_nested_tensors_are_refused_by_name():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HQ, 32, batch_first=True), 1).eval()
    encoder.layers[0].self_attn = GroupedQueryAttention.from_mha(encoder.layers[0].self_attn, 2)
    x, padding = torch.randn(2, 3, E), torch.tensor([[False] * 3, [False, True, True]])
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="enable_nested_tensor=False"):
            encoder(x, src_key_padding_mask=padding)
        assert encoder(x).shape == x.shape
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
        built = nn.TransformerEncoder(encoder.layers[0], 1).eval()  # knows from the layer that it must not
    with torch.no_grad():
        assert built(x, src_key_padding_mask=padding).shape == x.shape


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


def test_compiles_with_torchs_masks():
    _, ours = pair(2)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    masks = {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool),
    }
    compiled = torch.compile(lambda x: ours(x, x, x, **masks)[0], fullgraph=True, backend="eager")
    close(compiled(x), ours(x, x, x, **masks)[0])
