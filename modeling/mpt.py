"""MPT with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import MptConfig
from transformers.models.mpt import modeling_mpt as stock

from hf_attn_patch.compat.cache_keyword import keyword_of, update_cache

from .decoder import causal_mask, embed, given_cache, run_blocks
from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_heads,
)

BLOCK_CACHE = keyword_of(stock.MptBlock.forward)


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
        self.set_width("Wqkv", sum(self.sizes))

    def eager(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return eager_with_bias(q, k, v, mask, scaling=scaling, dropout=dropout, position_bias=position_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        *,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (split_heads(x, self.head_dim) for x in qkv.split(self.sizes, dim=-1))
        k, v = update_cache(self, k, v, kwargs)
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
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = given_cache(cache, kwargs)
        hidden, cache = embed(self, self.wte, input_ids, inputs_embeds, cache, use_cache)
        mask = causal_mask(self.config, hidden, attention_mask, cache)
        alibi = self.build_mpt_alibi_tensor(self.num_heads, self.config.max_seq_len, device=hidden.device)
        arguments = {"position_bias": alibi.to(hidden.dtype), "attention_mask": mask}
        return run_blocks(
            self,
            self.blocks,
            hidden,
            self.norm_f,
            lambda i: arguments,
            cache=cache,
            cache_keyword=BLOCK_CACHE,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


GroupedMpt.replaced = {stock.MptAttention: GroupedMptAttention, stock.MptModel: GroupedMptModel}


class GroupedMptForCausalLM(GroupedMpt, stock.MptForCausalLM): ...


class GroupedMptForSequenceClassification(GroupedMpt, stock.MptForSequenceClassification): ...


class GroupedMptForTokenClassification(GroupedMpt, stock.MptForTokenClassification): ...


class GroupedMptForQuestionAnswering(GroupedMpt, stock.MptForQuestionAnswering): ...
