"""Who computes the rows of ``kernels.py``: ours, and every peer that can be had.

A contender is a function of :class:`Inputs` that gives ``call(i) -> out [B, HQ, Sq, D]`` for input set i, or raises
:class:`UnsupportedError` with its reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_attn_patch
from benchmarks.kernel_rows import Inputs
from benchmarks.measure import DEVICE
from hf_attn_patch.attn.backends import flash3 as flash3_backend
from hf_attn_patch.attn.codes import KINDS, as_codes
from hf_attn_patch.attn.devices import interpreted
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.visibility import Padded

Tensor = torch.Tensor
Call = Callable[[int], Tensor]


class UnsupportedError(Exception):
    """Why a contender has nothing for a row."""


def ours(x: Inputs) -> Call:
    row = x.row
    options: dict[str, Any] = {"softcap": row.softcap, "sinks": x.sinks, "bias": x.bias}
    if (row.page or row.codes) and DEVICE != "cuda" and not interpreted():
        raise UnsupportedError("needs a CUDA device")
    if row.codes:
        return _over_codes(x)
    if row.page:
        from hf_attn_patch.attn.kernels.decode import grouped_decode_paged

        return lambda i: grouped_decode_paged(x.q, *x.pages[i], x.table, x.end, scale=row.D**-0.5)  # type: ignore
    if x.borders is not None:
        q, cu, n = _packed(x.q), x.borders, x.longest

        def varlen(i: int) -> Tensor:
            k, v = (_packed(t) for t in x.kv[i])
            out = hf_attn_patch.attention_varlen(q, k, v, cu, max_seqlen_q=n, max_seqlen_k=n, causal=True)
            return out.transpose(0, 1)[None]

        return varlen
    if row.pad:
        assert x.first is not None and x.end is not None
        seen = Padded(row.B, row.Sq, row.Sk, row.Sq > 1, first=x.first, length=x.end - x.first)
        return lambda i: attend(x.q, x.kv[i][0], x.kv[i][1], seen, **options)[0]
    return lambda i: hf_attn_patch.attention(x.q, *x.kv[i], causal=row.causal, window=row.window, **options)


def _over_codes(x: Inputs) -> Call:
    from hf_attn_patch.attn.kernels.decode import grouped_decode

    kind = KINDS[x.row.codes]

    def call(i: int) -> Tensor:
        (k, k_scale), (v, v_scale) = x.packed[i]
        scales = {"k_scale": k_scale.squeeze(-1), "v_scale": v_scale.squeeze(-1)}
        out = grouped_decode(x.q, as_codes(k, kind.keys), as_codes(v, kind.values), scale=x.row.D**-0.5, **scales)  # type: ignore
        assert isinstance(out, Tensor)
        return out

    return call


def unpacked(x: Inputs) -> Call:
    """Our kernel on the numbers that codes stand for, as a cache without codes has them."""
    if not x.row.codes:
        raise UnsupportedError("is for codes")
    return lambda i: hf_attn_patch.attention(x.q, *x.kv[i], causal=True)


def _packed(t: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D]."""
    return t[0].transpose(0, 1)


def torch_sdpa(backend: str, x: Inputs) -> Call:
    row = x.row
    if row.softcap or row.sinks:
        raise UnsupportedError("takes no softcap" if row.softcap else "takes no sinks")
    cut = row.window if row.Sq == 1 else None  # one query: a window is the last keys
    causal = row.causal and row.Sq > 1
    square = causal and row.Sq == row.Sk and row.window is None and not row.documents
    mask = x.mask if (causal and not square) or (row.pad and not row.page) or row.documents else x.bias
    if backend == "flash" and mask is not None:
        raise UnsupportedError("takes no mask")
    if backend == "cudnn" and row.bias and row.backward:
        raise UnsupportedError("gives no gradient to what is added")
    if backend == "efficient" and not row.bias:
        raise UnsupportedError("is for a bias")
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": square, "enable_gqa": row.HQ != row.HKV}
    contexts = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    context = contexts.get(backend)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if row.page:
        raise UnsupportedError("takes no pages")

    def call(i: int) -> Tensor:
        k, v = x.kv[i]
        if cut is not None:
            k, v = k[:, :, -cut:], v[:, :, -cut:]
        if context is None:
            return sdpa(x.q, k, v, **options)
        with sdpa_kernel(context):
            return sdpa(x.q, k, v, **options)

    return call


def gathered(x: Inputs) -> Call:
    """Pages copied together, then torch's sdpa with a mask: what is done where a kernel takes no pages."""
    if not x.row.page:
        raise UnsupportedError("is for pages")
    gqa = x.row.HQ != x.row.HKV

    def call(i: int) -> Tensor:
        k, v = (pages[x.table].flatten(1, 2).transpose(1, 2) for pages in x.pages[i])
        return torch.nn.functional.scaled_dot_product_attention(x.q, k, v, attn_mask=x.valid, enable_gqa=gqa)

    return call


def flash4(x: Inputs) -> Call:
    row = x.row
    if DEVICE != "cuda":
        raise UnsupportedError("needs a CUDA device")
    try:
        module: Any = importlib.import_module("flash_attn.cute")
    except ImportError as error:
        raise UnsupportedError("flash-attn-4 is not installed") from error
    if row.bias or row.page or row.pad:
        reason = "takes no bias" if row.bias else "takes no pages on Hopper" if row.page else "takes no padded cache"
        raise UnsupportedError(reason)
    options: dict[str, Any] = {"causal": row.causal and row.window is None, "softcap": row.softcap or 0.0}
    if row.window is not None:
        options["window_size"] = (row.window - 1, 0)
    if x.sinks is not None:
        options["learnable_sink"] = x.sinks
    if row.documents:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), x.borders)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), x.longest)
        varlen = module.flash_attn_varlen_func
        return lambda i: _out(varlen(*(_packed(t) for t in (x.q, *x.kv[i])), **options)).transpose(0, 1)[None]
    return lambda i: _out(module.flash_attn_func(*_bshd(x, i), **options)).transpose(1, 2)


def flash3(x: Inputs) -> Call:
    row = x.row
    if reason := flash3_backend.missing():
        raise UnsupportedError(reason)
    module = flash3_backend.module()
    if row.softcap and not getattr(module, "softcap", True):
        raise UnsupportedError("this build takes no softcap")
    if row.bias or row.sinks:
        raise UnsupportedError("takes no bias" if row.bias else "takes no sinks")
    window = (-1, -1) if row.window is None else (row.window - 1, 0)
    options: dict[str, Any] = {"causal": row.causal, "window_size": window, "softcap": row.softcap or 0.0}
    if row.documents:
        cu, n = x.borders, x.longest
        varlen = module.flash_attn_varlen_func
        return lambda i: _out(varlen(*(_packed(t) for t in (x.q, *x.kv[i])), cu, cu, n, n, **options)).transpose(0, 1)[
            None
        ]
    if not row.decode:
        return lambda i: _out(module.flash_attn_func(*_bshd(x, i), **options)).transpose(1, 2)
    kvcache = module.flash_attn_with_kvcache
    options |= {"cache_seqlens": x.end if row.pad else row.Sk, "num_splits": 0}
    if row.pad == "left":
        options["cache_leftpad"] = x.first
    q = x.q.transpose(1, 2)
    if row.page:
        options["page_table"] = x.table
        return lambda i: _out(kvcache(q, *x.pages[i], **options)).transpose(1, 2)
    return lambda i: _out(kvcache(q, *_bshd(x, i)[1:], **options)).transpose(1, 2)


def flex(x: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    row = x.row
    if row.sinks or row.page:
        raise UnsupportedError("takes no sinks" if row.sinks else "takes no pages")
    offset, window = row.Sk - row.Sq, row.window
    first, end, document = x.first, x.end, None
    if x.borders is not None:
        document = torch.searchsorted(x.borders, torch.arange(row.Sk, device=DEVICE), right=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        see = j <= i + offset if row.causal else j >= 0
        if window is not None:
            see = see & (j > i + offset - window)
        if first is not None and end is not None:
            see = see & (j >= first[b]) & (j < end[b])
        return see if document is None else see & (document[i] == document[j])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if row.softcap is not None:
            s = row.softcap * torch.tanh(s / row.softcap)
        return s if x.bias is None else s + x.bias[0, h, i, j]

    block = None
    if row.causal or window is not None or row.pad or row.documents:
        block = create_block_mask(visible, row.B if row.pad else None, None, row.Sq, row.Sk, device=DEVICE)
    changed = score if row.softcap is not None or x.bias is not None else None
    run = functools.partial(_flex(), score_mod=changed, block_mask=block, enable_gqa=row.HQ != row.HKV)
    return lambda i: run(x.q, *x.kv[i])


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _bshd(x: Inputs, i: int) -> list[Tensor]:
    return [t.transpose(1, 2) for t in (x.q, *x.kv[i])]


def _out(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def contenders(with_flex: bool) -> dict[str, Callable[[Inputs], Call]]:
    """Ours first."""
    out: dict[str, Callable[[Inputs], Call]] = {"ours": ours}
    if DEVICE == "cuda":
        out |= {name: functools.partial(torch_sdpa, name) for name in ("flash", "cudnn", "efficient")}
        out |= {"fa4": flash4, "fa3": flash3}
    else:
        out["sdpa"] = functools.partial(torch_sdpa, "any")
    out |= {"gather + sdpa": gathered, "ours, unpacked": unpacked}
    return out | ({"flex": flex} if with_flex else {})
