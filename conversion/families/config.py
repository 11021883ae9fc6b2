"""From config.json to the language model's numbers, through transformers' own config classes (defaults included)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_attn_patch.documents.stranger_json import check_config_limits
from hf_attn_patch.errors import ConversionError, one_line
from hf_attn_patch.hf.auto_classes import PREFIX

from .kv_field import KVField
from .layer import LayerAttention, attribute, stack_layers
from .layer_config import config_object
from .table import TEXT_PREFIXES, Family, Stack, family_of, supported

Stacks = list[tuple[Stack, list[LayerAttention]]]


class Layout(NamedTuple):
    """A way in which checkpoints of a family may keep its attentions."""

    prefixes: tuple[str, ...]
    stacks: Stacks


@dataclass
class LanguageModel:
    """The part of a model whose KV heads are converted.

    ``path``: the keys that lead from the top of config.json to this part's own config (empty: the top itself).
    ``stacks``, and ``prefix``, which stands before the layers' names in the checkpoint: known after :meth:`locate`.
    """

    family: Family
    model_type: str
    config: Any
    text_config: Any
    path: tuple[str, ...]
    layouts: list[Layout]
    prefix: str = ""
    stacks: Stacks = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def locate(self, names: Collection[str]) -> None:
        """Find the layout and the prefix of this checkpoint's layers, and put the prefix before every layer's names."""
        for prefixes, stacks in self.layouts:
            for prefix in prefixes:
                found = [_has(names, prefix, layers if stack.sparse else layers[:1]) for stack, layers in stacks]
                if any(found):
                    self._take(names, prefix, stacks, found)
                    return
        prefixes, stacks = self.layouts[0]
        first = stacks[0][1][0]
        wanted = first.prefix + first.stack.projections[0].module + ".weight"
        near = next((name.removesuffix(wanted) for name in names if name.endswith(f".{wanted}")), None)
        if near and self.text_config is self.config:
            raise ConversionError(
                f"{self.model_type} keeps its tensors under {' or '.join(map(repr, prefixes))}, this checkpoint under"
                f" {near!r}: rename them, or save the model from inside what it was wrapped in"
            )
        raise ConversionError(
            f"the checkpoint has no tensor {wanted!r} (under {', '.join(map(repr, dict.fromkeys(prefixes)))}), "
            f"where {self.model_type} keeps it; where transformers loads it from other names, "
            "model.save_pretrained(folder, save_original_format=False) gives a checkpoint with these (of ViT and "
            "Sarvam without that option)"
        )

    def _take(self, names: Collection[str], prefix: str, stacks: Stacks, found: list[bool]) -> None:
        self.prefix = prefix
        self.stacks = [
            (
                stack,
                [
                    replace(layer, prefix=self.prefix + layer.prefix)
                    for layer in layers
                    if not stack.sparse or _has(names, self.prefix, [layer], "k")
                ],
            )
            for (stack, layers), here in zip(stacks, found, strict=True)
            if here or not stack.optional
        ]
        if not any(layers for _, layers in self.stacks):
            raise ConversionError(
                f"no layer of this {self.model_type} makes keys and values, so there are no KV heads to merge; a model "
                "that drafts for another one reads that one's: convert that one"
            )

    def write_kv_heads(self, raw: dict[str, Any], layers: list[LayerAttention]) -> None:
        """Change ``raw`` (a copy of config.json) so that it describes ``layers``."""
        raw.pop("auto_map", None)  # the code that it names does not come along
        if not any(layer.changes for layer in layers):
            return
        part = part_of(raw, self.path)
        self._refuse_one_field_for_two(layers)
        for stack, _ in self.stacks:
            own = [layer for layer in layers if layer.stack is stack]
            if any(layer.changes for layer in own) or self.family.becomes:
                write_numbers(stack, part, self.text_config, own)
        if self.family.becomes:
            part["model_type"] = self.family.becomes
            part["architectures"] = [f"Grouped{n.removeprefix('Grouped')}" for n in architectures(part)]

    def _refuse_one_field_for_two(self, layers: list[LayerAttention]) -> None:
        """Raise where attentions that share a field of the config (Llama 3.2 Vision's) would have different numbers."""
        shared: dict[tuple[str, KVField], dict[str, set[int]]] = {}
        for layer in layers:
            field = layer.stack.part, layer.stack.kv_field
            shared.setdefault(field, {}).setdefault(layer.stack.name, set()).add(layer.new_kv_heads)
        for (_, kv_field), numbers in shared.items():
            if len(numbers) > 1 and len(set.union(*numbers.values())) > 1:
                raise ConversionError(
                    f"{self.model_type} has one {kv_field.name} for {' and '.join(numbers)}: give them the same number"
                )


def part_of(raw: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The language model's own part of a config.json."""
    for key in path:
        raw = raw[key]
    return raw


def write_numbers(stack: Stack, raw: dict[str, Any], config: Any, layers: list[LayerAttention]) -> None:
    """Change ``raw``, the JSON of the config with a stack's part in it, so that its layers have their new numbers.

    Raises:
        ConversionError: this architecture cannot say so.
    """
    for key in filter(None, stack.part.split(".")):
        config = getattr(config, key)
        if not isinstance(raw.get(key), dict):  # left out where it is as the defaults have it
            raw[key] = json.loads(json.dumps(config.to_dict()))
        raw.pop(f"{key}_dict", None)  # CLIP's older name for it
        raw = raw[key]
    stack.kv_field.write(raw, config, layers[0].heads, {layer.index: layer.new_kv_heads for layer in layers})
    _forget_other_names(raw, config, stack.kv_field.name)


def grouped_parts(raw: Mapping[str, Any]) -> list[str]:
    """The types of the parts of a config.json that are models of this package."""
    types = [str(part.get("model_type")) for part in raw.values() if isinstance(part, dict)]
    return [name for name in types if name.startswith(PREFIX)]


def _forget_other_names(raw: dict[str, Any], config: Any, name: str) -> None:
    """Leave a number under ``name`` alone: under another one (Step 3.5: num_attention_groups) it would count too."""
    names = getattr(config, "attribute_map", {})
    for other in [key for key in raw if key != name and name in raw and names.get(key, key) == names.get(name, name)]:
        del raw[other]


def _has(names: Collection[str], prefix: str, layers: list[LayerAttention], role: str = "") -> bool:
    """Whether a checkpoint has a tensor of one of these layers, of the projection of ``role`` if that is given."""
    starts = tuple(
        f"{prefix}{layer.prefix}{projection.module}."
        for layer in layers
        for projection in layer.stack.projections
        if role in projection.holds
    )
    return any(name.startswith(starts) for name in names)


def architectures(raw: Mapping[str, Any]) -> list[str]:
    """The names of model classes in a config.json."""
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"config.json lists no class names under architectures but {names!r}")
    return names


def speaks(raw: Mapping[str, Any], family: Family, config: Any, text_config: Any) -> bool:
    """Whether a checkpoint is a causal language model by itself, with a head: one that can write text of its own.

    Args:
        raw: its config.json.
        config, text_config: as transformers reads it, and the language model's part of it.
    """
    (stack, *others) = family.stacks
    reads_none = all(other.cross and other.optional for other in others) and not getattr(
        config, "add_cross_attention", False
    )
    alibi = stack.no_rope_layers == "alibi" and bool(getattr(config, "alibi", False))
    return (
        reads_none
        and stack.causal
        and not (stack.cross or alibi or stack.fixed_heads)
        and not config.is_encoder_decoder
        and text_config is config
        and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures(raw))
    )


def answers(raw: Mapping[str, Any], config: Any, text_config: Any) -> bool:
    """Whether a checkpoint is an encoder-decoder with a head: one whose decoder can say something of what was read.

    Arguments as for :func:`speaks`.
    """
    heads = ("ForConditionalGeneration", "MTModel", "LMHeadModel")
    return (
        bool(config.is_encoder_decoder)
        and text_config is config
        and any(name.endswith(heads) for name in architectures(raw))
    )


def _refuse_quantized(raw: dict[str, Any], where: str) -> None:
    how = raw.get("quantization_config") or raw.get("compression_config")
    if how:
        method = how.get("quant_method") if isinstance(how, dict) else None
        raise ConversionError(
            f"{where} describes a quantized checkpoint{f' ({method})' if method else ''}; convert the unquantized one, "
            "then quantize that, or unpack it: hf-attn convert --dequantize, where transformers can"
        )


def read_config(raw: dict[str, Any], where: str) -> LanguageModel:
    """The language model that a config.json describes.

    Raises:
        ConversionError: unknown family, quantized, or numbers that cannot be.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConversionError(f"{where} names no model_type, so the family is unknown")
    _refuse_quantized(raw, where)
    check_config_limits(raw, where)
    rows = supported()  # packages that declare families may bring config classes with them
    config = _config_object(raw, model_type, where)
    text_config, path = (config, ()) if model_type in rows else _inside(config, raw, where)
    text_type = text_config.model_type if path or text_config is not config else model_type
    try:
        family = family_of(text_type)
    except ConversionError as error:
        known = None if text_type == model_type else f"{model_type!r}, whose language model is unknown here: "
        raise ConversionError(f"{where}: {known or ''}{error}") from None
    layouts = [
        Layout(
            own.prefixes if text_config is config else _prefixes_inside(path, own.prefixes),
            [(stack, stack_layers(stack, text_config, where)) for stack in own.stacks],
        )
        for own in (family, *family.other)
    ]
    warnings = []
    if raw.get("auto_map"):
        warnings.append("config.json names code of its own (auto_map); the result uses transformers' own classes")
    return LanguageModel(family, text_type, config, text_config, path, layouts, warnings=warnings)


#: where a model of several parts has the config of its language model, and what then stands before that one's names
_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text_config",): TEXT_PREFIXES,
    ("thinker_config", "text_config"): ("thinker.model.language_model.", "thinker.model.", "thinker."),  # Qwen's Omni
    ("vlm_config", "text_config"): tuple(f"vlm.{prefix}" for prefix in TEXT_PREFIXES),  # ColPali, ColQwen2
    ("decoder",): (),  # encoder-decoders put together of two models
}


def _inside(config: Any, raw: dict[str, Any], where: str) -> tuple[Any, tuple[str, ...]]:
    """The config of the language model inside a model of several parts, and where config.json has it.

    A config.json may leave the part out and have its numbers at the top, as Qwen2-VL's did: then the path is empty.
    """
    for path in _PARTS:
        part = attribute(config, ".".join(path))
        if getattr(part, "model_type", None):
            found: Any = raw
            for key in path:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, dict):
                _refuse_quantized(found, where)
            return part, path if isinstance(found, dict) else ()
    return config, ()


def _prefixes_inside(path: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """What may stand before the names of a language model that is a part; ``own``: before those of one by itself."""
    if path == ("decoder",):
        return tuple(f"decoder.{prefix}" for prefix in own)
    return (*_PARTS[path or ("text_config",)], *(f"language_model.{prefix}" for prefix in own if prefix), *own)


def _config_object(raw: dict[str, Any], model_type: str, where: str) -> Any:
    """transformers' config of this type; its classes fill in defaults. Never runs code from a checkpoint."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        family_of(model_type)  # names the nearest family if it is unknown to us too
        raise ConversionError(f"{where}: this version of transformers does not know {model_type!r}; upgrade it")
    try:
        return config_object(raw)
    except Exception as error:  # the classes validate by many exception types of their own
        raise ConversionError(f"{where} is no valid {model_type} config: {one_line(error)}") from None
