"""Private names of torch."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ground import changed, known


def _any_autocast_publicly() -> bool:
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "xpu", "mps"))


#: whether autocast is on for any device: a tenth of the time of asking for one. torch 2.11 to 2.13; else publicly
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast_publicly)

#: whether deterministic algorithms are asked for, without the Python around it. torch 2.11 to 2.13; else publicly
deterministic_algorithms: Callable[[], bool] = getattr(
    torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled
)


#: the depth of torch.func's transforms (vmap, grad, jvp) around what runs, None outside of them: operands are wrappers
#: then, which only torch's own operators take. torch 2.11 to 2.13; where that cannot be asked, None
transforms: Callable[[], int | None] = getattr(
    getattr(torch._C, "_functorch", None), "maybe_current_level", lambda: None
)


@known("torch", "the transforms of torch.func (torch._C._functorch.get_interpreter_stack)")
def derives_further() -> bool:
    """Whether the transforms around what runs derive forwards (jvp, jacfwd) or more than once (hessian), for which
    torch's fused attention kernels have no formula."""
    names = [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]
    return "Jvp" in names or names.count("Grad") > 1


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to in place. Inference tensors have no count: RuntimeError (torch 2.11 to 2.13).

    >>> x = torch.zeros(2)
    >>> before = write_count(x)
    >>> write_count(x.add_(1)) - before
    1
    """
    try:
        return tensor._version
    except AttributeError as error:  # not by `known`: this runs in every layer
        raise changed("torch", "Tensor._version") from error


@known("torch", "the count of a storage's users (torch._C._storage_Use_Count)")
def storage_users(tensor: Tensor) -> int:
    """How many tensors share this one's memory, itself included."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count - 1  # the storage object made to ask counts too


@known("torch", "whether autograd runs a backward (torch._C._current_graph_task_id)")
def in_backward() -> bool:
    """Whether this is called from within a backward, in whichever thread."""
    return torch._C._current_graph_task_id() != -1


@known("torch", "the hooks of nn.Module (_forward_hooks, _forward_pre_hooks)")
def forward_hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks that run before and after a module's forward, its own alone (not the global ones)."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


@known("torch", "the hooks of all modules (_global_forward_hooks, _global_forward_pre_hooks)")
def forward_hooks_of_all() -> bool:
    """Whether hooks run before or after the forward of every module of the process."""
    of_modules: Any = torch.nn.modules.module
    return bool(of_modules._global_forward_hooks or of_modules._global_forward_pre_hooks)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks run after a module's forward; may be traced by torch.compile (torch 2.11 to 2.13)."""
    return bool(module._forward_hooks)


def compile_module(module: torch.nn.Module, *, recompile_limit: int, **how: Any) -> None:
    """``module.compile(**how)`` with a limit of its own for the graphs that a function may have: the limit that the
    process has (``torch._dynamo.config``) stays what it is. Known for torch 2.11 to 2.13.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # since torch 2.13
        module.compile(**how, recompile_limit=recompile_limit)
        return
    module.compile(**how)
    compiled: Any = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        raise changed("torch", "what Module.compile makes (_compiled_call_impl)")
    from torch._dynamo import config

    def call(*args: Any, **kwargs: Any) -> Any:
        with config.patch(recompile_limit=recompile_limit):
            return compiled(*args, **kwargs)

    module._compiled_call_impl = call


@known("torch", "the memory pools of CUDA graphs (torch._C._cuda_endAllocateToPool, _cuda_releasePool)")
def leave_graph_pool(device: int, pool: Any) -> None:
    """End an allocation to a CUDA graph's memory pool that a failed recording left open.

    Raises:
        RuntimeError: none was open.
    """
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)


@known("torch", "torch._dynamo.config.recompile_limit")
def recompile_limit_at_least(limit: int) -> None:
    """Let dynamo compile a function for so many kinds of arguments; past its limit it gives up without a word."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)


@known("torch", "what nn.Module keeps of hooks and of compiling (_forward_hooks and others, _compiled_call_impl)")
def forget_wrappers(module: torch.nn.Module) -> None:
    """Leave a module (not its children) with its class's own forward: no hooks, nothing compiled."""
    for name in ("forward", "_compiled_call_impl"):  # accelerate and recorders put a forward of theirs on the instance
        vars(module).pop(name, None)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and hasattr(value, "clear"):
            value.clear()


def uncompiled(model: Any) -> Any:
    """The model inside what ``torch.compile(model)`` returns (its ``_orig_mod``); others as they are."""
    return getattr(model, "_orig_mod", model)


@known("torch", "torch._dynamo.config.recompile_limit and accumulated_recompile_limit")
def recompile_limit(limit: int) -> Any:
    """A context in which dynamo compiles a function for so many kinds of arguments."""
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit, config.accumulated_recompile_limit  # noqa: B018 - gone: said by its name
    return config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)


@known("torch", "torch._dynamo.utils.compile_times and counters")
def compile_facts() -> dict[str, float]:
    """What torch.compile did in this process so far: seconds in all, seconds of tracing Python, seconds of its backend
    (with inductor's cache), and how many graphs were found in that cache or not."""
    from torch._dynamo.utils import compile_times, counters

    columns: Any = compile_times(repr="csv", aggregate=True)  # names, seconds
    took = {name: float(seconds) for name, seconds in zip(*columns, strict=True)}
    parts = {
        "all": "_compile.compile_inner",
        "tracing": "bytecode_tracing",
        "backend": "OutputGraph.call_user_compiler",
    }
    facts = {f"{part}_seconds": took.get(name, 0.0) for part, name in parts.items()}
    of_cache = {"found": "fxgraph_cache_hit", "not_found": "fxgraph_cache_miss", "passed_by": "fxgraph_cache_bypass"}
    return facts | {name: float(counters["inductor"][key]) for name, key in of_cache.items()}


@known("torch", "torch._dynamo.config.automatic_dynamic_shapes")
def one_graph_a_shape() -> None:
    """Let torch.compile make code for each shape, never for any: process-wide, for benchmarks of few shapes."""
    import torch._dynamo

    torch._dynamo.config.automatic_dynamic_shapes  # noqa: B018
    torch._dynamo.config.automatic_dynamic_shapes = False


@known("torch", "torch._dynamo.maybe_mark_dynamic")
def any_length(tensor: Tensor, dim: int = 0) -> None:
    """One size of ``tensor``, the first unless told, may change without compiling anew."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, dim)


@known("torch", "where nn.Module.compile keeps what it compiled (_compiled_call_impl)")
def uncompile(module: torch.nn.Module) -> None:
    """Undo ``module.compile()``."""
    module._compiled_call_impl  # noqa: B018
    module._compiled_call_impl = None


@known("torch", "where nn.Module keeps its own tensors (_parameters, _buffers)")
def own_tensors(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers, as it keeps them: what is put in replaces one, whatever its device."""
    return module._parameters, module._buffers


def own_attributes(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """All that stands in a module itself, by name, without its submodules (``_modules`` by torch 2.11 to 2.14; were it
    called otherwise, they would be among the values).

    >>> [name for name, _ in own_attributes(torch.nn.Linear(2, 3)) if "features" in name or "modules" in name]
    ['in_features', 'out_features']
    """
    return [(name, value) for name, value in vars(module).items() if name != "_modules"]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``target.copy_(source)`` for all pairs, by one kernel for many where torch has it (2.11 to 2.13).

    >>> x = torch.zeros(2)
    >>> copy_all([x], [torch.ones(2)])
    >>> x
    tensor([1., 1.])
    """
    together = getattr(torch, "_foreach_copy_", None)
    if together is not None:
        together(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


try:
    #: the base of modes that see each operator (its module is private, its name is documented; torch 2.11 to 2.13)
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
except ImportError:  # nobody can watch operators then
    DispatchMode = object  # type: ignore[misc, assignment]


def has_no_numbers(kind: type) -> bool:
    """Whether a class of tensors is torch's own for shapes and dtypes alone, which rules of operators are asked with
    (FakeTensor; torch 2.11 to 2.13).

    >>> has_no_numbers(torch.Tensor)
    False
    """
    module = sys.modules.get("torch._subclasses.fake_tensor")  # not loaded: none was made
    fake = getattr(module, "FakeTensor", None)
    return fake is not None and issubclass(kind, fake)


#: whether a :data:`DispatchMode` sees operators
operators_can_be_watched = DispatchMode is not object


def _operator(name: str) -> Any:
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


#: the operators behind ``Tensor.to``, behind the views of a linear layer's result and behind tensors made of Python's
#: numbers (torch 2.11 to 2.13; else None, which no step has)
to_copy_op = _operator("_to_copy")
unsafe_view_op = _operator("_unsafe_view")
literal_op = _operator("lift_fresh")


def is_operator(function: Any) -> bool:
    """Whether a function is an operator of PyTorch's, with a schema (torch 2.11 to 2.13)."""
    return isinstance(function, torch._ops.OpOverload)


@known("torch", "the schemas of operators (OpOverload._schema)")
def schema_of(operator: Any) -> Any:
    """The schema of an operator: its name, arguments and returns, and what it writes to."""
    return operator._schema


@functools.lru_cache(4096)
def is_composite(operator: Any) -> bool:
    """Whether an operator is made of others alone and has ``decompose``: under inference mode those reach a dispatch
    mode whole. torch 2.11 to 2.13; where that cannot be asked, none is."""
    can = getattr(operator, "_can_decompose", None)
    composite = "CompositeImplicitAutograd"
    return can is not None and torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), composite) and can()


def operators_are_watched() -> bool:
    """Whether a dispatch mode wants to see each operator (torch 2.11 to 2.13; never, where that cannot be asked).

    Those of :mod:`.stand_in` do not count: a rehearsal is to go the way that a real call goes.
    """
    modes = _dispatch_modes()
    return modes > 0 and not all(getattr(_dispatch_mode_at(i), "rehearses", False) for i in range(modes))


_dispatch_mode_at: Callable[[int], Any] = getattr(torch._C, "_get_dispatch_stack_at", lambda place: None)
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def missing_operators(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``torch.ops.aten`` does not have."""
    return [name for name in names if not hasattr(torch.ops.aten, name)]


def _kernel(path: str) -> Callable[..., Any]:
    """A private function of torch; where it is gone, what says so when it is called, and not when it is imported."""
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    if found is not None:
        return found  # type: ignore[no-any-return]

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise changed("torch", path)

    return gone


#: the kernels behind torch's scaled_dot_product_attention, which give the log-sum-exp of the scores as well, and the
#: one behind its varlen_attn. torch 2.11 to 2.13
cudnn_attention = _kernel("torch._scaled_dot_product_cudnn_attention")
flash_attention = _kernel("torch._scaled_dot_product_flash_attention")
cudnn_attention_op = _kernel("torch.ops.aten._scaled_dot_product_cudnn_attention")
flash_attention_op = _kernel("torch.ops.aten._scaled_dot_product_flash_attention")
efficient_attention_op = _kernel("torch.ops.aten._scaled_dot_product_efficient_attention")
cpu_flash_attention_op = _kernel("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu")
varlen_attention_op = _kernel("torch.ops.aten._flash_attention_forward")
