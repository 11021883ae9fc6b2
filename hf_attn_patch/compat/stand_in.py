"""Tensors that have a shape, a dtype and a device but no numbers: a whole forward of any model, for nothing.

Inside :func:`rehearsal` weights, and what is made of them, are stand-ins over torch's meta device. What no weight is in
is real, and lies on the CPU whatever device it names: token ids, positions, masks and borders of documents decide who
sees whom. What would be an integer made of weights (the expert that a router picks) is 0. A 70B model takes no memory,
no accelerator and no random numbers.

It stands on how torch lets tensors be extended: ``_make_wrapper_subclass``, dispatch modes, the schemas of operators
(torch 2.11 to 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from .torch import missing_operators

#: more integers or bools than so many have no values (the S x S mask of a long sequence), and more floats
MOST_REAL, MOST_FLOATS = 1 << 24, 1 << 20
_META, _CPU = torch.device("meta"), torch.device("cpu")
#: what operators gave on meta tensors, since layers are alike and a rule of torch takes a millisecond
MOST_KNOWN = 4096
_known: dict[Any, list[tuple[Any, Any, torch.dtype]]] = {}
aten = torch.ops.aten


def _overloads(*names: str) -> frozenset[Any]:
    """The operators of these names that this torch has."""
    known = [name.split(".") for name in names if not missing_operators([name.split(".")[0]])]
    return frozenset(getattr(getattr(aten, name), overload) for name, overload in known)


#: whose results are numbers, not tensors
_READ = _overloads("_local_scalar_dense.default", "equal.default")
#: whose results have a shape that depends on values
_BY_VALUES = _overloads(
    "nonzero.default",
    "masked_select.default",
    "bincount.default",
    "repeat_interleave.Tensor",
    "_unique2.default",
    "unique_consecutive.default",
    "unique_dim.default",
)
_INDEXED = _overloads("index.Tensor", "index_put.default", "index_put_.default", "_index_put_impl_.default")
_DRAWN = ("rand", "bernoulli", "multinomial", "normal", "uniform", "dropout", "exponential", "geometric")


class StandIn(Tensor):
    """A tensor that names a device it isn't on. ``held`` is a meta tensor, or a real one on the CPU.

    To torch's own code it lies on the meta device, so that nobody looks for one that isn't there.
    """

    held: Tensor
    named: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, requires_grad: bool = False) -> StandIn:
        made: StandIn = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_META,
            requires_grad=requires_grad,
        )
        made.held, made.named = inner, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that it stands for."""
        return self.named

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):  # which torch has for no subclass
            with _disable_current_modes():
                return func(_values(args[0]), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {}, None, True)

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else super().__format__(form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({list(self.shape)}, {self.dtype}, {self.device})"


def stand_in(
    tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None, *, floats: bool = False
) -> StandIn:
    """What stands for ``tensor`` on ``device``; floats become ``dtype`` if given.

    Args:
        floats: floats have values too, if they are few; else only integers and bools.
    """
    counts = _is_integer(tensor) or (floats and not tensor.is_meta)
    if counts and tensor.numel() <= (MOST_REAL if _is_integer(tensor) else MOST_FLOATS):
        inner = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu().clone()
        return StandIn(inner if dtype is None or _is_integer(inner) else inner.to(dtype), device)
    wide = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_strided(tuple(tensor.shape), tuple(tensor.stride()), dtype=wide, device=_META)
    return StandIn(empty, device, tensor.requires_grad)


@contextlib.contextmanager
def rehearsal(device: torch.device, *, floats: bool = True) -> Iterator[None]:
    """Whatever torch computes or makes inside is a stand-in; ``device`` (of any type) need not exist.

    Args:
        floats: those that no weight is in have values. False where a model is made: all its weights are such.
    """
    modes = _Names(device), _Operators(device, floats)
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), modes[0], modes[1]:
            yield
    finally:  # models that keep tensors for the whole process (BEiT's index of positions) must not keep stand-ins
        for function in _cached_functions(len(sys.modules)):
            function.cache_clear()


@functools.lru_cache(maxsize=1)
def _cached_functions(modules: int) -> list[Any]:
    """What modeling files have under functools.lru_cache; looked for anew when there are more ``modules``."""
    kind, found = type(_cached_functions), []
    for file in [module for name, module in list(sys.modules.items()) if ".modeling_" in name]:
        classes = [one for one in vars(file).values() if isinstance(one, type) and one.__module__ == file.__name__]
        for function in [one for owner in (file, *classes) for one in vars(owner).values()]:
            function = getattr(function, "__func__", function)  # of a static method
            found += [one for one in (function, *_closed_over(function)) if type(one) is kind]
    return [function for function in found if ".modeling_" in (function.__module__ or "")]


def _closed_over(function: Any) -> Iterator[Any]:
    """Such as the cached function inside what transformers' own decorator makes."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents


class _Names(TorchFunctionMode):
    """Names the meta device where code names the rehearsed one, which torch would initialise."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].to(_META)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):  # of numbers, which must stay
            numbers = tree_map(lambda item: item.tolist() if isinstance(item, StandIn) else item, args[0])
            made = func(numbers, *args[1:], **{**kwargs, "device": _CPU})
            if isinstance(made, StandIn) and kwargs.get("device") is not None:
                made.named = torch.device(kwargs["device"])
            return made
        if self.device.type != "cpu":
            args = tuple(self._renamed(a) if not isinstance(a, str) or func is Tensor.to else a for a in args)
            kwargs = {name: self._renamed(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, str) and value.partition(":")[0] == self.device.type:
            return _META
        return _META if isinstance(value, torch.device) and value.type == self.device.type else value


class _Operators(TorchDispatchMode):
    rehearses = True  # what asks whether operators are watched does not count it

    def __init__(self, device: torch.device, floats: bool) -> None:
        super().__init__()
        self.device, self.floats = device, floats

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.device, self.floats)


def _is_integer(tensor: Tensor) -> bool:
    """Integers and bools."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _inner(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, StandIn) else tensor


def _values(tensor: Tensor) -> Tensor:
    """Real values, 0 where there are none."""
    inner = _inner(tensor)
    return torch.zeros(inner.shape, dtype=inner.dtype) if inner.is_meta else inner


def _shapes(tensor: Tensor) -> Tensor:
    inner = _inner(tensor)
    return inner if inner.is_meta else inner.to(_META)


def _run(func: Any, args: Any, kwargs: dict[str, Any], target: torch.device | None, floats: bool) -> Any:
    """One operator: on meta for the shapes, and for real too where everything has values."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if func in _READ:
        return func(*(_values(t) for t in tensors))
    device = _device(kwargs.get("device"), tensors, target)
    if func in _INDEXED:
        args = (args[0], _as_places(args[1]), *args[2:])
    made = _on_meta(func, args, kwargs, sum(t.numel() for t in tensors))
    outs = [o for o in tree_leaves(made) if isinstance(o, Tensor)]
    drawn = any(name in func.__name__ for name in _DRAWN)
    if made is None:  # torch has no rule for its shape
        made = _call(func, args, kwargs, _CPU, _values)
    elif outs and not drawn and not any(_inner(t).is_meta for t in tensors) and all(_few(o, floats) for o in outs):
        with contextlib.suppress(NotImplementedError):  # what only another device has
            made = _call(func, args, kwargs, _CPU, _values)

    def dressed(out: Any) -> Any:
        if not isinstance(out, Tensor) or isinstance(out, StandIn):
            return out
        if _is_integer(out) and out.is_meta and out.numel() <= MOST_REAL:
            out = torch.zeros(out.size(), dtype=out.dtype)
        elif not out.is_meta and not _few(out, floats):
            out = torch.empty_strided(out.size(), out.stride(), dtype=out.dtype, device=_META)
        return StandIn(out, device)

    return tree_map(dressed, made)


def _few(tensor: Tensor, floats: bool) -> bool:
    """Few enough to have values."""
    return tensor.numel() <= (MOST_REAL if _is_integer(tensor) else MOST_FLOATS if floats else -1)


def _on_meta(func: Any, args: Any, kwargs: Any, elements: int) -> Any:
    """What the operator gives on meta tensors; None where torch has no rule for its shape."""
    if func in _BY_VALUES:
        return None
    call: Any = (func, torch.get_default_dtype(), _told(args), _told(tuple(kwargs.items())))
    try:
        known = _known.get(call)
    except TypeError:  # an argument has no hash
        call = known = None
    if known is not None:
        again = [torch.empty_strided(size, stride, dtype=dtype, device=_META) for size, stride, dtype in known]
        return again[0] if len(again) == 1 else tuple(again)
    try:
        made = _call(func, args, kwargs, _META, _shapes)
    except (NotImplementedError, RuntimeError):
        if elements > MOST_REAL:
            raise
        return None
    outs = made if isinstance(made, tuple) and len(made) > 1 else (made,)
    if call is not None and all(type(out) is Tensor for out in outs):  # a stand-in is an argument that was written to
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[call] = [(out.size(), out.stride(), out.dtype) for out in outs]
    return made


def _told(item: Any) -> Any:
    """What an operator's results on meta tensors depend on."""
    if isinstance(item, Tensor):
        inner = _inner(item)
        return inner.size(), inner.stride(), inner.storage_offset(), inner.dtype
    if isinstance(item, (tuple, list)):
        return tuple(map(_told, item))
    return type(item), item  # 1 is True, and 1.0


def _device(named: Any, tensors: list[Tensor], target: torch.device | None) -> torch.device:
    if named is None:
        known = sorted(tensors, key=lambda t: t.dim() == 0)  # a number may lie on any device
        named = known[0].device if known else _CPU
    return target if target is not None and named.type == "meta" else named


def _as_places(indices: Any) -> list[Any]:
    """Bool indices as those of integers that they stand for."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            places += _values(index).nonzero().unbind(1)
        else:
            places.append(index)
    return places


def _call(func: Any, args: Any, kwargs: Any, place: torch.device, convert: Callable[[Tensor], Tensor]) -> Any:
    """``func`` with its tensors converted, on ``place``; what it writes in place is given back as it was given."""
    given: dict[int, StandIn] = {}

    def there(item: Any) -> Any:
        if isinstance(item, Tensor):
            converted = convert(item)
            if isinstance(item, StandIn):
                given[id(converted)] = item
            return converted
        return place if isinstance(item, torch.device) else item

    placed, named = tree_map(there, (args, kwargs))
    if not given and "device" not in named and any(a.name == "device" for a in func._schema.arguments):
        named["device"] = place
    if named.get("pin_memory"):
        named["pin_memory"] = False
    return tree_map(lambda out: given.get(id(out), out), func(*placed, **named))
