"""Which backend runs what, and why the others don't."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch

from hf_attn_patch.attn.dispatch import _capability, reasons
from hf_attn_patch.attn.request import AttentionRequest, query_class
from hf_attn_patch.grouping import KVGrouping


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: ``chosen``, and for every backend the reason against it (None: it can run)."""

    request: AttentionRequest
    reasons: tuple[tuple[str, str | None], ...]

    @property
    def chosen(self) -> str:
        """The backend that runs the request."""
        return next(name for name, reason in self.reasons if reason is None)

    def rows(self) -> list[tuple[str, str]]:
        """(backend, what about it), in the order in which they are tried."""
        return [
            (name, reason or ("runs this" if name == self.chosen else "could run it, but was measured slower"))
            for name, reason in self.reasons
        ]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.reasons)
        lines = [self.request.describe()]
        return "\n".join(lines + [f"  {name:<{width}}  {text}" for name, text in self.rows()])

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in self.rows())
        return f"<p>{html.escape(self.request.describe())}</p><table>{cells}</table>"


def request_for(B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int, device: str | None = None) -> AttentionRequest:
    """The request of a causal call without padding or gradients, on this machine's first device or on one of a type."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    return AttentionRequest(
        device=device,
        capability=_capability(torch.device(device)) if cuda else 0,
        dtype=torch.bfloat16 if cuda else torch.float32,
        heads=HQ,
        kv_heads=HKV,
        head_dim=D,
        value_dim=D,
        q_class=query_class(Sq),
        work_bits=(B * HQ * Sq * Sk * D).bit_length(),
        streams=B * HKV,
        rows=0 if Sq > 16 else HQ // HKV * Sq,
        square=Sq == Sk,
        visibility="full",
        causal=Sq > 1,
        **dict.fromkeys(("windowed", "softcap", "sinks", "bias", "bias_grad", "dropout", "grad", "weights"), False),
        **dict.fromkeys(("per_head_mask", "deterministic", "tracing"), False),
    )


def explain(
    model: Any,
    *,
    batch: int = 1,
    q_len: int = 1,
    kv_len: int = 1024,
    padded: bool = False,
    packed: bool = False,
    training: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Which backend a model's attention takes in a situation, and why not the others.

    Args:
        model: a transformers model or config.
        batch, q_len, kv_len: B, Sq and Sk of the call (q_len 1 is decoding).
        padded: rows have padding. packed: documents lie packed in the rows. training: gradients are needed.
        device, dtype: default to the model's.
    """
    config = getattr(model, "config", model)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    given = getattr(text, "num_key_value_heads", None) or heads
    kv_heads = max(given) if isinstance(given, (list, tuple)) else int(given)  # a list: one for each layer
    KVGrouping(heads, kv_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    device_type = torch.device(device if device is not None else getattr(model, "device", "cpu")).type
    dtype = dtype or getattr(model, "dtype", None) or torch.get_default_dtype()
    window: int = getattr(text, "sliding_window", None) or 0
    visibility = "packed" if packed else ("full" if not padded else ("dense" if q_len <= 16 else "padded"))
    biased = text.model_type in ("t5", "mt5", "umt5")
    request = request_for(batch, heads, kv_heads, q_len, kv_len, head_dim, device_type)._replace(
        dtype=dtype,
        visibility=visibility,
        causal=q_len > 1 and visibility != "dense",
        windowed=0 < window < kv_len and q_len > 1 and visibility != "dense",
        softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        sinks=text.model_type == "gpt_oss",
        bias=biased,
        bias_grad=training and biased,
        dropout=training and bool(getattr(text, "attention_dropout", 0.0)),
        grad=training,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return Explanation(request, tuple(reasons(request)))
