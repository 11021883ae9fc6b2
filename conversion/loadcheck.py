"""Would transformers load this? Tried on the meta device, where a model of any size takes no memory."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hf_attn_patch.compat.transformers import auto_model_classes, classes_of
from hf_attn_patch.errors import ConversionError, one_line

from .checkpoints.dtypes import torch_dtype
from .families.config import architectures
from .families.layer_config import config_object
from .plan_data import Plan


def check_loads(plan: Plan) -> None:
    """Refuse a source that does not load whole, or a plan whose result would not.

    Raises:
        ConversionError: a tensor is missing or has a wrong shape.
    """
    before = {name: (t.dtype, t.shape) for name, t in plan.source.tensors.items()}
    _check(plan.source.config, before, plan.source.name)
    if plan.units:
        _check(plan.new_config, {name: (t.dtype, t.shape) for name, t in plan.tensors.items()}, "the result")


def model_class_of(raw: Mapping[str, Any], config: Any) -> Any:
    """The class that config.json names first: transformers' own, or one registered with its Auto classes."""
    import transformers

    names = architectures(raw)
    if not names:
        return None
    found = getattr(transformers, names[0], None)
    if found is not None:
        return found if hasattr(found, "from_pretrained") else None
    for auto_class in auto_model_classes().values():
        for choice in classes_of(auto_class, config):
            if choice.__name__ == names[0]:
                return choice
    return None


def _check(raw: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> None:
    try:
        config = config_object(raw)
    except Exception as error:  # the classes validate by many exception types of their own
        text = one_line(error)
        raise ConversionError(f"config.json of {what} is no valid {raw.get('model_type')} config: {text}") from None
    model_class = model_class_of(raw, config)
    if model_class is None:
        return  # a class that is not known here: attention was checked, the rest is the owner's
    from transformers import PreTrainedModel

    with quiet():
        try:
            state = {
                name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
                for name, (dtype, shape) in tensors.items()
            }
            # not the class's own, which may want more files than weights (Qwen2.5-Omni: speakers)
            _, info = PreTrainedModel.from_pretrained.__func__(
                model_class,
                None,
                config=config,
                state_dict=state,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,  # some configs name further files (Jev), which would be asked of the hub
            )
        except ConversionError:
            raise
        except Exception as error:  # whatever a model's constructor refuses a config with
            raise ConversionError(
                f"transformers cannot build {model_class.__name__} from config.json: {one_line(error)}"
            ) from None
    optional = "pooler" if _pooler_is_optional(model_class) else None
    for name in sorted(n for n in info["missing_keys"] if optional not in n.split(".")):
        raise ConversionError(f"tensor {name!r}, which {model_class.__name__} needs, is missing from {what}")
    for name, found, wanted in sorted(info["mismatched_keys"], key=str):
        raise ConversionError(
            f"tensor {name!r} of {what} has shape {list(found)}, but config.json asks for {list(wanted)}"
        )


def _pooler_is_optional(model_class: Any) -> bool:
    """Whether the model can be made without its pooler, as many encoders were saved (config.json does not say so).

    >>> from transformers import BertForMaskedLM, BertModel
    >>> _pooler_is_optional(BertModel), _pooler_is_optional(BertForMaskedLM)
    (True, False)
    """
    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no loading reports from transformers meanwhile."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def device_named(name: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one.

    Raises:
        ConversionError: there is none of that name here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        return torch.empty(0, device=device).device  # with its number: as a model on it says
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0][:120]
        raise ConversionError(f"--device {name} cannot be used here: {text}") from None
