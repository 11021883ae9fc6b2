"""The attention function itself, for people who call it without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.torch import transforms
from hf_attn_patch.errors import AttentionError
from hf_attn_patch.grouping import KVGrouping

from . import memo
from .choice import asked_for
from .context_parallel import refuse_parts
from .dispatch import attend
from .plan import plain_calls, remember_plain
from .request import PlainKind, plain_kind
from .visibility import NO_WINDOW, Dense, Full, Packed, Sides, full, packed

Window = int | Sides | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Exact attention with shared KV heads, on the fastest kernel that can do the request.

    Args:
        q: [B, HQ, Sq, D]. k: [B, HKV, Sk, D]. v: [B, HKV, Sk, Dv], HQ a multiple of HKV. One floating dtype and device.
        mask: bool (True: may be seen) or float (added to the scores), broadcastable to [B, HQ, Sq, Sk]; or bool
            [B, Sk], the valid keys; where B == Sq > 1 that could also be [Sq, Sk], and is refused: give
            [B, 1, 1, Sk] or [1, 1, Sq, Sk].
        causal: query i sees keys up to ``i + Sk - Sq`` (aligned at the lower right, as FlashAttention does).
        window: an int w: the last w keys, itself included (implies ``causal``'s alignment); or (left, right) keys on
            each side, None for no bound.
        scale: of the scores; D ** -0.5 by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before mask and bias (Gemma 2).
        sinks: [HQ], logits that join each row's softmax and take no value (gpt-oss).
        bias: float, broadcastable to [B, HQ, Sq, Sk], added to the scores; it may need a gradient (T5, ALiBi).
        dropout: probability with which a weight is dropped. There is no training flag: pass 0 in evaluation.
        backend: one of :data:`hf_attn_patch.attn.backends.registry.BACKENDS`, to insist on it.

    Returns:
        [B, HQ, Sq, Dv] in q's dtype. Rows that see no key are zero. Values of keys that nobody sees never matter,
        NaN included.

    Raises:
        AttentionError: shapes or dtypes do not fit, or the backend asked for cannot run the request exactly.

    >>> q, k = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 9, 16)
    >>> attention(q, k, k, causal=True).shape
    torch.Size([2, 8, 5, 16])
    """
    refuse_parts("attention")
    kind: PlainKind | None = None
    sides, causal = _window(window, causal)
    if (
        mask is None
        and bias is None
        and type(q) is Tensor
        and not torch.compiler.is_compiling()
        and transforms() is None
    ):
        backend = asked_for() if backend is None else backend
        others = (k.device, v.device, None if sinks is None else sinks.shape)
        kind = plain_kind(q, k, v, causal, sides, scale, softcap, sinks, dropout, False, False, backend, others)
        known = plain_calls.get(kind)
        if known is not None:  # arguments of this kind were checked before
            (request, _, run), operands = known
            return run(q, k, v, request, operands if sinks is None else operands._replace(sinks=sinks))[0]
    memo.nobody_asks()
    visibility, bias = _seen(q, k, v, mask, causal, sides, sinks, bias, dropout)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout, "name": backend}
    out = attend(q, k, v, visibility=visibility, sinks=sinks, bias=bias, **options)[0]
    if kind is not None:
        remember_plain(kind, visibility)
    return out


def attention_and_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the weights [B, HQ, Sq, Sk] in q's dtype. No fast kernel has any."""
    refuse_parts("attention_and_weights")
    sides, causal = _window(window, causal)
    visibility, bias = _seen(q, k, v, mask, causal, sides, sinks, bias, dropout)
    numbers: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout, "name": backend}
    out, weights = attend(q, k, v, visibility=visibility, sinks=sinks, bias=bias, weights=True, **numbers)
    assert weights is not None
    return out, weights


def _seen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    sides: Sides,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> tuple[Full | Dense, Tensor | None]:
    """Check the arguments of :func:`attention`; who may see whom, and the bias with what a float mask adds."""
    _check(q, k, v, dropout, sinks)
    B, HQ, Sq, _ = q.shape
    Sk = k.shape[2]
    plain = full(Sq, Sk, causal, sides, B)
    visibility: Full | Dense = plain
    if mask is not None:
        if mask.dim() == 2 and mask.dtype == torch.bool and mask.shape == (B, Sk):
            if B == Sq > 1:
                raise AttentionError(
                    f"a bool mask {list(mask.shape)} for B = Sq = {B} can mean the valid keys of each sequence or one "
                    "mask [Sq, Sk] for all: say which with mask[:, None, None] or mask[None, None]"
                )
            mask = mask[:, None, None, :]
        _check_broadcast("mask", mask, (B, HQ, Sq, Sk))
        if mask.dtype == torch.bool:
            visibility = _masked(plain, mask, (B, HQ, Sq, Sk))
        elif mask.is_floating_point():
            bias = mask if bias is None else bias + mask
        else:
            raise AttentionError(f"a mask is bool or float, not {mask.dtype}")
    if bias is not None:
        _check_broadcast("bias", bias, (B, HQ, Sq, Sk))
        bias = bias if bias.dim() == 4 else bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    return visibility, bias


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention within packed documents: tokens of one never see another.

    Args:
        q: [T, HQ, D]. k: [Tk, HKV, D]. v: [Tk, HKV, Dv].
        cu_seqlens_q, cu_seqlens_k: integers [N + 1], 0 = first border, ascending, the last at most T (Tk). Keys
            default to the queries' borders.
        max_seqlen_q, max_seqlen_k: the longest document, as ints; read from the device if not given.

    The other arguments, the result [T, HQ, Dv] and the errors are those of :func:`attention`; ``causal`` is aligned at
    the end of each document. Borders that are none are an AttentionError too (on a GPU where the lengths are not given,
    since nothing is read there otherwise).

    >>> t = torch.randn(7, 4, 8)
    >>> attention_varlen(t, t, t, torch.tensor([0, 3, 7]), causal=True).shape
    torch.Size([7, 4, 8])
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise AttentionError(f"packed q, k and v are [T, H, D]; got {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    refuse_parts("attention_varlen")
    memo.nobody_asks()
    self_attention = cu_seqlens_k is None
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_k.shape or len(cu_k) == 0:
        raise AttentionError(
            f"cu_seqlens_q and cu_seqlens_k are integers [N + 1]; got {list(cu_seqlens_q.shape)} and {list(cu_k.shape)}"
        )
    if self_attention and q.shape[0] != k.shape[0]:
        raise AttentionError(f"{q.shape[0]} queries and {k.shape[0]} keys need their own cu_seqlens each")
    q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q, k, v))
    _check(q4, k4, v4, dropout, sinks)
    sides, causal = _window(window, causal)
    tokens = q.shape[0], k.shape[0]
    seen = _documents(cu_seqlens_q, cu_k, tokens, (max_seqlen_q, max_seqlen_k), causal, sides)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout, "name": backend}
    out, _ = attend(q4, k4, v4, visibility=seen, sinks=sinks, **options)
    return out.squeeze(0).transpose(0, 1)  # out[0] would copy the whole gradient


def _longest(cu_q: Tensor, cu_k: Tensor, tokens: tuple[int, int]) -> list[int]:
    """The longest document of each; all that is asked of the device is asked at once.

    Raises:
        AttentionError: they are no borders. (Where nothing has to be read from a GPU, nobody looks.)
    """
    sizes = [nn.functional.pad(cu.diff(), (1, 0)) for cu in (cu_q, cu_k)]
    facts = [(cu[0], cu[-1], size.min(), size.max()) for cu, size in zip((cu_q, cu_k), sizes, strict=True)]
    found = torch.stack([fact.to(cu_q.device) for each in facts for fact in each]).view(2, 4)
    if torch.compiler.is_compiling():
        longest: list[int] = found[:, 3].tolist()
        return longest
    longest = []
    for name, last, (first, end, least, most) in zip(("q", "k"), tokens, found.tolist(), strict=True):
        if first != 0 or least < 0 or end > last:
            said = f"from {first} to {end}" + ", and not ascending" * (least < 0)
            raise AttentionError(f"cu_seqlens_{name} goes {said}: borders ascend from 0 to at most {last} tokens")
        longest.append(most)
    return longest


def _documents(
    cu_q: Tensor, cu_k: Tensor, tokens: tuple[int, int], most: tuple[int | None, int | None], causal: bool, sides: Sides
) -> Packed:
    """The documents between borders, of at ``most`` so many queries and keys, kept with the borders for the next layer.

    What is kept with documents (keys that nobody sees, host integers) would else be worked out in every layer anew.
    """
    key = "documents", tokens, most, causal, sides
    known: Packed | None = memo.recall(cu_q, key, cu_k)
    if known is None:
        max_q, max_k = most
        free = type(cu_q) is Tensor and cu_q.device.type == "cpu" and not torch.compiler.is_compiling()
        if max_q is None or max_k is None or free:
            longest = _longest(cu_q, cu_k, tokens)
            max_q, max_k = (given if given is not None else n for given, n in zip(most, longest, strict=True))
        known = packed(1, *tokens, cu_q, cu_k, max_q, max_k, causal, sides)
        memo.keep(cu_q, key, known, cu_k)
    return known


def _masked(plain: Full, mask: Tensor, shape: tuple[int, int, int, int]) -> Dense:
    """``mask`` together with causality and window, written out."""
    B, HQ, Sq, Sk = shape
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    mask = mask.expand(mask.shape[0], mask.shape[1], Sq, Sk)
    band = Full(B, Sq, Sk, plain.causal, plain.window).dense(mask.device)
    if plain.start:
        seen = torch.arange(Sk, device=mask.device) >= plain.start
        band = seen if band is None else band & seen
    return Dense(B, Sq, Sk, mask=mask if band is None else mask & band)


def _window(window: Window, causal: bool) -> tuple[Sides, bool]:
    if window is None:
        return NO_WINDOW, causal
    if isinstance(window, int):
        if window < 1:
            raise AttentionError(f"a window of {window} keys shows nothing; use None for no window")
        return (window - 1, None), True
    left, right = window
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise AttentionError(f"window {window}: sides are numbers of keys from 0, None for no bound")
    return (left, right), causal


def _check(q: Tensor, k: Tensor, v: Tensor, dropout: float, sinks: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise AttentionError(f"q, k and v are [B, H, S, D]; got {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise AttentionError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together: "
            "[B, HQ, Sq, D], [B, HKV, Sk, D] and [B, HKV, Sk, Dv] are wanted"
        )
    KVGrouping(q.shape[1], k.shape[1])
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise AttentionError(
            f"q, k and v have the dtypes {q.dtype}, {k.dtype} and {v.dtype}; one floating one is wanted"
        )
    if not q.device == k.device == v.device:
        raise AttentionError(f"q, k and v are on {q.device}, {k.device} and {v.device}; one device is wanted")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise AttentionError(f"sinks have the shape {tuple(sinks.shape)}, not one for each of {q.shape[1]} query heads")
    if not 0.0 <= dropout < 1.0:
        raise AttentionError(f"dropout {dropout} is not a probability below 1")


def _check_broadcast(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False)):
        raise AttentionError(f"{name} {tuple(t.shape)} does not broadcast to [B, HQ, Sq, Sk] = {shape}")
