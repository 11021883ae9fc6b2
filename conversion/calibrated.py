"""The method ``calibrated``: merge heads by what the layers read on real text, then fit every layer to the original's.

The text goes up through the model layer by layer, once. Of each layer the moments of its inputs are summed, its heads
are merged with them (:mod:`.align`), and its attention is fitted to what the original layer gives (:mod:`.refit`)
before the next layer is looked at. One layer at a time is on the device, in fp32; the model itself stays on the CPU in
its own dtype, and so do two sets of hidden states, 2 * tokens * E numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .aligned import Aligned
from .calibration_text import calibration_ids
from .engine import from_heads, to_heads
from .errors import ConversionError
from .layouts import AttentionWeights
from .loadcheck import model_class_of, quiet
from .planner import Plan, Unit
from .refit import Arguments, RefitRecipe, TwoStreams, layer_inputs, run_layer

LENGTH, ENCODER_LENGTH = 1024, 128


class Calibrated:
    """A merge of whole layers, given in order. ``record`` tells what it was calibrated on and how well layers fit.

    Args:
        plan: of a model with one attention a layer that reads text.
        calibrate: a text file, JSONL, a folder, or the id of a data set.
        calibration_tokens: how many at most.
        calibration_length: of each sequence; by default 1024, of encoders 128, or what the model can read.
        refit: fit each layer's attention after the merge.
        group: see :class:`~hf_attn_patch.conversion.aligned.Aligned`.
        device: where layers run; a GPU if there is one.
    """

    def __init__(
        self,
        plan: Plan,
        calibrate: str | None,
        calibration_tokens: int = 500_000,
        calibration_length: int | None = None,
        refit: bool = True,
        group: str | None = None,
        device: str | None = None,
    ) -> None:
        refuse(plan)
        self.plan, self.refit = plan, refit
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.aligned = Aligned(plan, group or "adjacent")
        self.units = {unit.layer.prefix: unit for unit in plan.units}
        stack = plan.units[0].layer.stack
        self.layers = [layer for layer in plan.layers if layer.stack is stack]
        teacher = load(plan)
        ids, about, notes = calibration_ids(
            tokenizer_of(plan),
            str(calibrate),
            tokens=calibration_tokens,
            length=calibration_length or longest(plan, stack.causal),
            seed=plan.seed,
            whole=not stack.causal,
        )
        self.half = next(teacher.parameters()).dtype in (torch.float16, torch.bfloat16)
        attentions = [attention_name(teacher, layer) for layer in self.layers]
        self.modules = [owner(teacher, name) for name in attentions]
        self.inside = [name.removeprefix(layer_name(name) + ".") for name in attentions]
        hidden, self.arguments, self.seen = layer_inputs(teacher, self.modules, ids)
        self.streams = TwoStreams(
            hidden,
            RefitRecipe(seed=plan.seed),
            device=self.device,
            autocast=self.autocast,
            noise=1e-5 if self.half or self.device.type == "cuda" else 1e-10,
        )
        self.student_layers = student_layers(plan, self.layers)
        self.record = self.aligned.record | {"calibration": about, "refit": refit, "layers": {}, "notes": notes}
        if refit and not self.streams.unseen:
            notes.append("too little calibration text to fit layers on: heads were merged, and nothing was fitted")
        self.next = 0
        self.bar = tqdm(total=len(self.layers), desc="calibrating", unit="layer", disable=None)

    def autocast(self) -> Any:
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def __call__(self, weights: AttentionWeights) -> AttentionWeights:
        """The merged layer; layers below it that keep their heads are passed on the way."""
        while self.layers[self.next].prefix != weights.layer.prefix:
            self._pass(None)
        merged = self._pass(weights)
        if weights.layer.prefix == self.plan.units[-1].layer.prefix:
            self.bar.close()
        assert merged is not None
        return merged

    def _pass(self, weights: AttentionWeights | None) -> AttentionWeights | None:
        """Send both streams through the next layer, merged if ``weights`` are given."""
        number = self.next
        layer, streams = self.layers[number], self.streams
        truth = copy.deepcopy(self.modules[number]).to(self.device, torch.float32).eval().requires_grad_(False)
        given = moved(self.arguments[number], self.device)
        theirs: Callable[[Tensor], Tensor] = lambda x: run_layer(truth, x.float(), given)  # noqa: E731
        merged = None
        if weights is None:
            streams.original(theirs)
            streams.converted(theirs)
        else:
            with Moments(truth.get_submodule(self.inside[number]), layer) as moments:
                size = streams.original(theirs)
            self._check(number)
            merged = self._merge(weights, moments)
            unit = self.units[layer.prefix]
            student = self._student(number, truth, unit, merged)
            ours: Callable[[Tensor], Tensor] = lambda x: run_layer(student, x.float(), given)  # noqa: E731
            trained = self._trained(number, student, unit)
            if self.refit:
                before, after = streams.fit(ours, list(trained.values()), size)
                self.record["layers"][layer.prefix] = {"error": before, "refitted": after}
            for name, parameter in trained.items():  # what is stored is what the layers above shall build on
                stored = self.plan.source.read(name).dtype
                parameter.data = parameter.data.to(stored).float()
            streams.converted(ours)
            merged = self._heads(unit, trained, merged)
        self.next += 1
        self.bar.update()
        return merged

    def _check(self, number: int) -> None:
        """Layer by layer must be what the model itself does: some models do more between their layers."""
        if number + 1 >= len(self.seen):
            return
        want, got = self.seen[number + 1].float(), self.streams.theirs[:1].float()
        error = (want - got).norm() / want.norm().clamp_min(1e-30)
        if not error < (0.05 if self.half or self.device.type == "cuda" else 1e-3):
            raise ConversionError(
                f"{self.plan.model_type} cannot be calibrated layer by layer (what its layer {number} gives is not what"
                " the next one reads); use --method aligned"
            )

    def _merge(self, weights: AttentionWeights, moments: Moments) -> AttentionWeights:
        prefix = weights.layer.prefix
        moment, note = moments.result()
        if note:
            self.record["notes"].append(f"{prefix.rstrip('.')}: {note}")
        if moment is not None:
            self.aligned.moments[prefix] = moment
        merged = self.aligned(on(weights, self.device))
        self.aligned.moments.pop(prefix, None)
        return on(merged, torch.device("cpu"))

    def _student(self, number: int, truth: nn.Module, unit: Unit, merged: AttentionWeights) -> nn.Module:
        """The layer with fewer KV heads: the original's tensors, and the merged ones."""
        student = copy.deepcopy(self.student_layers[number]).to_empty(device=self.device).eval()
        inside, prefix = self.inside[number], unit.layer.prefix
        made = {f"{inside}.{n.removeprefix(prefix)}": t for n, t in from_heads(unit, merged).items()}
        known = dict(truth.named_parameters()) | dict(truth.named_buffers())
        with torch.no_grad():
            for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
                tensor.data = made.get(name, known[name]).detach().to(self.device, tensor.dtype).clone()
        return student.float().requires_grad_(False)

    def _trained(self, number: int, student: nn.Module, unit: Unit) -> dict[str, nn.Parameter]:
        """By their names in the checkpoint, the parameters of the student's layer that the unit writes."""
        inside, prefix = self.inside[number], unit.layer.prefix
        out = {n: student.get_parameter(f"{inside}.{n.removeprefix(prefix)}") for n in unit.writes}
        for parameter in out.values():
            parameter.requires_grad_(True)
        return out

    def _heads(self, unit: Unit, trained: dict[str, nn.Parameter], like: AttentionWeights) -> AttentionWeights:
        layer = unit.layer
        done = replace(
            unit,
            layer=replace(layer, kv_heads=layer.new_kv_heads),
            projections=layer.stack.written or layer.stack.projections,
        )
        found = to_heads(done, {name: p.detach().cpu() for name, p in trained.items()})
        return replace(found, layer=like.layer)


class Moments:
    """Sums of x x^T over what the attention of a layer reads, x extended by a constant 1."""

    def __init__(self, attention: nn.Module, layer: Any) -> None:
        module = next(p.module for p in layer.stack.projections if "q" in p.holds)
        self.projection = attention.get_submodule(module)
        self.sum: Tensor | None = None
        self.rows = self.broken = 0

    def __enter__(self) -> Moments:
        self.hook = self.projection.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()

    def _add(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        fine = x.isfinite().all(-1)
        self.rows, self.broken = self.rows + len(x), self.broken + int((~fine).sum())
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)[fine]
        with torch.autocast(x.device.type, enabled=False):
            part = (x.T @ x).double().cpu()
        self.sum = part if self.sum is None else self.sum + part

    def result(self) -> tuple[Tensor | None, str | None]:
        """E[x x^T] [E + 1, E + 1] (None: use the weights alone), and what had to be done to it."""
        count = self.rows - self.broken
        if self.sum is None or count == 0 or not self.sum.isfinite().all():
            return None, "its inputs are not finite: merged by the weights alone"
        moment = self.sum / count
        notes = [f"{self.broken} of {self.rows} inputs are not finite and were left out"] if self.broken else []
        E = len(moment) - 1
        values = torch.linalg.eigvalsh(moment)
        rank = int((values > values[-1] * 1e-9).sum())
        if rank < E:  # LayerNorm alone takes one away
            # directions that the text does not have still count a little
            share = max(1e-3, E / (E + count))
            mean = moment.diagonal()[:-1].mean()
            plain = torch.cat([torch.full((E,), float(mean), dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
            moment = (1 - share) * moment + share * plain.diag()
            notes.append(f"second moment of rank {rank} of {E + 1}: mixed with {share:.1%} of the identity")
        return moment, "; ".join(notes) or None


def calibrated(plan: Plan, **options: Any) -> Calibrated:
    """Heads are merged by what layers read on a calibration text, and layers fitted to the original's on it."""
    return Calibrated(plan, **options)


def refuse(plan: Plan) -> None:
    """Raise for what cannot be calibrated on text."""
    stacks = {unit.layer.stack.name for unit in plan.units}
    if len(stacks) > 1 or any(unit.layer.stack.cross for unit in plan.units) or plan.config.is_encoder_decoder:
        raise ConversionError(
            f"{plan.model_type} has several attentions ({', '.join(sorted(stacks))}), which cannot be calibrated; "
            "use --method aligned"
        )
    if plan.text_config is not plan.config:
        raise ConversionError(
            f"{plan.model_type} is part of a larger model, which cannot be calibrated on text; use --method aligned"
        )
    if any(unit.layer.stack.no_rope_layers == "alibi" and unit.layer.fixed_heads for unit in plan.units):
        raise ConversionError(f"{plan.model_type} with ALiBi cannot be calibrated; use --method aligned")


def load(plan: Plan) -> Any:
    """The original on the CPU, in its own dtype."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(plan.source.folder)
    model_class = model_class_of(plan.source.config, config) or transformers.AutoModel
    with quiet():
        try:
            model = model_class.from_pretrained(plan.source.folder, dtype="auto")
        except Exception as error:  # whatever a model's constructor refuses
            text = " ".join(str(error).split())[:300]
            raise ConversionError(f"{plan.source.name} cannot be loaded for calibration: {text}") from None
    if model.main_input_name != "input_ids":
        raise ConversionError(f"{plan.model_type} reads {model.main_input_name}, no text; use --method aligned")
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def student_layers(plan: Plan, layers: list[Any]) -> list[nn.Module]:
    """The layers of the converted model, without weights (on the meta device)."""
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[plan.new_config["model_type"]].from_dict(dict(plan.new_config))
    config.use_cache = False
    model_class = model_class_of(plan.new_config, config)
    with torch.device("meta"), quiet():
        model = AutoModel.from_config(config) if model_class is None else model_class._from_config(config)
    return [owner(model, attention_name(model, layer)) for layer in layers]


def tokenizer_of(plan: Plan) -> Any:
    from hf_attn_patch.training.errors import TrainingError
    from hf_attn_patch.training.models import load_tokenizer

    try:
        return load_tokenizer(str(plan.source.folder))
    except TrainingError as error:
        raise ConversionError(f"--calibrate: {error}; put the tokenizer's files beside the weights") from None


def longest(plan: Plan, causal: bool) -> int:
    """The length of calibration sequences: what the model can read, at most 1024 (encoders: 128)."""
    limit = getattr(plan.text_config, "max_position_embeddings", None) or LENGTH
    return min(LENGTH if causal else ENCODER_LENGTH, max(2, int(limit) - 2))


def attention_name(model: nn.Module, layer: Any) -> str:
    """The attention module of a layer: the model's name for what the checkpoint keeps under ``layer.prefix``."""
    local = layer.stack.layer.format(i=layer.index).rstrip(".")
    prefix = layer.prefix.rstrip(".")
    found = [n for n, _ in model.named_modules() if n == local or n.endswith("." + local)]
    exact = [n for n in found if n == prefix or n.endswith("." + prefix) or prefix.endswith("." + n)] or found
    if len(exact) != 1:
        raise ConversionError(
            f"{type(model).__name__} has {len(exact)} modules {local!r}; use --method aligned, which needs no text"
        )
    return exact[0]


def layer_name(attention: str) -> str:
    """The layer that an attention module is in: its name up to the first number."""
    parts = attention.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def owner(model: nn.Module, attention: str) -> nn.Module:
    return model.get_submodule(layer_name(attention))


def moved(arguments: Arguments, device: torch.device) -> Arguments:
    """Arguments of a layer on its device, in fp32 where they are floats, and without a cache."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(move(v) for v in value)
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return value if isinstance(value, (int, float, str, bool, type(None))) else None

    return move(arguments[0]), move(arguments[1])


def on(weights: AttentionWeights, device: torch.device) -> AttentionWeights:
    tensors = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return replace(weights, **{n: t.to(device) for n, t in tensors.items() if isinstance(t, Tensor)})
