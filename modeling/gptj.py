"""GPT-J with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GPTJConfig
from transformers.models.gptj import modeling_gptj as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModelOutsideInterface, attend


class GroupedGPTJConfig(GroupedConfig, GPTJConfig):
    """GPT-J's config, plus ``num_key_value_heads``."""

    model_type = "gqa_gptj"

    num_key_value_heads: int | None = None


def rotate(x: Tensor, sincos: Tensor, rotary_dim: int | None) -> Tensor:
    """Interleaved RoPE on the first ``rotary_dim`` dimensions (all, if None) of x [B, S, H, D]."""
    sin, cos = sincos.chunk(2, dim=-1)
    if rotary_dim is None:
        return stock.apply_rotary_pos_emb(x, sin, cos)
    return torch.cat([stock.apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos), x[..., rotary_dim:]], dim=-1)


class GroupedGPTJAttention(GroupedAttention, stock.GPTJAttention):
    heads_attribute = "num_attention_heads"

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, weights = self._attn(q, k, v, mask)  # it has its own scaling and dropout
        return out.transpose(1, 2), weights

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        sincos = self.embed_positions[position_ids].to(v.dtype)
        q = rotate(self.q_proj(hidden_states).view(shape), sincos, self.rotary_dim).transpose(1, 2)
        k = rotate(self.k_proj(hidden_states).view(shape), sincos, self.rotary_dim).transpose(1, 2)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=1 / self.scale_attn,
            dropout=self.attn_dropout.p if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out)), weights


class GroupedGPTJ(GroupedModelOutsideInterface):
    config_class = GroupedGPTJConfig
    replaced: ClassVar[dict[type, type]] = {stock.GPTJAttention: GroupedGPTJAttention}


class GroupedGPTJModel(GroupedGPTJ, stock.GPTJModel): ...


class GroupedGPTJForCausalLM(GroupedGPTJ, stock.GPTJForCausalLM): ...


class GroupedGPTJForSequenceClassification(GroupedGPTJ, stock.GPTJForSequenceClassification): ...


class GroupedGPTJForQuestionAnswering(GroupedGPTJ, stock.GPTJForQuestionAnswering): ...
