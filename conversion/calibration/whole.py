"""The method ``calibrated`` for causal language models that fit on the device: as a whole instead of layer by layer.

One pass of the original over some of the calibration text gives what every layer reads; heads are merged by that
(:mod:`hf_attn_patch.conversion.methods.align`); and on a GPU all attentions are then trained together for a minute to
say what the original says (:mod:`.polish`). Without a GPU the merge is all, for which a few thousand tokens do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.methods.aligned import Aligned
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.positions import positions_of
from hf_attn_patch.errors import ConversionError

from .copies import LONGEST, joined_rows, with_copies
from .joined import joined, merged_by, polished
from .layers import attention_name, layer_name
from .moments import Moments
from .polish import PolishRecipe, Speaker, losses, polish

#: tokens whose moments are taken: more say nothing new (3 % of these give the same merge within 0.07 nats)
MOMENT_TOKENS = 1 << 18
#: sequences held out of the polish, on which what was lost is measured
UNSEEN = 16


class Whole:
    """A merge of whole layers. ``record`` tells what it was calibrated on, and the loss on held-out text.

    Args:
        original: the source, on the device where everything runs.
        ids: calibration text [N, S].
        about, notes: what to record of it, and notes for the user.
        polish_tokens: of the last pass end to end; 0: none.
        start: merged attentions to begin with, by layer prefix, instead of a merge by the text's moments.
    """

    def __init__(
        self,
        plan: Plan,
        original: Any,
        ids: Tensor,
        about: dict[str, Any],
        notes: list[str],
        *,
        polish_tokens: int,
        group: str | None = None,
        start: Mapping[str, AttentionWeights] | None = None,
    ) -> None:
        self.plan, self.original, self.ids, self.tokens = plan, original, ids, polish_tokens
        current().require_same([ids], "calibration text")
        self.aligned = Aligned(plan, group or "adjacent")
        self.record = self.aligned.record | {"calibration": about, "refit": start is not None, "notes": notes}
        self.start = start
        self.done: dict[str, AttentionWeights] | None = None

    def __call__(self, weights: AttentionWeights) -> AttentionWeights:
        """The merged layer; all layers are made when the first is asked for."""
        if self.done is None:
            self.done = self._make()
        return self.done.pop(weights.layer.prefix)

    def _make(self) -> dict[str, AttentionWeights]:
        ids = self.ids
        unseen = min(UNSEEN, len(ids) // 8)
        held, known = (ids[:unseen], ids[unseen:]) if unseen else (ids, ids)
        merged = self._merged(known) if self.start is None else dict(self.start)
        student, own = joined(self.plan, self.original, merged)
        speakers = Speaker(self.original), Speaker(student)
        batch = self._batch(PolishRecipe.batch_tokens)
        self.record["held_out"] = {"tokens": held.numel(), "seen": not unseen} | losses(*speakers, held, batch)
        if not self.tokens or not unseen:
            return merged
        recipe = PolishRecipe(self.tokens, batch_tokens=batch * ids.shape[1], seed=self.plan.seed)
        layers = self._layers(self.original), self._layers(student)
        return polished(
            self.plan, self.record, merged, own, tokens=self.tokens, trained=own,
            train=lambda parameters: polish(*speakers, parameters, self._long(known), recipe, layers),
            measure=lambda: losses(*speakers, held, batch),
        )  # fmt: skip

    def _long(self, ids: Tensor) -> Tensor:
        """The calibration text as it is polished on: see :mod:`.copies`."""
        context = positions_of(self.plan.text_config) or LONGEST
        step = self._batch(PolishRecipe.batch_tokens) * ids.shape[1]  # what there is memory for
        rows = joined_rows(ids, min(LONGEST, context, step, self.tokens // PolishRecipe.STEPS))
        return with_copies(rows, self.plan.seed)

    def _layers(self, model: Any) -> list[nn.Module]:
        """The layers in which there is an attention, in order."""
        names = {layer_name(attention_name(model, layer)) for layer in self.plan.layers}
        return [model.get_submodule(n) for n in sorted(names, key=lambda n: int(n.rpartition(".")[2]))]

    def _batch(self, tokens: int) -> int:
        """Sequences of a step: about ``tokens``, fewer where a GPU has less room for what backward needs."""
        S = self.ids.shape[1]
        if self.original.device.type == "cuda":
            config = self.original.config.get_text_config()
            mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
            a_token = 2 * config.num_hidden_layers * (16 * config.hidden_size + 4 * mlp)
            tokens = min(tokens, int(0.4 * torch.cuda.mem_get_info()[0]) // a_token)
        return max(1, min(current().everybody(tokens)) // S)

    @torch.no_grad()
    def _merged(self, ids: Tensor) -> dict[str, AttentionWeights]:
        """Heads merged by the moments of what the original's layers read."""
        model, rows = self.original, ids[: max(1, MOMENT_TOKENS // ids.shape[1])]
        rows = rows[current().share(len(rows))]
        with contextlib.ExitStack() as stack:
            taken = [
                stack.enter_context(Moments(model.get_submodule(attention_name(model, u.layer)), u.layer))
                for u in self.plan.units
            ]
            body = getattr(model, model.base_model_prefix, model)
            blocks = [block for block in rows.split(self._batch(16384)) if len(block)]
            for block in progress_bar(blocks, desc="reading calibration text", unit="batch", leave=False):
                body(input_ids=block.to(model.device), use_cache=False)
        merged = {}
        pairs = list(zip(self.plan.units, taken, strict=True))
        for unit, moments in progress_bar(pairs, desc="merging", unit="layer"):
            merged[unit.layer.prefix] = merged_by(
                self.aligned, self.plan, unit, moments, model.device, self.record["notes"]
            )
        return merged


def on_device(model: Any, device: torch.device) -> Any:
    """The original where it runs: on a GPU in bf16, on the CPU in fp32 if it is stored in fp16.

    Raises:
        ConversionError: a GPU has no room for it.
    """
    size = sum(p.nbytes for p in model.parameters())
    if device.type != "cuda":
        return model.float() if model.dtype == torch.float16 else model
    dtype = torch.bfloat16 if model.dtype != torch.float64 else model.dtype
    if 2 * size > torch.cuda.mem_get_info(device)[0]:
        raise ConversionError(f"{size / 1e9:.1f} GB of weights are too large for {device} as a whole")
    return model.to(device, dtype)
