"""Falcon with configurable KV heads, through transformers' attention interface.

Every Falcon can be told its KV heads here: those that had none (multi_query=False), the multi-query ones and the "new
decoder architecture", whose stock code copies each KV head to all its query heads before it caches them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import FalconConfig
from transformers.models.falcon import modeling_falcon as stock

from hf_attn_patch.compat.cache_keyword import keyword_of, update_cache

from .decoder import causal_mask, embed, given_cache, positions, run_blocks
from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_groups,
)

BLOCK_CACHE = keyword_of(stock.FalconDecoderLayer.forward)


class GroupedFalconConfig(GroupedConfig, FalconConfig):
    """Falcon's config, plus ``num_key_value_heads`` (by default what the stock fields say)."""

    model_type = "gqa_falcon"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            if self.new_decoder_architecture:
                self.num_key_value_heads = self.num_kv_heads  # None: as many as query heads
            elif self.multi_query:
                self.num_key_value_heads = 1
        super().__post_init__(**kwargs)
        self.num_kv_heads: int | None = self.num_key_value_heads


class GroupedFalconAttention(GroupedAttention, stock.FalconAttention):
    """``query_key_value`` holds, per KV head, its G queries, its key and its value; so do all three stock layouts."""

    def narrow(self, groups: KVGrouping) -> None:
        self.groups = groups
        self.num_kv_heads = groups.num_kv_heads
        rows = groups.num_kv_heads * (groups.group_size + 2) * self.head_dim
        self.set_width("query_key_value", rows)

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5  # divided, as the stock module does
        if (bias := kwargs.get("position_bias")) is not None:
            scores = scores + bias
        return eager_with_bias(q, k, v, mask, scores=scores, dropout=kwargs["dropout"])

    def forward(
        self,
        hidden_states: Tensor,
        *,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_groups(self.query_key_value(hidden_states), self.groups, self.head_dim)
        if alibi is None:
            assert position_embeddings is not None
            q, k = stock.apply_rotary_pos_emb(q, k, *position_embeddings)
            kwargs["dropout"] = 0.0  # the stock module drops out only with ALiBi
        else:
            kwargs["dropout"] = self.attention_dropout.p if self.training else 0.0
            kwargs["position_bias"] = alibi.view(q.shape[0], self.num_heads, 1, -1) * self.inv_norm_factor
        k, v = update_cache(self, k, v, kwargs)
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.inv_norm_factor, output_attentions=output_attentions, **kwargs
        )
        return self.dense(out), weights


class GroupedFalcon(GroupedModelOutsideInterface):
    config_class = GroupedFalconConfig


class GroupedFalconModel(GroupedFalcon, stock.FalconModel):
    """The stock forward adds ALiBi to masks of one form only (and eager attention then adds it once more)."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = given_cache(cache, kwargs)
        hidden, cache = embed(self, self.word_embeddings, input_ids, inputs_embeds, cache, use_cache)
        position_ids = positions(position_ids, hidden, cache)
        mask = causal_mask(self.config, hidden, attention_mask, cache, position_ids=position_ids)
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids, "alibi": None}
        if self.use_alibi:
            arguments["alibi"] = self._alibi(hidden, attention_mask, cache)
        else:
            arguments["position_embeddings"] = self.rotary_emb(hidden, position_ids=position_ids)
        return run_blocks(
            self,
            self.h,
            hidden,
            self.ln_f,
            lambda i: arguments,
            cache=cache,
            cache_keyword=BLOCK_CACHE,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def _alibi(self, hidden: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
        """[B * HQ, 1, Sk]; positions count the real tokens of a row."""
        B, S = hidden.shape[:2]
        Sk = S if cache is None else cache.get_mask_sizes(S, 0)[0]  # the whole length of a static cache
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = hidden.new_ones((B, Sk), dtype=torch.long)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, max(0, Sk - attention_mask.shape[-1])))
        return stock.build_alibi_tensor(attention_mask, self.num_heads, dtype=hidden.dtype)


GroupedFalcon.replaced = {stock.FalconAttention: GroupedFalconAttention, stock.FalconModel: GroupedFalconModel}


class GroupedFalconForCausalLM(GroupedFalcon, stock.FalconForCausalLM): ...


class GroupedFalconForSequenceClassification(GroupedFalcon, stock.FalconForSequenceClassification): ...


class GroupedFalconForTokenClassification(GroupedFalcon, stock.FalconForTokenClassification): ...


class GroupedFalconForQuestionAnswering(GroupedFalcon, stock.FalconForQuestionAnswering): ...
