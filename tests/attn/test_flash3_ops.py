"""FlashAttention-3's bare operators: arguments and gradients reach the right places.

The operators here have the schemas of xformers 0.0.34's build, and compute by plain arithmetic on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_patch.attn.backends._flash3_ops import Functions, load

sdpa = torch.nn.functional.scaled_dot_product_attention

FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
    "Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor)"
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, valid: range | None = None
) -> Tensor:
    """One row by the formula: q [Sq, HQ, D], k and v [Sk, HKV, D]."""
    keys = valid if valid is not None else range(len(k))
    k, v = (t[keys.start : keys.stop].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    for i in range(len(q)):
        last = len(k) - len(q) + i
        for j in range(len(k)):
            if (causal and j > last) or (left >= 0 and j < last - left):
                scores[:, i, j] = -torch.inf
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def rows(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
    options = (o["softmax_scale"], o.get("is_causal", False), o.get("window_size_left", -1))
    if o.get("cu_seqlens_q") is None:
        used, pad = o.get("seqused_k"), o.get("leftpad_k")
        out = []
        for b in range(len(q)):
            first, end = 0 if pad is None else int(pad[b]), k.shape[1] if used is None else int(used[b])
            out.append(attend(q[b], k[b, first:end], v[b, first:end], *options))
        return torch.stack(out)
    borders = list(zip(*(o[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k")), strict=True))
    assert o["max_seqlen_q"] == max(b[0] - a[0] for a, b in itertools.pairwise(borders))
    parts = itertools.pairwise(borders)
    return torch.cat([attend(q[a:c], k[b:d], v[b:d], *options) for (a, b), (c, d) in parts])


@pytest.fixture(scope="module")
def functions() -> Iterator[Functions]:
    library = torch.library.Library("flash_attn_3_of_a_test", "DEF")
    library.define(FWD)
    library.define(BWD)
    names = [a.split("=")[0].split()[-1] for a in FWD[4 : FWD.index(") ->")].split(", ")]

    def fwd(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        o = dict(zip(names, args, strict=False)) | kwargs
        out = rows(o.pop("q"), o.pop("k"), o.pop("v"), o)
        return out, torch.zeros(1), torch.zeros(1), torch.zeros(1)

    given = [a.split("=")[0].split()[-1] for a in BWD[4 : BWD.index(") ->")].split(", ")]

    def bwd(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        o = dict(zip(given, args, strict=False)) | kwargs
        with torch.enable_grad():
            q, k, v = (o.pop(n).detach().clone().requires_grad_() for n in ("q", "k", "v"))
            grads = torch.autograd.grad(rows(q, k, v, o), (q, k, v), o["dout"])
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            o[name].copy_(grad)
        return torch.zeros(1), torch.zeros(1)

    library.impl("fwd", fwd, "CompositeExplicitAutograd")
    library.impl("bwd", bwd, "CompositeExplicitAutograd")
    yield Functions(torch.ops.flash_attn_3_of_a_test)
    library._destroy()


def make(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (2, 0))])
def test_forward_and_gradients(functions: Functions, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = make((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    out = functions.flash_attn_func(q, k, v, causal=causal, window_size=window)
    wide_k, wide_v = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    i, j = torch.arange(5)[:, None] + 2, torch.arange(7)[None, :]
    mask = (j <= i) & ((window[0] < 0) | (j >= i - window[0])) if causal else torch.ones(5, 7, dtype=torch.bool)
    expected = sdpa(q.transpose(1, 2), wide_k, wide_v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)


def test_documents(functions: Functions) -> None:
    q, k, v = make((9, 4, 8), (9, 2, 8), (9, 2, 8))
    borders = torch.tensor([0, 3, 9], dtype=torch.int32)
    out = functions.flash_attn_varlen_func(q, k, v, borders, borders, 6, 6, causal=True, softmax_scale=0.5)
    for a, b in ((0, 3), (3, 9)):
        wide_k, wide_v = (t[a:b].repeat_interleave(2, 1).transpose(0, 1) for t in (k, v))
        one = sdpa(q[a:b].transpose(0, 1), wide_k, wide_v, is_causal=True, scale=0.5)
        torch.testing.assert_close(out[a:b], one.transpose(0, 1))
    (grad,) = torch.autograd.grad(out[:3].sum(), k)
    assert grad[:3].abs().sum() > 0
    assert not grad[3:].any()


def test_padded_cache(functions: Functions) -> None:
    q, k, v = make((2, 1, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    first, end = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([5, 7], dtype=torch.int32)
    out = functions.flash_attn_with_kvcache(q, k, v, end, cache_leftpad=first, causal=True)
    valid = (torch.arange(7) >= first[:, None]) & (torch.arange(7) < end[:, None])
    wide_k, wide_v = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    expected = sdpa(q.transpose(1, 2), wide_k, wide_v, attn_mask=valid[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_softcap_is_refused(functions: Functions) -> None:
    q, k, v = make((1, 2, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8))
    with pytest.raises(ValueError, match="no softcap"):
        functions.flash_attn_func(q, k, v, softcap=5.0)


def test_nothing_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load() is None


def test_a_library_for_another_cuda(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xformers" / "flash_attn_3").mkdir(parents=True)
    (tmp_path / "xformers" / "__init__.py").write_text("raise AssertionError('it need not be imported')\n")
    (tmp_path / "xformers" / "flash_attn_3" / "_C.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load() is None
