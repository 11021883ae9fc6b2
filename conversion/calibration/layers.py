"""A model taken apart for the way through it layer by layer: its layers in order, what is in them, what they are given.

Shapes: N sequences of calibration text, S sequence, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.transformers import model_from_config
from hf_attn_patch.conversion.families.config import architectures
from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.families.layer_config import config_object
from hf_attn_patch.conversion.loadcheck import model_class_of, quiet
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.errors import ConversionError, one_line

from .refit import Arguments, Rows, layer_inputs, run_layer


@dataclass(frozen=True)
class Block:
    """A layer of the model: the original's module, the converted one's (without weights), the attentions in it.

    ``attentions``: each with the name of its module inside the layer.
    """

    original: nn.Module
    converted: nn.Module
    attentions: tuple[tuple[LayerAttention, str], ...]


@dataclass
class LayerStack:
    """A stack of layers that hidden states go through: a model has one, an encoder-decoder two.

    Attributes:
        run: sends what is read (ids [B, S], features, pixels) through the original's layers; a decoder also gets what
            it reads of the encoder.
        tail: what stands between the last layer and what reads this side's output.
        reads: whether this is a decoder that reads an encoder's output.
        hidden: what the first layer reads, [N, S, E]; ``seen``: what every layer reads for the first sequence.
        arguments: what else each layer is called with; :data:`MEMORY` stands for the encoder's output.
    """

    blocks: list[Block]
    run: Callable[..., object]
    tail: Callable[[Tensor], Tensor] = lambda x: x
    reads: bool = False
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: list[Arguments] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def look(self, ids: Tensor, memory: Tensor | None = None) -> None:
        """Fill in what the layers are called with for ``ids`` [N, S], or whatever else the side reads.

        Args:
            memory: the encoder's output for the first sequence, [1, S', E].
        """
        run = self.run if memory is None else lambda block: self.run(block, memory.expand(len(block), -1, -1))
        try:
            self.hidden, found, self.seen = layer_inputs(run, [b.original for b in self.blocks], ids)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # of the model's own code
            text = " ".join(str(error).split())[:150]
            raise ConversionError(
                f"the model cannot run on the calibration data ({type(error).__name__}: {text}); use --method aligned"
            ) from error
        self.arguments = [_marked(given, memory) for given in found]


#: by which layers hand keys and values on to others (Gemma 3n, Gemma 4): each gets an empty one, so that a layer that
#: reads another's says so instead of reading those of the wrong text
HANDED_ON = "shared_kv_states"


class _Memory:
    """Stands for the encoder's output among a layer's arguments."""


MEMORY = _Memory()


def _marked(value: Any, memory: Tensor | None) -> Any:
    """``value`` with :data:`MEMORY` in place of the encoder's output."""
    if isinstance(value, Tensor):
        return MEMORY if memory is not None and value.data_ptr() == memory.data_ptr() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_marked(v, memory) for v in value)
    if isinstance(value, dict):
        return {k: {} if k == HANDED_ON else _marked(v, memory) for k, v in value.items()}
    return value


def caller(arguments: Arguments, device: torch.device, memory: Tensor | None) -> Callable[[nn.Module], Any]:
    """From a layer to the function that :class:`~.refit.TwoStreams` runs: fp32, on ``device``, without a cache.

    Args:
        memory: the encoder's output for all sequences [N, S, E], if the layer reads it.
    """

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(move(v) for v in value)
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return value if isinstance(value, (int, float, str, bool, type(None), _Memory)) else None

    def filled(value: Any, rows: Rows) -> Any:
        if value is MEMORY and memory is not None:
            return memory[rows].to(device, torch.float32)
        if isinstance(value, (tuple, list)):
            return type(value)(filled(v, rows) for v in value)
        return {k: filled(v, rows) for k, v in value.items()} if isinstance(value, dict) else value

    moved = move(arguments)

    def run(layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
        try:
            return run_layer(layer, x.float(), filled(moved, rows))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            text = one_line(error)
            raise ConversionError(
                f"{type(layer).__name__} cannot be run by itself ({text}), so this model cannot be calibrated layer by "
                "layer: --no-refit --polish TOKENS takes a causal language model as a whole, --method aligned needs no "
                "text"
            ) from error

    return lambda layer: lambda x, rows: run(layer, x, rows)


def sides(plan: Plan, model: Any) -> list[LayerStack]:
    """The stacks of layers of a model, in the order in which text goes through them."""
    student = meta_model(plan)
    found: dict[str, list[tuple[LayerAttention, str]]] = {}
    for layer in plan.layers:
        name = attention_of(model, plan, layer)
        found.setdefault(layer_name(name), []).append((layer, name.removeprefix(layer_name(name) + ".")))
    # hybrids: text goes through the layers without attention too
    lists = {name.rpartition(".")[0] for name in found}
    names = [f"{path}.{i}" for path in lists for i in range(len(model.get_submodule(path)))]
    names.sort(key=lambda name: int(name.rpartition(".")[2]))
    blocks = {
        name: Block(model.get_submodule(name), student.get_submodule(name), tuple(found.get(name, ())))
        for name in names
    }
    if plan.family.reads == "pictures":
        return [LayerStack(list(blocks.values()), lambda pixels: model(pixel_values=as_read(pixels, model)))]
    if not plan.config.is_encoder_decoder:
        return [LayerStack(list(blocks.values()), lambda ids: model(input_ids=ids))]
    encoder, decoder = model.get_encoder(), model.get_decoder()
    inside = set(map(id, encoder.modules()))
    first = [b for b in blocks.values() if id(b.original) in inside]
    second = [b for b in blocks.values() if id(b.original) not in inside]
    around = [model.get_submodule(path.rpartition(".")[0]) for path in sorted(lists)]
    norms = [getattr(m, n, None) for m in around if id(m) in inside for n in ("final_layer_norm", "layer_norm", "norm")]
    norm: Any = next(filter(None, norms), lambda x: x)
    return [
        LayerStack(first, lambda given: encoder(as_read(given, encoder)), norm),
        LayerStack(second, lambda ids, memory: decoder(input_ids=ids, encoder_hidden_states=memory), reads=True),
    ]


def as_read(given: Tensor, model: nn.Module) -> Tensor:
    """Ids as they are; features and pixels in the model's dtype."""
    return given.to(next(model.parameters()).dtype) if given.is_floating_point() else given


def meta_model(plan: Plan) -> nn.Module:
    """The converted model without weights."""
    from transformers import AutoModel

    config = config_object(plan.new_config)
    config.use_cache = False
    model_class = model_class_of(plan.new_config, config)
    with torch.device("meta"), quiet():
        if model_class is None:
            return AutoModel.from_config(config)  # type: ignore[no-any-return]
        return model_from_config(model_class, config)  # type: ignore[no-any-return]


def attention_name(model: nn.Module, layer: Any) -> str:
    """The attention module of a layer: the model's name for what the checkpoint keeps under ``layer.prefix``."""
    local = (layer.stack.called or layer.stack.layer).format(i=layer.index).rstrip(".")
    prefix = layer.prefix.rstrip(".")
    found = [n for n, _ in model.named_modules() if n == local or n.endswith("." + local)]
    exact = [n for n in found if n == prefix or n.endswith("." + prefix) or prefix.endswith("." + n)] or found
    decoder: Any = getattr(model, "get_decoder", None)
    if len(exact) > 1 and callable(decoder):
        inside = {id(module) for module in decoder().modules()}  # not the towers beside the language model
        exact = [n for n in exact if id(model.get_submodule(n)) in inside]
    if len(exact) != 1:
        has = f"has {len(exact)} modules" if exact else "has another name than its checkpoint for"
        raise ConversionError(f"{type(model).__name__} {has} {local!r}; use --method aligned, which needs no text")
    return exact[0]


def attention_of(model: nn.Module, plan: Plan, layer: LayerAttention) -> str:
    """:func:`attention_name`, or where the model has other names than its checkpoint (ViT, in some versions), that of
    the module in which its queries are made."""
    try:
        return attention_name(model, layer)
    except ConversionError:
        if plan.family.reads != "pictures":
            raise
        (reader,) = readers(model, plan, layer)
        return next(name for name, m in model.named_modules() if m is reader).rpartition(".")[0]


def called(model: nn.Module, plan: Plan) -> dict[str, str]:
    """What the model calls the tensors of its attentions, inside these, by the checkpoint's names. Where it has others
    than that (ViT, in some versions), the modules are found by the weights in them."""
    found = {}
    for unit in plan.units:
        prefix = unit.layer.prefix
        for name in unit.reads:
            found[name] = name.removeprefix(prefix)
        if plan.family.reads != "pictures":
            continue
        attention = model.get_submodule(attention_of(model, plan, unit.layer))
        known = dict(attention.named_parameters())
        for name in unit.reads:
            module, _, part = found[name].rpartition(".")
            if found[name] not in known:
                weight = plan.source.read(f"{prefix}{module}.weight")
                found[name] = f"{next(n for n, m in attention.named_modules() if _holds(m, weight))}.{part}"
    return found


def readers(model: nn.Module, plan: Plan, layer: LayerAttention) -> list[nn.Module]:
    """The modules that read an attention's inputs, see :attr:`~.layer.LayerAttention.readers`.

    Found by the checkpoint's names, or where the model has others (ViT, in some versions) by the weights in them: all
    that make Q, or the first rows where only the checkpoint keeps Q, K and V as one (Sarvam, Molmo 2).
    """
    names = layer.readers
    try:
        attention = model.get_submodule(attention_name(model, layer))
        return [attention.get_submodule(name) for name in names]
    except (ConversionError, AttributeError) as error:
        found = []
        for name in names:
            weight = plan.source.read(layer.name(name))
            same = [m for m in model.modules() if _holds(m, weight)]
            if not same and name == names[0]:
                same = [m for m in model.modules() if _holds(m, weight[: layer.heads * layer.head_dim])]
            if len(same) != 1:
                raise ConversionError(f"no module of {type(model).__name__} holds {layer.name(name)} alone") from error
            found += same
        return found


def _holds(module: nn.Module, weight: Tensor) -> bool:
    own = getattr(module, "weight", None)
    return isinstance(own, Tensor) and own.shape == weight.shape and torch.equal(own, weight.to(own))


def load_by_names(plan: Plan) -> Any:
    """:func:`load`, for who goes by the checkpoint's names of tensors.

    Raises:
        ConversionError: the model calls those of its attentions otherwise (EXAONE, Sarvam).
    """
    model = load(plan)
    for unit in plan.units:
        attention = model.get_submodule(attention_name(model, unit.layer))
        known = {*dict(attention.named_parameters()), *dict(attention.named_buffers())}
        for name in unit.reads:
            if name.removeprefix(unit.layer.prefix) not in known:
                raise ConversionError(
                    f"{type(model).__name__} keeps {name!r} under another name than its checkpoint, so it cannot be "
                    "calibrated; use --method aligned"
                )
    return model


def layer_name(attention: str) -> str:
    """The layer that an attention module is in: its name up to the first number."""
    parts = attention.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def load(plan: Plan, *, on_text: bool = True) -> Any:
    """The original on the CPU, in its own dtype; ``on_text``: it is to read text, and must be able to.

    Where the result is of a class of ours, so is this: with all its heads that is the stock model, and its layers are
    called as the result's will be (GPT-Neo's stock layers, for one, know their window by themselves).
    """
    import transformers

    if not plan.source.folder.is_dir():
        raise ConversionError(f"{plan.source.name} is no longer there: it was moved or removed meanwhile")
    raw = dict(plan.source.config)
    becomes = plan.family.becomes if plan.text_config is plan.config else None  # the model around a part calls it as is
    if becomes and raw["model_type"] != becomes and "pictures" not in plan.family.reads:
        raw["model_type"] = becomes
        raw["architectures"] = [f"Grouped{name}" for name in architectures(raw)]
    config = config_object(raw)
    model_class = model_class_of(raw, config) or transformers.AutoModel
    with quiet():
        try:
            model = model_class.from_pretrained(plan.source.folder, config=config, dtype="auto")
        except Exception as error:  # whatever a model's constructor refuses
            raise ConversionError(f"{plan.source.name} cannot be loaded for calibration: {one_line(error)}") from None
    if on_text and model.main_input_name != "input_ids" and plan.family.reads == "text":
        raise ConversionError(f"{plan.model_type} reads {model.main_input_name}, no text; use --method aligned")
    model.config.use_cache = False
    return model.eval().requires_grad_(False)
