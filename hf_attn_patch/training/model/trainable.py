"""Which weights are trained: all, attention only, or low-rank adapters that are merged at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.transformers import whole_blocks
from hf_attn_patch.errors import TrainingError

Mode = Literal["full", "attention", "lora"]


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are attention, with their names."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if name and not inside and "Attention" in type(module).__name__ and any(True for _ in module.parameters()):
            found.append(name)
            yield name, module


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers, as the model names the classes of its blocks."""
    kinds = whole_blocks(model)
    # among the ancestors' names, because FSDP2 gives a layer a class of its own
    return [m for m in model.modules() if any(c.__name__ in kinds for c in type(m).__mro__)]


def choose_trainable(
    model: Any, mode: Mode, *, rank: int = 16, alpha: float = 32.0, targets: str = "attention", seed: int = 0
) -> Any:
    """Set ``requires_grad`` throughout ``model``; return peft's wrapper in lora mode, else ``model``.

    Args:
        rank, alpha: of LoRA (Hu et al. 2021, arXiv 2106.09685).
        targets: ``attention``, ``all-linear``, or module names separated by commas.

    Raises:
        TrainingError: peft is missing, or nothing would be trained.
    """
    if mode == "full":
        model.requires_grad_(True)
        return model
    model.requires_grad_(False)
    modules = list(attention_modules(model))
    if mode == "attention":
        for _, module in modules:
            module.requires_grad_(True)
        if not modules:
            raise TrainingError(f"{type(model).__name__} has no module named attention; use --mode full or lora")
        return model
    try:
        import peft
    except ImportError as error:
        raise TrainingError("--mode lora needs peft: pip install 'hf-attn-patch[train]'") from error
    names: Any = targets
    if targets == "attention":
        names = [
            f"{outer}.{inner}" for outer, module in modules for inner, m in module.named_modules() if is_projection(m)
        ]
    elif targets != "all-linear":
        names = targets.split(",")
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(gpus):
            torch.manual_seed(seed)  # the adapters start at random: the same ones on every process
            wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    except ValueError as error:  # no module of these names, or one that can't have an adapter
        raise TrainingError(f"--lora-targets {targets}: {str(error).splitlines()[0]}") from error
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and (not is_projection(base) or base.weight is words or module is head):
            raise TrainingError(f"--lora-targets {targets}: {name} is not one of the matrices within the layers")
    return wrapped


def merged_state(
    state: dict[str, Tensor], mode: Mode, scale: float, transposed: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Weights as the plain model names them, adapters added in: ``W + scale * B A``.

    Works on gathered weights, so that a sharded model can be saved in the middle of training.

    Args:
        transposed: whether the matrix of that name is stored [in, out] (GPT-2's Conv1D).
    """
    if mode != "lora":
        return state
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            merged[name] = value
            continue
        stem, leaf = name.split(".base_layer.")
        if leaf == "weight":
            a, b = state[f"{stem}.lora_A.default.weight"], state[f"{stem}.lora_B.default.weight"]
            added = scale * (b.float() @ a.float())
            value = (value.float() + (added.T if transposed(stem) else added)).to(value.dtype)
        merged[f"{stem}.{leaf}"] = value
    return merged


@contextmanager
@torch.no_grad()
def as_saved(model: nn.Module, dtype: torch.dtype, scale: float) -> Iterator[None]:
    """Inside, the weights are those that a saved model will have: adapters merged, rounded to ``dtype``.

    They come back as they were, bit for bit; a copy is kept meanwhile.

    Args:
        scale: of adapters, alpha / rank.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def put(weight: Tensor, value: Tensor) -> None:
        if value.is_floating_point():
            kept.append((weight, weight.detach().clone()))
            weight.copy_(value.to(dtype).to(weight.dtype))

    adapted = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        lora: Any = module  # peft's layer, whose attributes torch knows as modules or tensors
        if base is None or "default" not in getattr(module, "lora_A", {}):
            continue
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        added = scale * (b.float() @ a.float())
        put(base.weight, base.weight + (added.T if type(base).__name__ == "Conv1D" else added).to(base.weight.dtype))
        put(b, torch.zeros_like(b))
        adapted |= {id(base.weight), id(a), id(b)}
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.dtype is not dtype and id(weight) not in adapted:
            put(weight, weight)
    try:
        yield
    finally:
        for weight, value in kept:
            weight.copy_(value)


def is_projection(module: nn.Module) -> bool:
    """A matrix between features: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay, vectors (norms, biases) don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
