"""Build a family's model twice, with eager and with the implementation under test, and compare what they do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, reduce
from typing import Any

import torch
import transformers
from families import FAMILIES
from family_inputs import Inputs
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    import hf_attn_patch  # noqa: F401  registers the implementation
finally:
    #: Which implementation is compared with eager; another name (sdpa, ...) shows which differences are not ours.
    IMPLEMENTATION = os.environ.get("HF_ATTN_TEST_IMPLEMENTATION", "hf_attn_patch")


def strengthen(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that make attention matter: the usual init (std 0.02) makes it uniform and hides what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for parameter in dict.fromkeys(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            if id(parameter) in norms or parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif parameter.ndim == 2 and min(parameter.shape) <= 8:  # a table of biases, one column a head
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def build(name: str, implementation: str | dict[str, str], **options: Any) -> PreTrainedModel:
    """A model of the family, in eval mode, with the same weights whatever the implementation."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**family.options, **options})
    model = getattr(transformers, family.model)._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.eval()


@lru_cache(maxsize=4)
def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(ours, eager), kept while the tests of a family run: leave them as they are."""
    return build(name, IMPLEMENTATION), build(name, "eager")


def output(outputs: Any, path: str) -> torch.Tensor:
    return reduce(getattr, path.split("."), outputs)


def run(model: PreTrainedModel, inputs: Inputs, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The outputs that count, each with the rows that count only: [rows, ...]."""
    outputs = model(**inputs.kwargs, **kwargs)
    found = {path: output(outputs, path) for path in inputs.rows}
    return {path: value if inputs.rows[path] is None else value[inputs.rows[path]] for path, value in found.items()}


def functional(outputs: dict[str, torch.Tensor], seed: int = 7) -> torch.Tensor:
    """A random linear functional of the outputs: a loss that no row and no feature escapes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs.values()]).sum()


def gradients(model: PreTrainedModel, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of ``functional(outputs)``, to every parameter that has one."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(functional(outputs), parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_close(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, rtol: float = 1e-5, floor: float = 1e-6
) -> None:
    """Every tensor within ``rtol`` of its own largest entry, or ``floor`` of the largest of all tensors.

    The floor is for tensors that are zero but for rounding (the gradient of a key bias).
    """
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    found, wanted = ({name: t.detach() for name, t in tensors.items()} for tensors in (found, wanted))
    largest = max((float(w.abs().max()) for w in wanted.values() if w.numel()), default=0.0)
    assert largest > 0, "nothing to compare"
    wrong = []
    for name, want in wanted.items():
        assert found[name].shape == want.shape, (name, found[name].shape, want.shape)
        if not want.numel():
            continue
        error = float((found[name] - want).abs().max())
        allowed = max(rtol * float(want.abs().max()), floor * largest)
        if not error <= allowed:  # also true of NaN
            wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    assert not wrong, "; ".join(wrong[:5])


@contextmanager
def counted(implementation: str = IMPLEMENTATION) -> Iterator[list[torch.nn.Module]]:
    """The modules whose attention the implementation computes, one entry a call."""
    original, calls = ALL_ATTENTION_FUNCTIONS[implementation], []

    def spy(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return original(module, *args, **kwargs)

    own = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = own.get(implementation)
    ALL_ATTENTION_FUNCTIONS[implementation] = spy
    try:
        yield calls
    finally:
        if before is None:
            del own[implementation]
        else:
            own[implementation] = before
