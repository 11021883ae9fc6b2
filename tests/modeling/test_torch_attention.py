"""GroupedQueryAttention in the place of torch.nn.MultiheadAttention: the same numbers, inside its layers too."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_attention import HQ, E, close, pair

from hf_attn_patch.modeling import GroupedQueryAttention


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
    close(found[0], found[1])


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


def test_compiles_with_torchs_masks():
    _, ours = pair(2)
    x = torch.randn(2, 5, E, dtype=torch.float64)
    masks = {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool),
    }
    compiled = torch.compile(lambda x: ours(x, x, x, **masks)[0], fullgraph=True, backend="eager")
    close(compiled(x), ours(x, x, x, **masks)[0])
