"""GroupedQueryAttention against attention written out in fp64, and against modules of torch and transformers."""

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache, T5Config
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rope
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from hf_attn_patch import GroupingError
from hf_attn_patch.modeling import Alibi, GroupedQueryAttention, RelativeBias, Rope, attention, positions

E, HQ, D = 32, 4, 8


def module(hkv, seed=0, **kwargs):
    torch.manual_seed(seed)
    m = GroupedQueryAttention(E, HQ, hkv, **kwargs)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.5)
    return m.double().eval()


def by_hand(m, x, source=None, allowed=None, bias=None):
    """One query head at a time, one row at a time."""
    source = x if source is None else source
    out = torch.zeros(x.shape[0], x.shape[1], HQ * D, dtype=x.dtype)
    hkv = m.groups.num_kv_heads
    for b in range(x.shape[0]):
        q, k, v = (
            p(t).view(t.shape[0], -1, D) for p, t in ((m.q_proj, x[b]), (m.k_proj, source[b]), (m.v_proj, source[b]))
        )
        q, k = m.q_norm(q), m.k_norm(k)
        for h in range(HQ):
            g = h * hkv // HQ
            for i in range(x.shape[1]):
                s = k[:, g] @ q[i, h] * (m.scale or D**-0.5)
                if m.softcap:
                    s = m.softcap * torch.tanh(s / m.softcap)
                if bias is not None:
                    s = s + bias[h, i]
                if allowed is not None:
                    s = s.masked_fill(~allowed[b, i], -math.inf)
                extra = [] if m.sinks is None else [m.sinks[h : h + 1]]
                w = torch.softmax(torch.cat([s, *extra]), 0)[: len(s)]
                out[b, i, h * D : (h + 1) * D] = w @ v[:, g]
    return m.o_proj(out)


def data(B=2, S=6, seed=1, width=E):
    return torch.randn(B, S, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lower(S):
    return torch.ones(S, S, dtype=torch.bool).tril()


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def test_docstrings():
    for file in (attention, positions):
        assert doctest.testmod(file).failed == 0


@settings(max_examples=12, deadline=None)
@given(
    hkv=st.sampled_from([1, 2, 4]),
    S=st.integers(1, 7),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    norm=st.sampled_from([None, "rms"]),
    pad=st.integers(0, 3),
    bias=st.booleans(),
)
def test_against_arithmetic_by_hand(hkv, S, causal, window, softcap, sinks, norm, pad, bias):
    causal = causal or window is not None
    m = module(hkv, causal=causal, window=window, softcap=softcap, sinks=sinks, qk_norm=norm, bias=bias)
    x = data(S=S)
    mask = torch.ones(2, S, dtype=torch.long)
    mask[1, : min(pad, S - 1)] = 0
    allowed = mask.bool()[:, None, :].expand(2, S, S)
    if causal:
        allowed = allowed & lower(S)
    if window:
        allowed = allowed & ~torch.ones(S, S, dtype=torch.bool).tril(-window)
    sees = allowed.any(-1)
    got, want = m(x, attention_mask=mask), by_hand(m, x, allowed=allowed)
    close(got[sees], want[sees])


def test_rope_is_that_of_llama_and_gptj():
    x, ids = torch.randn(2, HQ, 5, D), torch.tensor([[3, 4, 5, 6, 9], [0, 1, 2, 3, 4]])
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=E, num_attention_heads=HQ))(x, ids)
    close(Rope(D).rotate(x, ids), apply_rotary_pos_emb(x, x, cos, sin)[0], 1e-5)
    sin, cos = create_sinusoidal_positions(16, 4)[ids].chunk(2, -1)
    turned = gptj_rope(x.transpose(1, 2)[..., :4], sin, cos).transpose(1, 2)
    close(Rope(4, layout="interleaved").rotate(x, ids), torch.cat([turned, x[..., 4:]], -1), 1e-5)


def test_relative_bias_is_t5s():
    config = T5Config(
        d_model=E, d_kv=D, num_heads=HQ, relative_attention_num_buckets=8, relative_attention_max_distance=20
    )
    for decoder in (False, True):
        config.is_decoder = decoder
        t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
        ours = RelativeBias(HQ, 8, 20, bidirectional=not decoder)
        ours.weight = t5.relative_attention_bias.weight
        close(ours.bias(torch.arange(30), torch.arange(30)), t5.compute_bias(30, 30), 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_by_hand(causal):
    m = module(2, causal=causal, position=Alibi(HQ, causal))
    i = torch.arange(6)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    bias = -slopes[:, None, None] * (i[:, None] - i).abs()
    x = data()
    close(m(x), by_hand(m, x, allowed=lower(6).expand(2, 6, 6) if causal else None, bias=bias), 1e-6)


POSITIONS = {
    "none": lambda: None,
    "rope": lambda: Rope(D),
    "partial": lambda: Rope(4, layout="interleaved"),
    "alibi": lambda: Alibi(HQ),
    "relative": lambda: RelativeBias(HQ, 8, 20, bidirectional=False),
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding", "encoder-decoder"])
def test_cached_steps_are_the_whole_forward(position, cache):
    window = 4 if cache == "sliding" else None
    m = module(2, causal=True, position=POSITIONS[position](), window=window)
    config = LlamaConfig(hidden_size=E, num_attention_heads=HQ, num_key_value_heads=2, num_hidden_layers=1)
    if window:
        config.sliding_window, config.layer_types = window, ["sliding_attention"]
    past = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config, max_cache_len=12),
        "sliding": lambda: DynamicCache(config=config),
        "encoder-decoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }[cache]()
    x = data(S=9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    whole = m(x, attention_mask=mask)
    steps, at = [], 0
    for n in (4, 1, 2, 1, 1):
        steps.append(m(x[:, at : at + n], attention_mask=mask[:, : at + n], past_key_values=past))
        at += n
    got = torch.cat(steps, 1)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, :2] = False
    close(got[seen], whole[seen], 1e-6)
    own = past.self_attention_cache if cache == "encoder-decoder" else past
    assert own.layers[0].keys.shape[1] == 2


def test_a_cache_goes_by_either_name():
    m, x = module(2, causal=True), data(S=5)
    whole = m(x)
    for name in ("cache", "past_key_values"):
        past = DynamicCache()
        close(torch.cat([m(part, **{name: past}) for part in x.split((3, 2), 1)], 1), whole, 1e-6)
    with pytest.raises(ValueError, match="cache and past_key_values are two names for one argument"):
        m(x, cache=past, past_key_values=past)


def test_cross_attention_makes_its_keys_once():
    m = module(1, kv_dim=20)
    x, source = data(S=3), data(S=5, seed=2, width=20)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    want = by_hand(m, x, source, allowed=mask.bool()[:, None, :].expand(2, 3, 5))
    close(m(x, source, attention_mask=mask), want)
    past = EncoderDecoderCache(DynamicCache(), DynamicCache())
    close(m(x[:, :1], source, attention_mask=mask, past_key_values=past), want[:, :1])
    close(m(x[:, 1:], source * float("nan"), attention_mask=mask, past_key_values=past), want[:, 1:])


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_are_those_documents_alone(position):
    m = module(2, causal=True, position=POSITIONS[position]())
    x, borders = data(B=1, S=9), [0, 2, 3, 9]
    got = m(x, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    for a, b in itertools.pairwise(borders):
        close(got[:, a:b], m(x[:, a:b]), 1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kdim", [None, 20])
def test_from_mha(kv_heads, kdim):
    mha = nn.MultiheadAttention(E, HQ, batch_first=True, kdim=kdim, vdim=kdim).double().eval()
    nn.init.normal_(mha.in_proj_bias)
    gqa = GroupedQueryAttention.from_mha(mha, kv_heads)
    with torch.no_grad():  # pool the heads where they are
        for i, name in ((1, "k_proj_weight"), (2, "v_proj_weight")):
            weight = mha.in_proj_weight.chunk(3)[i] if kdim is None else getattr(mha, name)
            for rows in (weight, mha.in_proj_bias.chunk(3)[i]):
                heads = rows.reshape(kv_heads, HQ // kv_heads, D, -1)
                rows.copy_(heads.mean(1, keepdim=True).expand_as(heads).reshape_as(rows))
    x, source = data(), data(seed=2, width=kdim or E)
    close(gqa(x, source), mha(x, source, source, need_weights=False)[0], 1e-6)


@pytest.mark.parametrize("told", [None, True, False])
@pytest.mark.parametrize("batch_first", [False, True])
def test_from_mha_keeps_the_order_of_the_dimensions(batch_first, told):
    """Of a square batch [4, 4, E] nothing else could tell which is which."""
    mha = nn.MultiheadAttention(E, HQ, batch_first=batch_first).double().eval()
    gqa = GroupedQueryAttention.from_mha(mha, **({} if told is None else {"batch_first": told}))
    x = torch.randn(4, 4, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flip = told is not None and told != batch_first
    want = mha(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1) if flip else mha(x, x, x)[0]
    close(gqa(x), want, 1e-6)


def test_gradients_reach_everything():
    m = module(2, causal=True, position=RelativeBias(HQ, 8, 20, bidirectional=False), sinks=True, qk_norm="rms").train()
    m(data()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


def test_dropout_only_in_training():
    m = module(2, dropout=0.5)
    x = data()
    close(m(x), m(x))
    m.train()
    assert not torch.equal(m(x), m(x))


def test_bad_input_is_refused():
    with pytest.raises(GroupingError):
        GroupedQueryAttention(E, 4, 3)
    with pytest.raises(ValueError, match="head_dim"):
        GroupedQueryAttention(30, 4)
    with pytest.raises(ValueError, match="even"):
        Rope(3)
    with pytest.raises(ValueError, match="packed"):
        module(2)(data(), cu_seqlens=torch.tensor([0, 6]))
    m, cache = module(2, causal=True), DynamicCache()
    m(data(S=4), past_key_values=cache)
    with pytest.raises(ValueError, match="covers 2 keys, but with the cached ones there are 6"):
        m(data(S=2), attention_mask=torch.ones(2, 2), past_key_values=cache)
    with pytest.raises(ValueError, match="add_bias_kv"):
        GroupedQueryAttention.from_mha(nn.MultiheadAttention(E, 4, add_bias_kv=True))
    with pytest.raises(ValueError, match="EncoderDecoderCache"):
        module(2)(data(), data(), past_key_values=DynamicCache())


def test_compiles_as_one_graph():
    m = module(2, causal=True, position=Rope(D))
    x = data()
    close(torch.compile(m, fullgraph=True, backend="eager")(x), m(x))
