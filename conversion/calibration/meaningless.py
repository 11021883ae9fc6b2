"""The method ``aligned``: heads are merged by what layers read on inputs that mean nothing, drawn by a seed.

Of the weights alone every direction of a layer's inputs counts the same, and real inputs lie in few of them: on
SmolLM2-135M merging by the weights alone loses more than averaging does. Most of where a layer's inputs lie is made by
the model itself, whatever it reads: random ids through the original, once, tell enough for a merge that loses far less
than both (docs/results.md has the numbers).

Shapes: n rows of a layer's inputs, E model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_attn_patch.conversion.families.layer import LayerAttention, attribute
from hf_attn_patch.conversion.methods.aligned import Aligned
from hf_attn_patch.errors import ConversionError, one_line

from .layers import load, readers
from .moments import Sum

if TYPE_CHECKING:
    from hf_attn_patch.conversion.plan_data import Plan

#: sequences, and tokens of each (one is the decoder's beside an encoder); rows of a layer's inputs that are kept
ROWS, LENGTH, KEPT = 16, 64, 2048


class OnNoise(Aligned):
    """A merge by what each layer read, which is kept as it was read: much smaller than its second moments.

    Attributes:
        read: by layer prefix, the layer's own inputs [n, E] and, of cross-attention, what K and V read.
    """

    def __init__(self, plan: Plan, group: str) -> None:
        super().__init__(plan, group)
        self.read: dict[str, list[Tensor]] = {}

    def known(self, layer: LayerAttention) -> dict[str, Any]:
        found = []
        for rows in self.read.get(layer.prefix, ()):
            total = Sum()
            total.add(None, (rows,))
            found.append(total.result()[0])
        return dict(zip(("moment", "memory_moment"), found, strict=False))


def aligned(plan: Plan, group: str | None = None) -> Aligned:
    """Heads are merged in a common basis, found by what layers read on random inputs."""
    merge = OnNoise(plan, group or "adjacent")
    if not plan.units:
        return merge
    try:
        model = load(plan, on_text=False)
        with _reading(plan, model, merge.read):
            _run(plan, model)
            _run_parts(plan, model, merge.read)
    except ConversionError as error:
        merge.read.clear()
        merge.record["notes"].append(
            f"heads were merged by the weights alone, which may lose more than --method mean does: {error}"
        )
        return merge
    if "pictures" in plan.family.reads:
        merge.record["notes"].append("heads were merged by random pixels: --calibrate PICTURES keeps more")
    for prefix, rows in list(merge.read.items()):
        if not rows or not all(bool(x.isfinite().all()) for x in rows):
            del merge.read[prefix]
            why = "its inputs are not finite" if rows else "random inputs do not reach it"
            merge.record["notes"].append(f"{prefix.rstrip('.')}: {why}: merged by the weights alone")
    return merge


@contextlib.contextmanager
def _reading(plan: Plan, model: Any, read: dict[str, list[Tensor]]) -> Iterator[None]:
    """Meanwhile the first :data:`KEPT` rows that attentions read are kept."""

    def keeper(rows: list[Tensor], place: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(rows) == place:  # the first call alone: a decoder may be called again
                rows.append(args[0].detach().flatten(0, -2)[:KEPT].clone())

        return keep

    hooks = []
    try:
        for unit in plan.units:
            rows = read.setdefault(unit.layer.prefix, [])
            for place, module in enumerate(readers(model, plan, unit.layer)):
                hooks.append(module.register_forward_pre_hook(keeper(rows, place)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _run(plan: Plan, model: Any) -> None:
    """Send inputs that mean nothing through the original."""
    body = getattr(model, model.base_model_prefix, model)  # without a head, which may want more
    given = noise(plan, model)
    if plan.text_config is not plan.config and model.main_input_name != "input_ids":
        body, given = _alone(plan, model, given)
    send(body, given, "random inputs")


@torch.no_grad()
def _run_parts(plan: Plan, model: Any, read: dict[str, list[Tensor]]) -> None:
    """Send random ids through decoders that the model calls only while it generates (CSM's depth decoder)."""
    stacks = {unit.layer.stack for unit in plan.units if not read[unit.layer.prefix]}
    for name in sorted({stack.part for stack in stacks} - {""}):
        config = attribute(model.config, name)
        part = next(m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config)
        ids = _ids(config, ROWS, torch.Generator().manual_seed(plan.seed))
        send(part, {"input_ids": ids}, "random inputs")


def send(body: Any, given: dict[str, Tensor], what: str) -> None:
    """Run ``body``, a model or a part of one, on ``what`` is given.

    Raises:
        ConversionError: the model's own code cannot.
    """
    try:
        body(**given)
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise ConversionError(f"{type(body).__name__} cannot run on {what} ({said})") from None


def _ids(text: Any, rows: int, draw: torch.Generator) -> Tensor:
    """Random ids [rows, length] of a vocabulary; as many as its config has positions for."""
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    # RoBERTa's positions begin at 2; CSM's depth decoder has no head for its last one
    length = min([LENGTH, *(limit - 2 for limit in limits if limit)])
    return torch.randint(0, int(text.vocab_size), (rows, length), generator=draw)


def _alone(plan: Plan, model: Any, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The language model inside one that reads sound or pictures, and what it is given (BLIP-2, TrOCR's kind)."""
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
    body = next(m for m in parts if m.config.model_type == plan.model_type)
    ids = given["input_ids"]
    out = {"input_ids": ids}
    if body.config.is_encoder_decoder:
        out["decoder_input_ids"] = ids
    elif crossed := [layer for layer in plan.layers if layer.stack.cross]:
        draw = torch.Generator().manual_seed(plan.seed)
        out["encoder_hidden_states"] = torch.randn(*ids.shape, crossed[0].kv_width, generator=draw).to(body.dtype)
    return body, out


def noise(plan: Plan, model: Any) -> dict[str, Tensor]:
    """Random inputs for a model, by its plan's seed: ids, and where it reads them features or pixels."""
    draw = torch.Generator().manual_seed(plan.seed)
    config, reads = plan.config, plan.family.reads if plan.text_config is plan.config else "text"
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def ids(rows: int) -> Tensor:
        return _ids(config.get_text_config(), rows, draw)

    given: dict[str, Tensor] = {}
    if reads.startswith("text"):
        given["input_ids"] = ids(ROWS)
    if reads == "sound":  # few: each has thousands of frames
        given["input_features"] = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    if reads in ("pictures", "pictures and text"):
        inner = getattr(config, "vision_config", config)
        size = inner.image_size
        given["pixel_values"] = torch.randn(8, inner.num_channels, size, size, generator=draw)
    if reads == "pictures and text":
        given["input_ids"] = ids(8)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids(len(next(iter(given.values()))))
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
