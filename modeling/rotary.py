"""What GPT-J and CodeGen share: interleaved RoPE that is read from a table of sines and cosines.

Up to transformers 5.23 each attention has the table and its own eager attention; from 5.24 the model has the table and
hands on what it says of the positions, and eager attention is a function of the family's file.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.cache_keyword import update_cache

from .grouped import GroupedAttention, attend, eager_with_bias


class TableRotaryAttention(GroupedAttention):
    """Mixin of the two stock attention classes, whose file has ``apply_rotary_pos_emb``."""

    heads_attribute = "num_attention_heads"
    #: the family's file in transformers
    stock: ClassVar[Any]
    head_dim: int
    rotary_dim: int | None
    training: bool
    resid_dropout: nn.Module
    out_proj: nn.Module
    #: CodeGen rotates in the table's fp32, GPT-J in the model's dtype
    rotates_in_fp32: ClassVar[bool] = False

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, E] -> q [B, S, HQ, D], k and v [B, S, HKV, D]."""
        raise NotImplementedError

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not hasattr(self.stock, "eager_attention_forward"):  # up to 5.23, where the scores are divided
            scores = q.float() @ k.float().transpose(-1, -2) / self.head_dim**0.5
            return eager_with_bias(q, k, v, mask, scores=scores, dropout=kwargs["dropout"])
        out, weights = self.stock.eager_attention_forward(self, q, k, v, mask, **kwargs)
        return out, weights

    def _sin_cos(self, like: Tensor, position_ids: Tensor | None, given: tuple[Tensor, Tensor] | None) -> Any:
        """sin and cos [B or 1, S, rotary_dim / 2] of the positions."""
        if given is not None:
            return given
        if position_ids is None or not hasattr(self, "embed_positions"):
            raise TypeError(
                f"{type(self).__name__} got neither position_embeddings, as from transformers 5.24, nor position_ids "
                "and a table of its own, as up to 5.23"
            )
        table: Any = self.embed_positions[position_ids]  # type: ignore[index]
        return (table if self.rotates_in_fp32 else table.to(like.dtype)).chunk(2, dim=-1)

    def _rotated(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """The first ``rotary_dim`` dimensions (all, if None) of x [B, S, H, D] turned; gives [B, H, S, D]."""
        n = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
        turned = self.stock.apply_rotary_pos_emb(x[..., :n], sin, cos)
        return torch.cat([turned, x[..., n:]], dim=-1).transpose(1, 2).to(x.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(hidden_states)
        sin, cos = self._sin_cos(v, position_ids, position_embeddings)
        q, k, v = self._rotated(q, sin, cos), self._rotated(k, sin, cos), v.transpose(1, 2)
        k, v = update_cache(self, k, v, kwargs)
        dropout = self.config.attn_pdrop if self.training else 0.0
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            position_ids=position_ids,
            scaling=self.head_dim**-0.5,
            dropout=dropout,
            **kwargs,
        )
        return self.resid_dropout(self.out_proj(out)), weights
