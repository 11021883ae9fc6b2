"""GPT-Neo with configurable KV heads, through transformers' attention interface.

Its local layers are a sliding window like any other's: their cache keeps the last ``window_size`` keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPTNeoConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt_neo import modeling_gpt_neo as stock

from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_heads,
)

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class GroupedGPTNeoConfig(GroupedConfig, GPTNeoConfig):
    """GPT-Neo's config, plus ``num_key_value_heads``; local layers under the names that caches and masks look for."""

    model_type = "gqa_gpt_neo"

    num_key_value_heads: int | None = None

    @property
    def layer_types(self) -> list[str]:
        return ["sliding_attention" if kind == "local" else "full_attention" for kind in self.attention_layers]

    @property
    def sliding_window(self) -> int:
        return int(self.window_size)


class GroupedGPTNeoAttention(GroupedAttention, stock.GPTNeoSelfAttention):
    """Scores are not scaled, and the window is in the mask."""

    def narrow(self, groups: KVGrouping) -> None:
        super().narrow(groups)
        del self.bias  # the stock causal mask, [1, 1, positions, positions]
        self.layer_idx = self.layer_id

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return eager_with_bias(q, k, v, mask, scores=q.float() @ k.float().transpose(-1, -2), dropout=dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (split_heads(p(hidden_states), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=1.0,
            dropout=self.attn_dropout.p if self.training else 0.0,
            sliding_window=self.config.window_size if self.attention_type == "local" else None,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out)), weights


class GroupedGPTNeo(GroupedModelOutsideInterface):
    config_class = GroupedGPTNeoConfig
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, GroupedGPTNeoAttention):  # the stock code fills in the mask that is not there
            super()._init_weights(module)  # type: ignore[misc]


class GroupedGPTNeoModel(GroupedGPTNeo, stock.GPTNeoModel):
    """The stock forward makes one mask for all layers; this one makes one for each kind of layer."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
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
        output_attentions = _given(output_attentions, config.output_attentions)
        attentions: tuple[Any, ...] | None = () if output_attentions else None
        states: tuple[Tensor, ...] | None = () if _given(output_hidden_states, config.output_hidden_states) else None
        use_cache = _given(use_cache, config.use_cache) and not (self.gradient_checkpointing and self.training)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = attention_mask
        if not isinstance(masks, dict):  # generate() has made them already
            about = {
                "config": config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
                "position_ids": position_ids,
            }
            masks = {kind: MASKS[kind](**about) for kind in set(config.layer_types)}
        hidden = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids)
        hidden = self.drop(hidden)
        for block, kind in zip(self.h, config.layer_types, strict=True):
            states = None if states is None else (*states, hidden)
            hidden, weights = block(
                hidden, layer_past=past_key_values, attention_mask=masks[kind], output_attentions=output_attentions
            )
            attentions = None if attentions is None else (*attentions, weights)
        hidden = self.ln_f(hidden)
        states = None if states is None else (*states, hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states, attentions=attentions
        )
        return output if _given(return_dict, config.return_dict) else output.to_tuple()


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


GroupedGPTNeo.replaced = {stock.GPTNeoSelfAttention: GroupedGPTNeoAttention, stock.GPTNeoModel: GroupedGPTNeoModel}


class GroupedGPTNeoForCausalLM(GroupedGPTNeo, stock.GPTNeoForCausalLM): ...


class GroupedGPTNeoForSequenceClassification(GroupedGPTNeo, stock.GPTNeoForSequenceClassification): ...


class GroupedGPTNeoForTokenClassification(GroupedGPTNeo, stock.GPTNeoForTokenClassification): ...


class GroupedGPTNeoForQuestionAnswering(GroupedGPTNeo, stock.GPTNeoForQuestionAnswering): ...
