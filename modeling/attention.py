"""Multi-head, grouped-query and multi-query attention as one module, for people who build their own model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_attn_patch.attn.functional import attention, attention_and_weights, attention_varlen
from hf_attn_patch.grouping import KVGrouping

from .arguments import either, half_of
from .masks import Masks, both, over_keys
from .mha import read_mha
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

    It takes the place of ``torch.nn.MultiheadAttention``, also in torch's Transformer layers: called with query, key
    and value it returns a pair, and ``attn_mask`` and ``key_padding_mask`` hide where they are True.
    ``attention_mask`` has transformers' convention and shows where it is one.

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
        batch_first: inputs and output are [B, S, E]; else [S, B, E], as by default in ``torch.nn.MultiheadAttention``.
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
    ...     out = gqa(token, cache=cache)
    >>> cache.layers[0].keys.shape
    torch.Size([3, 2, 4, 8])
    >>> x, padding = torch.randn(3, 5, 64), torch.tensor([[False] * 5, [False] * 5, [False] * 3 + [True] * 2])
    >>> out, weights = gqa(x, x, x, key_padding_mask=padding)  # as torch.nn.MultiheadAttention is called
    >>> weights[2, 4]                                          # doctest: +ELLIPSIS
    tensor([..., 0.0000, 0.0000], grad_fn=...)
    """

    #: torch's Transformer layers ask for these before they take a fused path that would go past this module
    in_proj_bias = None
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> Tensor:
        raise RuntimeError(
            "torch.nn.TransformerEncoder packs padded batches for its own attention alone: "
            "build it with enable_nested_tensor=False"
        )

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
        batch_first: bool = True,
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
        self.scale, self.dropout, self.layer_idx, self.batch_first = scale, dropout, layer_idx, batch_first
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
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        hidden_states: Tensor | None = None,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Called as ``torch.nn.MultiheadAttention`` is, or as an attention of transformers is.

        Args:
            query: [B, Sq, E], of which the queries are made; another name for it is ``hidden_states``. Without
                ``batch_first`` it is [Sq, B, E], and so are all inputs and the output; without a batch [Sq, E].
            key: [B, Sk, kv_dim], of which the keys are made; another name for it is ``key_value_states``. By default
                ``query``. Given, it is cross-attention, which knows neither positions nor the module's causality;
                but not where ``value`` is given too and the key is the query itself, which is how torch is called.
            value: [B, Sk, kv_dim], of which the values are made; by default ``key``.
            key_padding_mask: [B, Sk], bool (True: the key may NOT be seen) or float (added to the scores).
            need_weights: whether the attention weights are wanted, which no fast kernel has. By default only where
                ``value`` is given, as in torch.
            attn_mask: [Sq, Sk] or [B * HQ, Sq, Sk], bool (True: the key may NOT be seen) or float (added).
            average_attn_weights: weights as the mean over heads [B, Sq, Sk], else [B, HQ, Sq, Sk].
            is_causal: queries see no later keys, as with a causal module. Beside ``attn_mask`` it is a hint, as in
                torch, and the mask alone counts.
            attention_mask: transformers' convention. [B, Sk] of ones and zeros (zero: padding), integers or bool; or
                what is broadcastable to [B, HQ, Sq, Sk], bool (True: MAY be seen) or float (added to the scores).
            position_ids: [B or 1, Sq], for RoPE; by default they go on after what the cache holds.
            cache: any transformers Cache, or by its older name ``past_key_values``; masks count the cached keys too. Of
                an EncoderDecoderCache each attention takes its half, and cross-attention makes its keys only once.
            cu_seqlens: int32 [N + 1], borders of packed documents in a row of tokens (B = 1), none of which sees
                another. Neither a mask nor a cache goes with it.

        Returns:
            [B, Sq, E]. Where ``value`` or ``need_weights`` is given, (output, weights or None), as in torch. A query
            that sees no key has weights of zero, where torch's has NaN.

        Raises:
            ValueError: masks of both conventions; a mask of another shape or number of keys, or one that could be
                read in two ways; ``cu_seqlens`` with B > 1, a mask, a cache, weights or keys of their own.
            hf_attn_patch.AttentionError: shapes that do not fit.
        """
        x, key = either(query=query, hidden_states=hidden_states), either(key=key, key_value_states=key_value_states)
        if x is None or (key is None and value is not None):
            raise ValueError("give query (or hidden_states), and a key (or key_value_states) with a value")
        past = either(cache=cache, past_key_values=past_key_values)
        pair, weights = value is not None or need_weights is not None, need_weights
        weights = value is not None if weights is None else weights
        cross = key is not None and (value is None or key is not x)
        single = x.dim() == 2
        if single and key_padding_mask is not None and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask[None]
        given = Masks(attention_mask, attn_mask, key_padding_mask)
        rows = self._batch_first(x)
        key, value = (None if t is None else self._batch_first(t) for t in (key, value))
        if cu_seqlens is not None:
            if rows.shape[0] != 1 or weights or cross or not all(t is None for t in (*given, past)):
                raise ValueError(
                    "cu_seqlens describes one row of packed tokens for self-attention: give hidden_states [1, S, E] "
                    "and no mask, cache, weights or key_value_states with it"
                )
            out, found = self._packed(rows, cu_seqlens, position_ids, is_causal), None
        else:
            out, found = self._attend(rows, key, value, cross, given, is_causal, position_ids, past, weights)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if found is not None and average_attn_weights:
            found = found.mean(1)
        if single:
            out, found = out[0], None if found is None else found[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return (out, found) if pair else out

    def _attend(
        self,
        x: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        cross: bool,
        given: Masks,
        is_causal: bool,
        position_ids: Tensor | None,
        past: Any,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, Sq, E] -> [B, HQ, Sq, D], and the weights [B, HQ, Sq, Sk] if wanted."""
        B, Sq, _ = x.shape
        cache, cached = half_of(past, cross, self.layer_idx)
        seen: Any = cache.get_seq_length(self.layer_idx) if cache is not None and not cross else 0
        if isinstance(seen, Tensor):
            seen = seen.clone()  # a static cache counts on in the same tensor
        if cached:
            known = cache.layers[self.layer_idx].keys.shape[2]
        else:
            known = (x if key is None else key).shape[1] + seen if isinstance(seen, int) else None
        mask = given.resolve((B, self.groups.num_heads, Sq), known, exact=cross or cache is None)
        indices = torch.arange(Sq, device=x.device) + seen
        positions = indices[None] if position_ids is None else position_ids
        q = self._rotated(self.q_norm(self._heads(self.q_proj, x)), positions, cross)
        offset = 0
        if cached:
            layer = cache.layers[self.layer_idx]
            k, v = layer.keys, layer.values
        else:
            source = x if key is None else key
            k = self._rotated(self.k_norm(self._heads(self.k_proj, source)), positions, cross)
            v = self._heads(self.v_proj, source if value is None else value)
            if cache is not None:
                offset = 0 if cross else cache.get_mask_sizes(Sq, self.layer_idx)[1]
                k, v = cache.update(k, v, self.layer_idx)
                if cross:
                    past.is_updated[self.layer_idx] = True
        keys = torch.arange(k.shape[2], device=k.device) + offset
        mask = None if mask is None else over_keys(mask, keys)
        is_causal = is_causal and given.attn_mask is None
        if is_causal and cross and Sq != k.shape[2]:
            raise ValueError(f"is_causal between {Sq} queries and {k.shape[2]} other keys: say which by an attn_mask")
        causal, window = is_causal or (self.causal and not cross), None if cross else self.window
        if not cross and (isinstance(seen, Tensor) or offset + k.shape[2] != seen + Sq):
            # keys beyond the last query are a static cache's empty places, so no kernel may align at the end
            visible = keys[None, :] <= (indices[:, None] if causal else indices[-1:, None])
            if window is not None:
                visible = visible & (keys[None, :] > indices[:, None] - window)
            mask = both(mask, visible[None, None])
            causal, window = False, None
        options = self._options(mask=mask, causal=causal, window=window)
        options["bias"] = None if cross else self._bias(q, indices, keys)
        return attention_and_weights(q, k, v, **options) if weights else (attention(q, k, v, **options), None)

    def _options(self, **more: Any) -> dict[str, Any]:
        """What the attention function is told in each call."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "dropout": self.dropout if self.training else 0.0,
            "backend": self.backend,
            **more,
        }

    def _batch_first(self, x: Tensor) -> Tensor:
        """Any input as [B, S, width]."""
        return x[None] if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)

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

    def _packed(self, x: Tensor, cu_seqlens: Tensor, position_ids: Tensor | None, is_causal: bool) -> Tensor:
        """x [1, S, E] -> [1, HQ, S, D]."""
        indices = torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(cu_seqlens, indices, right=True)
        positions = (indices - cu_seqlens[document - 1])[None] if position_ids is None else position_ids
        q = self.position.rotate(self.q_norm(self._heads(self.q_proj, x)), positions)
        k = self.position.rotate(self.k_norm(self._heads(self.k_proj, x)), positions)
        v = self._heads(self.v_proj, x)
        options = self._options(causal=self.causal or is_causal, window=self.window)
        bias = self._bias(q, indices, indices)
        if bias is None:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            return attention_varlen(q, k, v, cu_seqlens, **options).transpose(0, 1)[None]
        # biases depend on distances alone, which are the same within a document and in the row
        same = (document[:, None] == document[None, :])[None, None]
        return attention(q, k, v, mask=same, bias=bias, **options)

    @classmethod
    @torch.no_grad()
    def from_mha(
        cls, mha: nn.MultiheadAttention, num_kv_heads: int | None = None, **kwargs: Any
    ) -> GroupedQueryAttention:
        """The same attention with each group's K and V heads mean-pooled (exactly the same with all heads kept).

        Args:
            mha: its weights are copied (pooled in fp32); its ``batch_first``, dropout and biases come along.
            num_kv_heads: HKV; by default as many as ``mha`` has heads.
            kwargs: what the constructor takes beside shapes and biases (``causal``, ``position``, ...).

        Raises:
            ValueError: ``mha`` has ``add_bias_kv`` or ``add_zero_attn``, or different widths for keys and values.

        >>> mha = nn.MultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 32)
        >>> torch.allclose(GroupedQueryAttention.from_mha(mha)(x), mha(x, x, x)[0], atol=1e-6)
        True
        """
        shapes, copy = read_mha(mha)
        out = cls(num_kv_heads=num_kv_heads, **{**shapes, **kwargs})
        copy(out)
        return out.train(mha.training)
