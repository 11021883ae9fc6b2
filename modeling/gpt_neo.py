"""GPT-Neo with configurable KV heads, through transformers' attention interface.

Its local layers are a sliding window like any other's: their cache keeps the last ``window_size`` keys only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GPTNeoConfig
from transformers.models.gpt_neo import modeling_gpt_neo as stock

from hf_attn_patch.compat.cache_keyword import keyword_of, update_cache

from .decoder import causal_mask, embed, given_cache, positions, run_blocks, sliding_window_causal_mask
from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_heads,
)

BLOCK_CACHE = keyword_of(stock.GPTNeoBlock.forward)
MASKS = {"full_attention": causal_mask, "sliding_attention": sliding_window_causal_mask}


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
        *,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (split_heads(p(hidden_states), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = update_cache(self, k, v, kwargs)
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
        cache: Any = None,
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
        cache = given_cache(cache, kwargs)
        inputs_embeds, cache = embed(self, self.wte, input_ids, inputs_embeds, cache, use_cache)
        position_ids = positions(position_ids, inputs_embeds, cache)
        kinds = self.config.layer_types
        masks = attention_mask
        if not isinstance(masks, dict):  # generate() may have made them already
            masks = {
                kind: MASKS[kind](self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
                for kind in dict.fromkeys(kinds)
            }
        hidden = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids)
        return run_blocks(
            self,
            self.h,
            self.drop(hidden),
            self.ln_f,
            lambda i: {"attention_mask": masks[kinds[i]]},
            cache=cache,
            cache_keyword=BLOCK_CACHE,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


GroupedGPTNeo.replaced = {stock.GPTNeoSelfAttention: GroupedGPTNeoAttention, stock.GPTNeoModel: GroupedGPTNeoModel}


class GroupedGPTNeoForCausalLM(GroupedGPTNeo, stock.GPTNeoForCausalLM): ...


class GroupedGPTNeoForSequenceClassification(GroupedGPTNeo, stock.GPTNeoForSequenceClassification): ...


class GroupedGPTNeoForTokenClassification(GroupedGPTNeo, stock.GPTNeoForTokenClassification): ...


class GroupedGPTNeoForQuestionAnswering(GroupedGPTNeo, stock.GPTNeoForQuestionAnswering): ...
