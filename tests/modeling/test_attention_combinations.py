"""GroupedQueryAttention with everything at once, against one einsum in fp64 that shares no code with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.models.t5.modeling_t5 import T5Attention

from hf_attn_patch import GrowingCache
from hf_attn_patch.modeling import Alibi, GroupedQueryAttention, RelativeBias, Rope

E, HQ, D = 24, 4, 6
POSITIONS = {
    "none": lambda causal: None,
    "half": lambda causal: Rope(D, theta=50.0),
    "interleaved": lambda causal: Rope(D, theta=50.0, layout="interleaved"),
    "partial": lambda causal: Rope(4, theta=50.0),
    "partial interleaved": lambda causal: Rope(2, theta=50.0, layout="interleaved"),
    "alibi": lambda causal: Alibi(HQ, causal),
    "relative": lambda causal: RelativeBias(HQ, 8, 12, bidirectional=not causal),
}
OPTIONS = {
    "hkv": st.sampled_from([1, 2, 4]),
    "position": st.sampled_from(list(POSITIONS)),
    "causal": st.booleans(),
    "window": st.sampled_from([None, 1, 3, 5]),
    "sinks": st.booleans(),
    "softcap": st.sampled_from([None, 1.5]),
    "norm": st.sampled_from([None, "rms"]),
    "bias": st.booleans(),
    "scale": st.sampled_from([None, 1.0]),
}


def build(*, hkv, position, causal, window, sinks, softcap, norm, bias, scale, **more):
    torch.manual_seed(0)
    m = GroupedQueryAttention(
        E, HQ, hkv, position=POSITIONS[position](causal or window is not None), causal=causal, window=window,
        sinks=sinks, softcap=softcap, qk_norm=norm, bias=bias, scale=scale, **more,
    )  # fmt: skip
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.6)
    return m.double().eval()


def turn(x, positions, rope):
    """RoPE on x [B, S, H, D] as multiplication of complex numbers."""
    n = rope.rotary_dim
    pairs = [(j, j + n // 2) if rope.layout == "half" else (2 * j, 2 * j + 1) for j in range(n // 2)]
    out = x.clone()
    for j, (a, b) in enumerate(pairs):
        angle = positions.double() * rope.theta ** (-2 * j / n)
        z = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)[..., None]
        out[..., a], out[..., b] = z.real, z.imag
    return out


def truth(m, x, options, allowed, added=None, positions=None, source=None):
    """The module's answer [B, Sq, E] for x [B, Sq, E], and where a query sees a key. ``allowed`` [B, Sq, Sk]."""
    cross = source is not None
    source = x if source is None else source
    Sq, Sk = x.shape[1], source.shape[1]

    def heads(projection, t):
        t = torch.einsum("bse,fe->bsf", t, projection.weight)
        return (t if projection.bias is None else t + projection.bias).unflatten(-1, (-1, D))

    def normed(t, norm):
        return t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight if options["norm"] else t

    q, k = normed(heads(m.q_proj, x), m.q_norm), normed(heads(m.k_proj, source), m.k_norm)
    v = heads(m.v_proj, source)
    i, j = torch.arange(Sq)[:, None], torch.arange(Sk)[None, :]
    if not cross and isinstance(m.position, Rope):
        positions = torch.arange(Sq)[None] if positions is None else positions
        q, k = (turn(t, positions.expand(x.shape[0], -1), m.position) for t in (q, k))
    k, v = (t[:, :, torch.arange(HQ) * options["hkv"] // HQ] for t in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (options["scale"] or D**-0.5)
    if options["softcap"]:
        s = torch.tanh(s / options["softcap"]) * options["softcap"]
    if not cross and isinstance(m.position, Alibi):
        s = s - torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HQ)], dtype=s.dtype)[:, None, None] * (i - j).abs()
    if not cross and isinstance(m.position, RelativeBias):
        bucket = T5Attention._relative_position_bucket(j - i, m.position.bidirectional, 8, 12)
        s = s + m.position.weight[bucket].permute(2, 0, 1)
    if added is not None:
        s = s + added
    if not cross:
        if options["causal"] or options["window"]:
            allowed = allowed & (j <= i)
        if options["window"]:
            allowed = allowed & (j > i - options["window"])
    s = s.masked_fill(~allowed[:, None], -math.inf)
    if options["sinks"]:
        s = torch.cat([s, m.sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    w = torch.softmax(s, -1)[..., :Sk].nan_to_num()
    out = torch.einsum("bhij,bjhd->bihd", w, v).flatten(2)
    out = torch.einsum("bsf,ef->bse", out, m.o_proj.weight)
    return (out if m.o_proj.bias is None else out + m.o_proj.bias), allowed.any(-1)


def data(S, B=2, seed=1, width=E):
    return torch.randn(B, S, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padding(S, pad, side):
    """[2, S]: the second row has ``pad`` padded places, but at least one real one."""
    mask = torch.ones(2, S, dtype=torch.long)
    pad = min(pad, S - 1)
    mask[1, slice(0, pad) if side == "left" else slice(S - pad, S)] = 0
    return mask


def close(got, want, sees):
    torch.testing.assert_close(got[sees], want[sees], atol=3e-5, rtol=3e-5)  # RoPE's angles are fp32


@settings(max_examples=60, deadline=None)
@given(
    S=st.integers(1, 8), pad=st.integers(0, 4), side=st.sampled_from(["left", "right"]),
    form=st.sampled_from(["2d", "bool", "float"]), **OPTIONS,
)  # fmt: skip
def test_whole_forward_and_gradients(S, pad, side, form, **options):
    m, x = build(**options), data(S).requires_grad_()
    mask = padding(S, pad, side)
    allowed, added, given_mask = mask.bool()[:, None, :].expand(2, S, S), None, mask
    if form == "bool":
        given_mask = allowed[:, None]
    elif form == "float":
        added = torch.randn(2, HQ, S, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        given_mask = added.masked_fill(~allowed[:, None], -math.inf)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if options["position"] in ("half", "partial") else None
    got = m(x, attention_mask=given_mask, position_ids=positions)
    want, sees = truth(m, x, options, allowed, added, positions)
    close(got, want, sees)
    parameters = [x, *m.parameters()]
    aim = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(5)) * sees[..., None]
    found = torch.autograd.grad((got * aim).sum(), parameters, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad((want * aim).sum(), parameters, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None) or (a if b is None else b).abs().max() == 0
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=3e-4, rtol=3e-4)


class Int16Layer(QuantizedLayer):
    """Symmetric 16-bit quantisation in plain torch, so that a quantised cache needs no package."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 32767
        return (tensor / scale).round().to(torch.int16), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def make_cache(kind, window, hkv):
    config = LlamaConfig(
        hidden_size=E, num_attention_heads=HQ, num_key_value_heads=hkv, head_dim=D, num_hidden_layers=1
    )
    if window and "sliding" in kind:
        config.sliding_window, config.layer_types = window, ["sliding_attention"]
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "growing": lambda: GrowingCache(config=config),
        "growing sliding": lambda: GrowingCache(config=config),
        "sliding": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config, max_cache_len=13),
        "static sliding": lambda: StaticCache(config, max_cache_len=13),
        "quantized": lambda: Cache(layers=[Int16Layer(nbits=16, residual_length=3)]),
        "encoder-decoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "encoder-decoder static": lambda: EncoderDecoderCache(StaticCache(config, max_cache_len=13), DynamicCache()),
    }[kind]()


CACHES = [
    "dynamic", "growing", "growing sliding", "sliding", "static", "static sliding", "quantized", "encoder-decoder",
    "encoder-decoder static",
]  # fmt: skip


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda c: sum(c) <= 12),
    pad=st.integers(0, 4), form=st.sampled_from(["none", "2d", "bool"]), **OPTIONS,
)  # fmt: skip
def test_steps_on_every_cache(kind, chunks, pad, form, **options):
    options["causal"] = True  # what was cached cannot see what came later
    if "sliding" in kind:
        # not 1: transformers' own sliding cache then keeps all keys (keys[-0:]) and says it keeps none
        options["window"] = max(2, options["window"] or 4)
    S = sum(chunks)
    m, x = build(**options), data(S)
    mask = torch.ones(2, S, dtype=torch.long) if form == "none" else padding(S, pad, "left")
    want, sees = truth(m, x, options, mask.bool()[:, None, :].expand(2, S, S))
    past, steps, at = make_cache(kind, options["window"], options["hkv"]), [], 0
    with torch.no_grad():
        for n in chunks:
            end = at + n
            given_mask = {
                "none": None, "2d": mask[:, :end], "bool": mask[:, :end].bool()[:, None, None, :].expand(2, 1, n, end),
            }[form]  # fmt: skip
            if (
                form == "bool" and "static" in kind
            ):  # as transformers makes them for a static cache: over all its places
                assert given_mask is not None
                given_mask = torch.nn.functional.pad(given_mask, (0, 13 - end))
            steps.append(m(x[:, at:end], attention_mask=given_mask, past_key_values=past))
            at = end
    got = torch.cat(steps, 1)
    torch.testing.assert_close(got[sees], want[sees], atol=2e-3 if kind == "quantized" else 3e-5, rtol=2e-3)
    own = past.self_attention_cache if "encoder" in kind else past
    if kind != "quantized":
        assert own.layers[0].keys.shape[1] == options["hkv"]


def test_dropout_keeps_the_mean_and_drops_whole_weights():
    """Of one key (weight 1), a dropped weight leaves 0 and a kept one the value / 0.75; the mean stays."""
    options = {**dict.fromkeys(("window", "softcap", "norm", "scale")), "bias": False, "hkv": 2, "position": "none"}
    m = build(**options, causal=False, sinks=False, dropout=0.25)
    x = data(1, B=1).expand(4000, 1, E)
    torch.manual_seed(1)
    with torch.no_grad():
        m.o_proj.weight.copy_(torch.eye(E))
        whole, dropped = m(x)[:1, 0].unflatten(-1, (HQ, D)), m.train()(x)[:, 0].unflatten(-1, (HQ, D))
    share = dropped / whole  # [4000, HQ, D], one number for all of a head
    torch.testing.assert_close(share, share[..., :1].expand_as(share))
    kept = (share[..., 0] - 1 / 0.75).abs() < 1e-9
    assert torch.equal(kept, share[..., 0] != 0)
    assert (kept.double().mean(0) - 0.75).abs().max() < 0.03  # four standard deviations


def test_alibi_beside_a_sink_and_in_half_precision():
    """A sink sees what one row of biases for all queries leaves out; in bf16 that row has no near distances."""
    names = ("window", "softcap", "norm", "bias", "scale")
    options = {**dict.fromkeys(names), "bias": False, "hkv": 2, "position": "alibi", "causal": True, "sinks": True}
    m, x = build(**options), data(600)
    close(m(x), *truth(m, x, options, torch.ones(2, 600, 600, dtype=torch.bool)))
    m, x = build(**{**options, "sinks": False}), x * 0.1
    want, _ = truth(m, x, {**options, "sinks": False}, torch.ones(2, 600, 600, dtype=torch.bool))
    error = (m.bfloat16()(x.bfloat16()).double() - want).norm() / want.norm()
    assert error < 0.01  # 0.13 with one row of biases for all queries


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), **OPTIONS)
def test_packed_documents(lengths, **options):
    S = sum(lengths)
    m, x = build(**options), data(S, B=1)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    within = torch.cat([torch.arange(n) for n in lengths])[None]
    want, sees = truth(m, x, options, (document[:, None] == document[None, :])[None], positions=within)
    close(m(x, cu_seqlens=borders), want, sees)


@settings(max_examples=40, deadline=None)
@given(Sq=st.integers(1, 5), Sk=st.integers(1, 6), pad=st.integers(0, 4), split=st.integers(0, 4), **OPTIONS)
def test_cross_attention(Sq, Sk, pad, split, **options):
    m, x, source = build(**options, kv_dim=10), data(Sq), data(Sk, seed=2, width=10)
    mask = padding(Sk, pad, "right")
    want, sees = truth(m, x, options, mask.bool()[:, None, :].expand(2, Sq, Sk), source=source)
    close(m(x, source, attention_mask=mask), want, sees)
    past, split = EncoderDecoderCache(DynamicCache(), DynamicCache()), min(split, Sq)
    parts = [m(part, source, attention_mask=mask, past_key_values=past) for part in (x[:, :split], x[:, split:])
             if part.shape[1]]  # fmt: skip
    close(torch.cat(parts, 1), want, sees)
