"""Multi-head, grouped-query and multi-query attention as one module, for people who build their own model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_attn_patch.attn.functional import attention, attention_varlen
from hf_attn_patch.grouping import KVGrouping

from .positions import NoPosition


class GroupedQueryAttention(nn.Module):
    r"""Attention in which groups of G = HQ / HKV query heads share one key and value head (arXiv 2305.13245).

    ::

        MHA: num_kv_heads = 4      GQA: num_kv_heads = 2      MQA: num_kv_heads = 1

        V   v0  v1  v2  v3         V     v0      v1           V         v0
        K   k0  k1  k2  k3         K     k0      k1           K         k0
            |   |   |   |               / \     / \                / /     \ \
        Q   q0  q1  q2  q3         Q  q0  q1  q2  q3          Q  q0  q1  q2  q3

    The KV cache holds HKV heads, so it shrinks by G; so does what a decoding step reads of it.

    Args:
        embed_dim: E, of what the queries are made from and of the output.
        num_heads: HQ.
        num_kv_heads: HKV, a divisor of HQ; by default HQ (multi-head attention).
        head_dim: D; by default E / HQ.
        kv_dim: width of what keys and values are made from (cross-attention); by default E.
        causal: queries see no later keys. Leave it False for cross-attention.
        position: :class:`~hf_attn_patch.modeling.Rope`, ``Alibi`` or ``RelativeBias``; None for none.
        window: only the last ``window`` keys, a query's own included; then the module is causal.
        sinks: a learned logit per query head that joins the softmax and takes no value (gpt-oss).
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        scale: of the scores; D ** -0.5 by default (T5: 1.0).
        qk_norm: "rms" normalises each head of q and k, with a learned gain [D] (Qwen 3).
        dropout: probability of dropping a weight, in training.
        bias: of all four projections; ``qkv_bias`` and ``out_bias`` say it apart.
        layer_idx: this layer's place in a cache.
        backend: insist on one of hf_attn_patch's backends.

    Raises:
        GroupingError: HQ is no multiple of HKV.
        ValueError: E is no multiple of HQ and no ``head_dim`` is given, or an unknown ``qk_norm``.

    >>> gqa = GroupedQueryAttention(64, num_heads=8, num_kv_heads=2, causal=True)
    >>> gqa(torch.randn(3, 5, 64)).shape
    torch.Size([3, 5, 64])
    >>> gqa.k_proj.weight.shape                         # 2 heads of 8
    torch.Size([16, 64])
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> for token in torch.randn(4, 3, 1, 64):          # 4 steps of one token
    ...     out = gqa(token, past_key_values=cache)
    >>> cache.layers[0].keys.shape
    torch.Size([3, 2, 4, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        causal: bool = False,
        position: NoPosition | None = None,
        window: int | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        qk_norm: Literal["rms"] | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
        layer_idx: int = 0,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}; give a head_dim")
        if qk_norm not in (None, "rms"):
            raise ValueError(f"qk_norm={qk_norm!r}: it is 'rms' or None")
        self.groups = KVGrouping(num_heads, num_heads if num_kv_heads is None else num_kv_heads)
        self.embed_dim, self.head_dim = embed_dim, head_dim or embed_dim // num_heads
        self.causal, self.window = causal or window is not None, window
        self.softcap, self.backend = softcap, backend
        self.scale, self.dropout, self.layer_idx = scale, dropout, layer_idx
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = num_heads * self.head_dim, self.groups.num_kv_heads * self.head_dim
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.q_proj = nn.Linear(embed_dim, inner, bias=qkv_bias, **where)
        self.k_proj = nn.Linear(kv_dim or embed_dim, kv_inner, bias=qkv_bias, **where)
        self.v_proj = nn.Linear(kv_dim or embed_dim, kv_inner, bias=qkv_bias, **where)
        self.o_proj = nn.Linear(inner, embed_dim, bias=bias if out_bias is None else out_bias, **where)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **where) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, **where) if qk_norm else nn.Identity()
        self.position = NoPosition() if position is None else position
        self.sinks = nn.Parameter(torch.zeros(num_heads, **where)) if sinks else None

    def extra_repr(self) -> str:
        g = self.groups
        return (
            f"{g.kind}: {g.num_heads} query heads, {g.num_kv_heads} KV heads of {self.head_dim}, causal={self.causal}"
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, Sq, E] -> [B, Sq, E].

        Args:
            hidden_states: [B, Sq, E], of which the queries are made.
            key_value_states: [B, Sk, kv_dim], of which keys and values are made; by default ``hidden_states``.
            attention_mask: [B, Sk] of ones and zeros (zero: padding), counting cached keys; or what is broadcastable
                to [B, HQ, Sq, Sk]: bool (True: may be seen) or float (added to the scores).
            position_ids: [B or 1, Sq], for RoPE; by default they go on after what the cache holds.
            past_key_values: any transformers Cache. Of an EncoderDecoderCache, self- and cross-attention each take
                their own half, and cross-attention makes its keys only once.
            cu_seqlens: int32 [N + 1], borders of packed documents in a row of tokens (B = 1), none of which sees
                another. Neither a mask nor a cache goes with it.

        Raises:
            ValueError: ``cu_seqlens`` with B > 1, a mask, a cache or ``key_value_states``; an ``attention_mask``
                [B, Sk] that does not count the cached keys.
            hf_attn_patch.AttentionError: shapes that do not fit.
        """
        if cu_seqlens is not None:
            if hidden_states.shape[0] != 1 or not all(
                x is None for x in (attention_mask, past_key_values, key_value_states)
            ):
                raise ValueError(
                    "cu_seqlens describes one row of packed tokens for self-attention: give hidden_states [1, S, E] "
                    "and no attention_mask, past_key_values or key_value_states with it"
                )
            return self._packed(hidden_states, cu_seqlens, position_ids)
        cross = key_value_states is not None
        cache, cached = _half_of(past_key_values, cross, self.layer_idx)
        Sq = hidden_states.shape[1]
        seen: Any = cache.get_seq_length(self.layer_idx) if cache is not None and not cross else 0
        if isinstance(seen, Tensor):
            seen = seen.clone()  # a static cache counts on in the same tensor
        indices = torch.arange(Sq, device=hidden_states.device) + seen
        positions = indices[None] if position_ids is None else position_ids
        q = self._rotated(self.q_norm(self._heads(self.q_proj, hidden_states)), positions, cross)
        offset = 0
        if cached:
            layer = cache.layers[self.layer_idx]
            k, v = layer.keys, layer.values
        else:
            source = hidden_states if key_value_states is None else key_value_states
            k = self._rotated(self.k_norm(self._heads(self.k_proj, source)), positions, cross)
            v = self._heads(self.v_proj, source)
            if cache is not None:
                offset = 0 if cross else cache.get_mask_sizes(Sq, self.layer_idx)[1]
                k, v = cache.update(k, v, self.layer_idx)
                if cross:
                    past_key_values.is_updated[self.layer_idx] = True
        Sk = k.shape[2]
        keys = torch.arange(Sk, device=k.device) + offset
        if attention_mask is not None and attention_mask.dim() == 2 and not cross and isinstance(seen, int):
            _require_length(attention_mask, seen + Sq)
        mask = _cut(attention_mask, keys, Sk)
        causal, window = self.causal and not cross, None if cross else self.window
        if not cross and (isinstance(seen, Tensor) or offset + Sk != seen + Sq):
            # keys beyond the last query are a static cache's empty places, so no kernel may align at the end
            visible = keys[None, :] <= (indices[:, None] if causal else indices[-1:, None])
            if window is not None:
                visible = visible & (keys[None, :] > indices[:, None] - window)
            mask = _and(mask, visible[None, None])
            causal, window = False, None
        bias = None if cross else self._bias(q, indices, keys)
        out = attention(
            q,
            k,
            v,
            mask=mask,
            causal=causal,
            window=window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self._output(out)

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """[B, S, width] -> [B, heads, S, D]."""
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, x: Tensor, positions: Tensor, cross: bool) -> Tensor:
        return x if cross else self.position.rotate(x, positions)

    def _bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """[1, HQ, Sq or 1, Sk] in q's dtype."""
        # a row's constant is seen by a sink, and costs half precision its last digits at long distances
        exact = self.sinks is not None or q.dtype.itemsize < 4
        bias = self.position.bias(q_positions, k_positions, exact)
        return None if bias is None else bias.to(q.dtype)

    def _output(self, out: Tensor) -> Tensor:
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _packed(self, x: Tensor, cu_seqlens: Tensor, position_ids: Tensor | None) -> Tensor:
        indices = torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(cu_seqlens, indices, right=True)
        positions = (indices - cu_seqlens[document - 1])[None] if position_ids is None else position_ids
        q = self.position.rotate(self.q_norm(self._heads(self.q_proj, x)), positions)
        k = self.position.rotate(self.k_norm(self._heads(self.k_proj, x)), positions)
        v = self._heads(self.v_proj, x)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout": dropout,
            "backend": self.backend,
        }
        bias = self._bias(q, indices, indices)
        if bias is None:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            return self._output(attention_varlen(q, k, v, cu_seqlens, **options).transpose(0, 1)[None])
        # biases depend on distances alone, which are the same within a document and in the row
        same = (document[:, None] == document[None, :])[None, None]
        return self._output(attention(q, k, v, mask=same, bias=bias, **options))

    @classmethod
    @torch.no_grad()
    def from_mha(
        cls, mha: nn.MultiheadAttention, num_kv_heads: int | None = None, **kwargs: Any
    ) -> GroupedQueryAttention:
        """The same attention with each group's K and V heads mean-pooled (exactly the same with all heads kept).

        Args:
            mha: its weights are copied (pooled in fp32). ``batch_first`` does not matter: inputs here are [B, S, E].
            num_kv_heads: HKV; by default as many as ``mha`` has heads.
            kwargs: what the constructor takes beside shapes, bias and dropout (``causal``, ``position``, ...).

        Raises:
            ValueError: ``mha`` has ``add_bias_kv`` or ``add_zero_attn``, or different widths for keys and values.

        >>> mha = nn.MultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 32)
        >>> torch.allclose(GroupedQueryAttention.from_mha(mha)(x), mha(x, x, x)[0], atol=1e-6)
        True
        """
        if mha.bias_k is not None or mha.add_zero_attn:
            raise ValueError("an extra key (add_bias_kv, add_zero_attn) has no place in GroupedQueryAttention")
        if mha.kdim != mha.vdim:
            raise ValueError(
                f"keys of width {mha.kdim} and values of width {mha.vdim}: they must be made from one input"
            )
        if mha._qkv_same_embed_dim:
            weights = mha.in_proj_weight.chunk(3)
        else:
            weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        like: dict[str, Any] = {"device": weights[0].device, "dtype": weights[0].dtype}
        out = cls(
            mha.embed_dim, mha.num_heads, num_kv_heads, kv_dim=mha.kdim, dropout=mha.dropout,
            bias=mha.in_proj_bias is not None, **like, **kwargs,
        )  # fmt: skip
        for projection, weight, bias in zip((out.q_proj, out.k_proj, out.v_proj), weights, biases, strict=True):
            heads = projection.out_features // out.head_dim
            projection.weight.copy_(_pooled(weight, heads, out.head_dim))
            if bias is not None:
                projection.bias.copy_(_pooled(bias, heads, out.head_dim))
        out.o_proj.weight.copy_(mha.out_proj.weight)
        if mha.out_proj.bias is not None:
            out.o_proj.bias.copy_(mha.out_proj.bias)
        return out.train(mha.training)


def _pooled(rows: Tensor, heads: int, head_dim: int) -> Tensor:
    """[H * D, ...] -> [heads * D, ...]: the mean of each group's heads."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return exact.unflatten(0, (heads, -1, head_dim)).mean(1).flatten(0, 1)


def _half_of(past: Any, cross: bool, layer_idx: int) -> tuple[Any, bool]:
    """(the cache that this attention writes to, whether its keys are there already)."""
    if past is None or not hasattr(past, "cross_attention_cache"):
        if past is not None and cross:
            raise ValueError("cross-attention caches in an EncoderDecoderCache, not in a plain cache")
        return past, False
    if cross:
        return past.cross_attention_cache, bool(past.is_updated.get(layer_idx))
    return past.self_attention_cache, False


def _require_length(mask: Tensor, length: int) -> None:
    if mask.shape[-1] < length:
        raise ValueError(
            f"attention_mask covers {mask.shape[-1]} keys, but with the cached ones there are {length}: it counts both"
        )


def _cut(mask: Tensor | None, keys: Tensor, Sk: int) -> Tensor | None:
    """A mask over all keys so far, as one over the keys that the cache gives back."""
    if mask is None:
        return None
    if mask.dim() == 2:
        missing = Sk - mask.shape[-1]
        if missing > 0:  # empty places of a static cache
            mask = nn.functional.pad(mask, (0, missing))
        return mask[:, keys].bool()[:, None, None, :] if missing < 0 else mask.bool()[:, None, None, :]
    return mask[..., keys] if mask.shape[-1] > Sk else mask


def _and(mask: Tensor | None, visible: Tensor) -> Tensor:
    """Both masks: bool, or float if ``mask`` is."""
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
