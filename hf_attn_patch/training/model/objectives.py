"""What is minimised, as a module: a batch goes in, sums of losses come out.

A sharded or replicated model may only be used through its own forward, so everything that touches the student's
weights happens in ``Objective.forward``: hand the objective, not the model, to ``accelerator.prepare``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.torch import any_length
from hf_attn_patch.compat.transformers import attention_name, whole_blocks
from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import Head, LossSums, linear_loss
from hf_attn_patch.losses.output_head import head_matches, head_of
from hf_attn_patch.training.data.packing import PackedBatch

from .compiling import compile_layers
from .layerwise import layerwise_loss, tracing


@dataclass(frozen=True)
class LossWeights:
    """``ce * cross-entropy + kl * tau^2 * KL(teacher || student)``."""

    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


class Objective(nn.Module):
    """A student (or a teacher) together with the loss of its family.

    Subclasses say how to get from a batch to hidden states [T, E] that stand beside ``batch.labels`` flattened to [T].
    """

    #: whether batches have one shape, which makes faster code than any shape's
    one_shape = False

    def __init__(self, model: Any, weights: LossWeights | None = None) -> None:
        super().__init__()
        self.model = model
        self.weights = weights or LossWeights()
        # set by check(): a head that is more than a product is run as it is, and its logits stand whole
        self.own_logits = False
        self.compiled = False

    @property
    def _no_split_modules(self) -> list[str]:  # what FSDP wraps
        return sorted(whole_blocks(self.model))

    def tie_weights(self) -> None:
        self.model.tie_weights()

    def compile_layers(self) -> None:
        """torch.compile the model's layers, in place (see compiling.py)."""
        compile_layers(self.model, one_shape=self.one_shape)
        self.compiled = True

    def hidden(self, batch: Any) -> Tensor:
        """[T, E], or the logits [T, V] themselves where ``own_logits`` is set."""
        raise NotImplementedError

    def head(self) -> Head:
        """The model's head; call it after, or inside, a forward."""
        return Head(None) if self.own_logits else head_of(self.model)

    def loss(self, hidden: Tensor, batch: Any, told: tuple[Tensor, Head] | None) -> LossSums:
        """The sums over this batch; ``told`` is what the teacher's objective made of the same batch."""
        kl = self.weights.kl if told is not None else 0.0
        teacher_hidden, teacher_head = told or (None, None)
        return linear_loss(
            hidden, self.head(), batch.labels.reshape(-1),
            teacher_hidden=teacher_hidden, teacher_head=teacher_head,
            ce_weight=self.weights.ce, kl_weight=kl, temperature=self.weights.temperature,
        )  # fmt: skip

    def forward(
        self,
        batch: Any,
        told: Any = None,
        mode: Literal["loss", "hidden", "trace", "fit", "check"] = "loss",
    ) -> Any:
        """What ``mode`` asks for.

        ``loss``: LossSums, with what the teacher told (hidden states, head); ``hidden``: hidden states, which a
        teacher tells; ``trace``: a Trace, which a teacher tells for ``fit``: LossSums of attention outputs;
        ``check``: nothing, see there.
        """
        if mode == "check":
            return self.check(batch)
        if mode in ("trace", "fit"):
            with tracing(self.model, told) as trace:
                self.hidden(batch)
            return trace if told is None else layerwise_loss(trace, told, batch.labels)
        hidden = self.hidden(batch)
        return hidden if mode == "hidden" else self.loss(hidden, batch, told)

    def check_batch(self, device: torch.device) -> Any:
        """A small batch for ``check``."""
        raise NotImplementedError

    def check(self, batch: Any) -> None:
        """Try on a small batch what the loss relies on."""
        raise NotImplementedError


class CausalObjective(Objective):
    """Next-token prediction over packed documents.

    Args:
        packed: all documents of a batch in one row, borders told by positions and cu_seqlens; otherwise each
            document is a padded row of its own, for models that can't be told about borders.
    """

    def __init__(self, model: Any, weights: LossWeights | None = None, *, packed: bool = True) -> None:
        super().__init__(model, weights)
        self.packed = self.one_shape = packed
        body = getattr(model, model.base_model_prefix, model)
        names = inspect.signature(body.forward).parameters
        self._takes_positions = "position_ids" in names
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())

    def arguments(self, batch: PackedBatch) -> dict[str, Any]:
        """What tells the model about document borders: names that transformers' attention functions know."""
        arguments: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = batch.positions
        if self._takes_any:
            if self.compiled:  # any number of documents in one graph
                any_length(batch.cu_seqlens)
            arguments |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
            arguments |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
        return arguments

    def hidden(self, batch: PackedBatch) -> Tensor:
        body = self.model if self.own_logits else getattr(self.model, self.model.base_model_prefix)
        if self.packed:
            return body(**self.arguments(batch))[0].flatten(0, 1)
        ids, mask = as_rows(batch)
        return body(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0][mask]

    def check_batch(self, device: torch.device) -> PackedBatch:
        """Two short documents in one row."""
        ids = (torch.arange(16)[None] * 37 + 11) % self.model.config.get_text_config().vocab_size
        positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
        return PackedBatch(ids, ids.roll(-1, 1), positions, torch.tensor([0, 7, 16], dtype=torch.int32), 9).to(device)

    def check(self, batch: PackedBatch) -> None:
        """That no token sees a later one or another document, and that the head makes the model's own logits.

        Raises:
            TrainingError: tokens see what they are to predict, or documents of a packed row each other.
        """
        training, self.own_logits = self.model.training, False
        self.model.eval()
        with torch.no_grad():
            hidden = self.hidden(batch)
            border = int(batch.cu_seqlens[1])
            half = hidden.dtype is not torch.float32 or torch.is_autocast_enabled(hidden.device.type)
            if self._moved(batch, hidden, slice(-1, None), slice(border, -1)) > (1e-2 if half else 1e-4):
                raise TrainingError(
                    f"{self.model.config.name_or_path} ({type(self.model).__name__}) sees the words after a token, so "
                    "it cannot learn or teach to predict them: it is an encoder, or a decoder whose config.json does "
                    "not say is_decoder"
                )
            if self.packed:
                own = self.model(**self.arguments(batch))[0].flatten(0, 1)
                if self._moved(batch, hidden, slice(0, border), slice(border, None)) > 1e-3:
                    raise TrainingError(
                        f"{type(self.model).__name__} with attn_implementation "
                        f"{attention_name(self.model.config)!r} lets packed documents see each other; "
                        "use --attn-implementation hf_attn_patch, or --packed false"
                    )
            else:
                ids, mask = as_rows(batch)
                own = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0][mask]
            self.own_logits = not head_matches(hidden, head_of(self.model), own)
        self.model.train(training)

    def _moved(self, batch: PackedBatch, hidden: Tensor, changed: slice, seen: slice) -> float:
        """How far the hidden states of ``seen`` tokens move, for their size, where ``changed`` ones are others.

        The median: what sees the changed ones moves all tokens, while with experts a few move by rounding alone (sums
        in another order, and other experts where two are as good). A NaN is for the loss to report.
        """
        ids = batch.ids.clone()
        ids[:, changed] = (ids[:, changed] + 1) % self.model.config.get_text_config().vocab_size
        again = self.hidden(PackedBatch(ids, batch.labels, batch.positions, batch.cu_seqlens, batch.longest))
        return float(((hidden[seen] - again[seen]).norm(dim=-1) / hidden[seen].norm(dim=-1)).median())


def as_rows(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The documents of a packed batch as padded rows: ids [documents, longest] and which of them are real."""
    lengths = batch.cu_seqlens.diff()
    mask = torch.arange(batch.longest, device=lengths.device) < lengths[:, None]
    ids = batch.ids.new_zeros(mask.shape)
    ids[mask] = batch.ids[0]
    return ids, mask
