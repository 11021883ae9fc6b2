"""The method ``calibrated``: merge heads by what the layers read on real text, then fit every layer to the original's.

The text goes up through the model layer by layer, once. Of each layer the moments of its inputs are summed, its heads
are merged with them (:mod:`.align`), and its attention is fitted to what the original layer gives (:mod:`.refit`)
before the next layer is looked at. One layer at a time is on the device, in fp32; the model itself stays in its
mapped file, and on the CPU are two sets of hidden states, 2 * tokens * E numbers, unless a GPU has plenty of room.

An encoder-decoder goes the same way: first the encoder, then the decoder, whose two attentions are fitted together and
whose cross-attention reads the encoder's output, the original's or the converted one's.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.methods.aligned import Aligned
from hf_attn_patch.conversion.methods.apply import from_heads
from hf_attn_patch.conversion.plan_data import Plan, Unit
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.errors import ConversionError

from .joined import heads_of, merged_by
from .layers import Block, LayerStack, called, caller, sides
from .moments import Moments
from .refit import LayerFunction, RefitRecipe, Rows, TwoStreams
from .samples import Samples


class Calibrated:
    """A merge of whole layers. ``record`` tells what it was calibrated on and how well layers fit.

    Made, it has done nothing yet; :meth:`prepare` looks at what the first layer reads; to ask for a layer is to run it.
    Layers are gone through in the model's order, whichever is asked for first; what came out on the way is kept.

    Args:
        plan: of a model that can be calibrated, see :func:`refuse`.
        original: the source, as :func:`~.layers.load` gives it.
        samples: what is calibrated on.
        refit: fit each layer's attention after the merge.
        group: see :class:`~hf_attn_patch.conversion.methods.aligned.Aligned`.
        device: where layers run.
    """

    def __init__(
        self,
        plan: Plan,
        original: Any,
        samples: Samples,
        *,
        refit: bool = True,
        group: str | None = None,
        device: torch.device,
    ) -> None:
        self.plan, self.original, self.samples, self.refit, self.device = plan, original, samples, refit, device
        current().require_same(samples.inputs, "calibration samples")
        self.aligned = Aligned(plan, group or "adjacent")
        self.units = {unit.layer.prefix: unit for unit in plan.units}
        self.half = next(self.original.parameters()).dtype in (torch.float16, torch.bfloat16)
        self.sides = sides(plan, self.original)
        self.called = called(self.original, plan)
        notes = [*self.aligned.record["notes"], *samples.notes]
        self.record: dict[str, Any] = self.aligned.record | {
            "calibration": samples.about, "refit": refit, "layers": {}, "notes": notes
        }  # fmt: skip
        self.side = self.number = -1
        self.memory: tuple[Tensor | None, Tensor | None] = (None, None)
        self.done: dict[str, AttentionWeights] = {}
        self.streams: TwoStreams  # of the side that is gone through
        self.bar: Any = None  # while layers are passed

    def prepare(self) -> None:
        """See what the first layer reads, so that what cannot be calibrated is known before anything is written. Twice
        is once.

        Raises:
            ConversionError: the model's embeddings of all samples are not finite.
        """
        if self.side >= 0:
            return
        known = self.samples.memory
        if known is not None and not any(self._units(block) for block in self.sides[0].blocks):
            self.side, self.memory = 0, (known, known)  # the encoder is the original's
        self._begin()
        if self.refit and not self.streams.unseen:
            self.record["notes"].append(
                "too few calibration samples to fit layers on: heads were merged, and nothing was fitted"
            )

    def autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def __call__(self, weights: AttentionWeights) -> AttentionWeights:
        """The merged layer; the layers below it are passed on the way."""
        prefix = weights.layer.prefix
        while prefix not in self.done:
            self.step()
        if self.bar.n == self.bar.total:
            self.bar.close()
        return self.done.pop(prefix)

    def all(self) -> dict[str, AttentionWeights]:
        """All merged layers, by prefix."""
        while len(self.done) < len(self.units):
            self.step()
        self.bar.close()
        return self.done

    def step(self) -> None:
        """Send both streams through the next layer."""
        self.prepare()
        if self.bar is None:  # an encoder that is the original's is behind us
            passed = sum(len(side.blocks) for side in self.sides[: self.side])
            self.bar = progress_bar(total=self._count(), desc="calibrating", unit="layer", initial=passed)
        try:
            if self.number == len(self._current.blocks):
                self._finish()
                self._begin()
            self._pass()
        except BaseException:
            self.close()
            raise
        self.number += 1
        self.bar.update()

    def close(self) -> None:
        """No layer will be passed any more: say nothing more of it."""
        if self.bar is not None:
            self.bar.close()

    def _count(self) -> int:
        """How many layers have to be passed: those above the last one that changes need not be."""
        blocks = [block for side in self.sides for block in side.blocks]
        return 1 + max(i for i, block in enumerate(blocks) if self._units(block))

    def _units(self, block: Block) -> list[tuple[Unit, str]]:
        """What changes in a layer, and the attention's name in it."""
        return [(self.units[a.prefix], inside) for a, inside in block.attentions if a.prefix in self.units]

    def _begin(self) -> None:
        """Begin with the next side: the first, or after an encoder the decoder."""
        self.side, self.number = self.side + 1, 0
        self._look()
        theirs, ours = self.memory
        self.streams = TwoStreams(
            self._placed(self._current.hidden),
            RefitRecipe(seed=self.plan.seed),
            device=self.device,
            autocast=self.autocast,
            noise=1e-5 if self.half or self.device.type == "cuda" else 1e-10,
            kept=self.samples.kept if self.side == len(self.sides) - 1 else None,
            reads=0 if theirs is None else theirs.shape[1],
            together=theirs is ours,
        )

    def _finish(self) -> None:
        """What this side gives to the next."""
        streams = self.streams
        theirs = self._end(streams.theirs)
        self.memory = (theirs, theirs if streams.ours is streams.theirs else self._end(streams.ours))

    def heard(self) -> tuple[Tensor, Tensor]:
        """What a decoder reads of its encoder, the original's and the converted one's, [N, S, E] each."""
        self.prepare()
        while self.side == 0 and self.number < len(self._current.blocks):
            self.step()
        if self.side == 0:
            self._finish()
        theirs, ours = self.memory
        assert theirs is not None and ours is not None
        return theirs, ours

    @torch.no_grad()
    def _end(self, stream: Tensor) -> Tensor:
        """What a side gives to those that read it."""
        like: Tensor = next(self._current.blocks[0].original.parameters())
        return torch.cat([self._current.tail(x.to("cpu", like.dtype)).to(x) for x in stream.split(16)])

    def _look(self) -> None:
        """See what this side's first layer reads; sequences for which that is not finite are left out."""
        side = self._current
        for _ in range(2):
            theirs, like = self.memory[0], next(side.blocks[0].original.parameters())
            side.look(self.samples.inputs[self.side], None if theirs is None else theirs[:1].to("cpu", like.dtype))
            fine = side.hidden.isfinite().flatten(1).all(1)
            if fine.all():
                return
            if not fine.any():
                break
            self.record["notes"].append(
                f"{int((~fine).sum())} of {len(fine)} calibration samples were left out: what the model's"
                " layers read there is not finite"
            )
            self.samples = self.samples.only(fine)
            same = self.memory[0] is self.memory[1]
            theirs, ours = ((None if x is None else x[fine.to(x.device)]) for x in self.memory)
            self.memory = (theirs, theirs if same else ours)
        raise ConversionError(
            f"{self.plan.source.name}: its embeddings are not finite; nothing can be calibrated on it"
        )

    @property
    def _current(self) -> LayerStack:
        return self.sides[self.side]

    def _placed(self, hidden: Tensor) -> Tensor:
        """On a GPU that has plenty of room for two such streams they stay there."""
        if self.device.type == "cuda" and 6 * hidden.nbytes < torch.cuda.mem_get_info(self.device)[0]:
            return hidden.to(self.device)
        return hidden

    def _pass(self) -> None:
        """Both streams through the next layer; its merged attentions are kept, if it has any."""
        block, streams = self._current.blocks[self.number], self.streams
        units = self._units(block)
        truth, theirs, own = self._open(block)
        if not units:
            apart = streams.ours is not streams.theirs
            self._check(streams.original(theirs))
            if apart:
                streams.converted(own(truth))
        else:
            streams.part()
            with contextlib.ExitStack() as stack:
                moments = [
                    stack.enter_context(Moments(truth.get_submodule(name), u.layer, self.called)) for u, name in units
                ]
                size = streams.original(self._counting(theirs, moments))
            self._check(size)
            merged = [self._merge(unit, m) for (unit, _), m in zip(units, moments, strict=True)]
            student = self._student(block, truth, units, merged)
            ours: LayerFunction = own(student)
            trained = {n: p for unit, name in units for n, p in self._trained(student, unit, name).items()}
            if self.refit:
                before, after = streams.fit(ours, list(trained.values()), size)
                self.record["layers"].update({u.layer.prefix: {"error": before, "refitted": after} for u, _ in units})
            for name, parameter in trained.items():  # what is stored is what the layers above shall build on
                stored = self.plan.source.read(name).dtype
                parameter.data = parameter.data.to(stored).float()
            streams.converted(ours)
            for (unit, _), weights in zip(units, merged, strict=True):
                self.done[unit.layer.prefix] = heads_of(unit, trained, weights)

    def _counting(self, layer: LayerFunction, moments: list[Moments]) -> LayerFunction:
        """``layer``, of whose inputs only those that are more than padding are counted."""
        kept = self.streams.kept

        def run(hidden: Tensor, rows: Rows) -> Tensor:
            for found in moments:
                found.count_only(None if kept is None else kept[rows])
            return layer(hidden, rows)

        return run

    def _open(self, block: Block) -> tuple[nn.Module, LayerFunction, Callable[[nn.Module], LayerFunction]]:
        """The original's layer on the device in fp32; what runs it; and what makes the same of a converted layer."""
        truth = copy.deepcopy(block.original).to(self.device, torch.float32).eval().requires_grad_(False)
        given = self._current.arguments[self.number]
        return truth, caller(given, self.device, self.memory[0])(truth), caller(given, self.device, self.memory[1])

    def _check(self, size: float) -> None:
        """Layer by layer must be what the model itself does: some models do more between their layers."""
        number, seen = self.number, self._current.seen
        if not math.isfinite(size):
            raise ConversionError(
                f"{self.plan.source.name} cannot be calibrated: what its layer {number} gives on the text is not"
                " finite; use --method aligned"
            )
        if number + 1 >= len(seen):
            return
        want, got = seen[number + 1].float(), self.streams.theirs[:1].float().cpu()
        error = (want - got).norm() / want.norm().clamp_min(1e-30)
        if not error < (0.05 if self.half or self.device.type == "cuda" else 1e-3):
            raise ConversionError(
                f"{self.plan.model_type} cannot be calibrated layer by layer (what its layer {number} gives is not what"
                " the next one reads); use --method aligned"
            )

    def _merge(self, unit: Unit, moments: Moments) -> AttentionWeights:
        return merged_by(self.aligned, self.plan, unit, moments, self.device, self.record["notes"])

    def _student(
        self, block: Block, truth: nn.Module, units: list[tuple[Unit, str]], merged: list[AttentionWeights]
    ) -> nn.Module:
        """The layer with fewer KV heads: the original's tensors, and the merged ones."""
        student = copy.deepcopy(block.converted).to_empty(device=self.device).eval()
        known = dict(truth.named_parameters()) | dict(truth.named_buffers())
        for (unit, inside), weights in zip(units, merged, strict=True):
            known |= {f"{inside}.{self.called[n]}": t for n, t in from_heads(unit, weights).items()}
        with torch.no_grad():
            for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
                tensor.data = known[name].detach().to(self.device, tensor.dtype).clone()
        return student.float().requires_grad_(False)

    def _trained(self, student: nn.Module, unit: Unit, inside: str) -> dict[str, nn.Parameter]:
        """By their names in the checkpoint, the parameters of the student's layer that the unit writes."""
        out = {n: student.get_parameter(f"{inside}.{self.called[n]}") for n in unit.writes}
        for parameter in out.values():
            parameter.requires_grad_(True)
        return out


def refuse(plan: Plan) -> None:
    """Raise for what cannot be calibrated on text."""
    if "codes" in plan.family.reads:
        raise ConversionError(
            f"{plan.model_type} reads {plan.family.reads}, which nothing here makes: it cannot be calibrated; use "
            "--method aligned"
        )
    if plan.family.reads not in ("text", "sound", "pictures"):
        raise ConversionError(f"{plan.model_type} reads {plan.family.reads}: give some with --calibrate")
    stacks = {unit.layer.stack.name for unit in plan.units}
    cross = any(unit.layer.stack.cross for unit in plan.units)
    if not plan.config.is_encoder_decoder and (len(stacks) > 1 or cross):
        raise ConversionError(
            f"{plan.model_type} has several attentions ({', '.join(sorted(stacks))}), which cannot be calibrated; "
            "use --method aligned"
        )
    if plan.text_config is not plan.config and (plan.family.becomes or not plan.units[0].layer.stack.causal):
        raise ConversionError(
            f"{plan.model_type} is part of a larger model, which cannot be calibrated on text; use --method aligned"
        )
    alibi = any(unit.layer.stack.no_rope_layers == "alibi" and unit.layer.fixed_heads for unit in plan.units)
    if alibi or plan.model_type.endswith("bloom"):  # their layers are given slopes that are as long as the batch
        raise ConversionError(f"{plan.model_type} with ALiBi cannot be calibrated; use --method aligned")
