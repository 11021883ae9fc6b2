"""Sequence-to-sequence models and encoders: batches padded to their longest, masks instead of borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.documents.positions import start_of
from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE, Head, LossSums
from hf_attn_patch.losses.output_head import head_matches, head_of
from hf_attn_patch.training.data.chunks import PaddedBatch

from .objectives import LossWeights, Objective


class Seq2SeqObjective(Objective):
    """Cross-entropy and KL at the decoder's output."""

    def hidden(self, batch: PaddedBatch) -> Tensor:
        decoder_ids = shift_right(batch.labels, self.model.config)
        mask = batch.mask.long()
        if self.own_logits:
            return self.model(
                input_ids=batch.ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
            ).logits.flatten(0, 1)
        encoded = self.model.get_encoder()(input_ids=batch.ids, attention_mask=mask)[0]
        # the decoder is causal and padded on the right: no real token sees a padded one
        return self.model.get_decoder()(
            input_ids=decoder_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False
        )[0].flatten(0, 1)

    def check_batch(self, device: torch.device) -> PaddedBatch:
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        ids = (torch.arange(18).reshape(2, 9) * 37 + 11) % vocabulary
        mask = torch.arange(9) < torch.tensor([[9], [6]])
        return PaddedBatch(ids, mask, ids[:, :5].clone()).to(device)

    def check(self, batch: PaddedBatch) -> None:
        """That the head makes the model's own logits."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.own_logits = False
            hidden = self.hidden(batch)
            self.own_logits = True
            own = self.hidden(batch)
        self.own_logits = not head_matches(hidden, head_of(self.model), own)
        self.model.train(training)


class EncoderObjective(Objective):
    """Distillation of embeddings: each token's, and the mean over a text, which is what retrieval uses.

    Sums over tokens: ``ce`` holds |s - t|^2 / |t|^2 of token embeddings, ``kl`` the cosine distance of the texts'
    mean embeddings (each counted for every token of its text); the loss is their sum.

    Weights that embeddings don't come through (a pooler, a head) are frozen: DDP would wait for their gradients, and
    DeepSpeed would decay them.
    """

    def __init__(self, model: Any, weights: LossWeights | None = None) -> None:
        super().__init__(model, weights)
        trained = [p for p in model.parameters() if p.requires_grad]
        if trained:
            hidden = self.hidden(self.check_batch(trained[0].device))
            gradients = torch.autograd.grad(hidden.sum(), trained, allow_unused=True)
            for weight, gradient in zip(trained, gradients, strict=True):
                weight.requires_grad_(gradient is not None)

    def hidden(self, batch: PaddedBatch) -> Tensor:
        body = getattr(self.model, self.model.base_model_prefix, self.model)
        return body(input_ids=batch.ids, attention_mask=batch.mask.long())[0]

    def head(self) -> Head:
        return Head(None)

    def loss(self, hidden: Tensor, batch: PaddedBatch, told: tuple[Tensor, Head] | None) -> LossSums:
        if told is None:
            raise TrainingError("encoders are uptrained by distilling embeddings: give the --teacher")
        s, t = hidden.float(), told[0].float()
        if s.shape != t.shape:
            raise TrainingError(f"the teacher's embeddings have {t.shape[-1]} numbers, the student's {s.shape[-1]}")
        real = batch.labels != IGNORE
        tokens = ((s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12) * real).sum()
        share = real.float()[..., None]
        means = [(x * share).sum(1) / share.sum(1) for x in (s, t)]
        texts = ((1 - F.cosine_similarity(means[0], means[1], dim=-1)) * real.sum(1)).sum()
        return LossSums(tokens + texts, tokens.detach(), texts.detach(), real.sum().float())

    def check_batch(self, device: torch.device) -> PaddedBatch:
        ids = torch.arange(6).reshape(2, 3)
        return PaddedBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)).to(device)

    def check(self, batch: PaddedBatch) -> None:
        """Nothing to try: there are neither borders nor a head."""


def shift_right(labels: Tensor, config: Any) -> Tensor:
    """The decoder's input [B, St]: its start token, then the labels but the last."""
    start = start_of(config)
    if start is None:
        raise TrainingError("the model's config has no decoder_start_token_id; set it and save the config")
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    shifted = labels.roll(1, -1).masked_fill(labels.roll(1, -1) == IGNORE, pad)
    shifted[:, 0] = start
    return shifted
