"""Convert while loading: a model with fewer KV heads straight from a checkpoint, nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_attn_patch.compat.transformers import classes_of, is_auto_class
from hf_attn_patch.errors import ConversionError

from .api import StrPath
from .api import plan as make_plan
from .checkpoints.reader import no_reading_errors
from .families.layer_config import config_object
from .methods.apply import compute_unit
from .plan_data import KVHeads, Plan


def from_pretrained(
    model_class: Any,
    src: StrPath,
    *,
    num_key_value_heads: KVHeads,
    method: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """``model_class.from_pretrained(src, ...)``, with the KV heads merged on the way.

    The same bits as writing the conversion with ``convert`` and loading that. What is not attention is memory-mapped,
    so nothing is held twice.

    Args:
        model_class: a transformers model class or an Auto class.
        src: a checkpoint folder or a hub id.
        num_key_value_heads: HKV of the result, as ``kv_heads`` of ``plan``.
        method, seed, revision, allow_pickle, options: as for ``plan`` (``options``: the method's own).
        allow_nonfinite: merge heads that have NaN or Inf.
        kwargs: go to ``model_class.from_pretrained`` (dtype, device_map, attn_implementation, ...).

    Raises:
        ConversionError: the conversion cannot be done.
    """
    made = make_plan(
        src, num_key_value_heads, method=method, seed=seed, revision=revision, allow_pickle=allow_pickle,
        **dict(options or {}),
    )  # fmt: skip
    with no_reading_errors(made.source.name):
        state = converted_state(made, allow_nonfinite=allow_nonfinite)
    from transformers import GenerationConfig

    config = config_object(made.new_config)
    config.name_or_path = made.source.name
    if is_auto_class(model_class):  # an Auto class: without a path it needs to be told the class
        model_class = _concrete(model_class, config)
    elif model_class.config_class.model_type != config.model_type:
        raise ConversionError(
            f"{model_class.__name__} cannot share KV heads: pass an Auto class, which knows {config.model_type}"
        )
    kwargs = {"dtype": "auto", "local_files_only": True, **kwargs}  # all that is loaded is here
    loaded = model_class.from_pretrained(None, config=config, state_dict=state, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if (made.source.folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(made.source.folder)
    return loaded


def _concrete(auto_class: Any, config: Any) -> Any:
    """The model class that an Auto class would choose: the checkpoint's own where there are several."""
    by_name = {cls.__name__: cls for cls in classes_of(auto_class, config)}
    if not by_name:
        raise ConversionError(f"{auto_class.__name__} has no model for {config.model_type}; pass another Auto class")
    wanted = [name for name in getattr(config, "architectures", None) or [] if name in by_name]
    return by_name[wanted[0] if wanted else next(iter(by_name))]


def converted_state(plan: Plan, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """The state dict of a plan's result: merged heads in memory, all else mapped from the source's files."""
    from safetensors import safe_open

    state: dict[str, Any] = {}
    if plan.source.pickled:
        state = {name: plan.source.read(name) for name, tensor in plan.tensors.items() if tensor.unit is None}
    else:
        for number, path in enumerate(plan.source.files):
            with safe_open(path, framework="pt") as file:
                for name, tensor in plan.tensors.items():
                    if tensor.unit is None and plan.source.tensors[name].file == number:
                        state[name] = file.get_tensor(name)
    if plan.units:
        merge = plan.method.build(plan, plan.options)
        for unit in plan.units:
            state.update(compute_unit(plan, unit, merge, allow_nonfinite=allow_nonfinite))
    return {name: state[name] for name in plan.tensors}
