"""MPT with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, MptConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.mpt import modeling_mpt as stock

from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_heads,
    with_width,
)


class GroupedMptConfig(GroupedConfig, MptConfig):
    """MPT's config, plus ``num_key_value_heads``. ALiBi belongs to the query heads and stays as it is."""

    model_type = "gqa_mpt"

    num_key_value_heads: int | None = None


class GroupedMptAttention(GroupedAttention, stock.MptAttention):
    """The rows of ``Wqkv`` are q [E], k [HKV * D], v [HKV * D]."""

    heads_attribute = "n_heads"

    def narrow(self, groups: KVGrouping) -> None:
        kv = groups.num_kv_heads * self.head_dim
        self.sizes = [self.hidden_size, kv, kv]
        self.Wqkv = with_width(self.Wqkv, sum(self.sizes))

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, output_attentions: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return eager_with_bias(q, k, v, mask, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (split_heads(x, self.head_dim) for x in qkv.split(self.sizes, dim=-1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p if self.training else 0.0,
            # ALiBi's constant of a row does not matter to its softmax, so the last columns serve every length
            position_bias=position_bias[None, :, :, max(0, position_bias.shape[-1] - k.shape[-2]) :],
            **kwargs,
        )
        return self.out_proj(out), weights


class GroupedMpt(GroupedModelOutsideInterface):
    config_class = GroupedMptConfig


class GroupedMptModel(GroupedMpt, stock.MptModel):
    """The stock forward casts its mask to "masked" booleans, which only its own attention reads so."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        attentions: tuple[Any, ...] | None = () if _given(output_attentions, config.output_attentions) else None
        states: tuple[Tensor, ...] | None = () if _given(output_hidden_states, config.output_hidden_states) else None
        use_cache = _given(use_cache, config.use_cache) and not (self.gradient_checkpointing and self.training)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        alibi = self.build_mpt_alibi_tensor(self.num_heads, config.max_seq_len, device=inputs_embeds.device)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden = inputs_embeds
        for block in self.blocks:
            states = None if states is None else (*states, hidden)
            hidden, weights = block(
                hidden, position_bias=alibi.to(hidden.dtype), attention_mask=mask, layer_past=past_key_values
            )
            attentions = None if attentions is None else (*attentions, weights)
        hidden = self.norm_f(hidden)
        states = None if states is None else (*states, hidden)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states, attentions=attentions
        )
        return output if _given(return_dict, config.return_dict) else output.to_tuple()


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


GroupedMpt.replaced = {stock.MptAttention: GroupedMptAttention, stock.MptModel: GroupedMptModel}


class GroupedMptForCausalLM(GroupedMpt, stock.MptForCausalLM): ...


class GroupedMptForSequenceClassification(GroupedMpt, stock.MptForSequenceClassification): ...


class GroupedMptForTokenClassification(GroupedMpt, stock.MptForTokenClassification): ...


class GroupedMptForQuestionAnswering(GroupedMpt, stock.MptForQuestionAnswering): ...
