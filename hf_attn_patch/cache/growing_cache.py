"""A KV cache that grows without copying itself at every token.

``DynamicCache`` concatenates: each new token reads and writes the whole cache once more, so that decoding moves three
times the bytes that attention needs. Here K and V live in buffers ``[B, HKV, capacity, D]`` with room at the end. A new
token is written behind the last one, attention gets views of the valid part ``[B, HKV, S, D]``, and only when the room
is used up do the states move to a buffer that is larger by a factor: amortised, a token costs a token.

Everything else is ``DynamicCache``: the classes here are its subclasses, ``layer.keys`` and ``layer.values`` hold what
they hold there, and code that slices or replaces them is noticed and followed (one copy, then in place again).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache

from hf_attn_patch.attn.codes import kind_named
from hf_attn_patch.compat.generation import PREFILL, PREPARE_CACHE, generate_method
from hf_attn_patch.handle import Asked, Handle, of_each

from .beforehand import make_together
from .beginnings import begin_with, can_begin, rows_of, take_rows
from .coded_layers import grown, grown_new
from .layers import GrowingLayer, GrowingMixin, GrowingSlidingWindowLayer
from .repeated_prompts import prefill_once

__all__ = ["GrowingCache", "GrowingLayer", "GrowingSlidingWindowLayer", "use_growing_cache"]


class GrowingCache(DynamicCache):
    """A ``DynamicCache`` whose K and V ``[B, HKV, S, D]`` grow in place.

    Args:
        ddp_cache_data: as in ``DynamicCache``: (keys, values) of each layer to start from.
        config: the model's config; picks full, sliding and hybrid layers as ``DynamicCache`` does.
        offloading: as in ``DynamicCache``. Layers that are offloaded cross the bus whole at every token, and so are
            kept at their exact size and do not grow in place.
        offload_only_non_sliding: as in ``DynamicCache``.
        dtype: "int8" or "fp8": keep keys and values as codes of 8 bits, with a scale for each head of each token: half
            the memory, and half the bytes that decoding reads. **Not exact**; ``docs/run.md`` says what is lost. None:
            as they come.
        growth: a full buffer is replaced by one this many times as large (rounded up to 256 keys). 1.25 costs at most a
            quarter more memory, and copies 4 tokens for each one cached.
        expected_length: the number of keys beyond which none are expected: growth stops there first. Not a limit.

    Raises:
        ValueError: if ``growth`` is under 1 or no number, ``expected_length`` under 1, or ``dtype`` neither name.
        TypeError: with ``dtype``, if layers hold more than keys and values (indexers, linear attention).

    In-place growth needs ``torch.no_grad()`` or ``torch.inference_mode()`` (``generate`` has it): with gradients on,
    and under ``torch.compile``, the layers concatenate, because autograd or the graph may still need the old states.

    >>> import torch
    >>> from hf_attn_patch import GrowingCache
    >>> cache = GrowingCache()
    >>> token = torch.ones(2, 4, 1, 64)  # [B, HKV, S, D]
    >>> with torch.no_grad():
    ...     for _ in range(3):
    ...         keys, values = cache.update(token, token, layer_idx=0)
    >>> tuple(keys.shape), cache.get_seq_length(), cache.capacity()
    ((2, 4, 3, 64), 3, 256)
    """

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
        config: PretrainedConfig | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        *,
        dtype: str | None = None,
        growth: float = 1.25,
        expected_length: int | None = None,
    ) -> None:
        super().__init__(ddp_cache_data, config, offloading, offload_only_non_sliding)
        self._grow(growth, expected_length, dtype)

    @classmethod
    def from_dynamic(
        cls,
        cache: DynamicCache,
        *,
        dtype: str | None = None,
        growth: float = 1.25,
        expected_length: int | None = None,
    ) -> GrowingCache:
        """A growing cache that starts with what ``cache`` holds.

        Raises:
            ValueError: as of the class.
            TypeError: if ``cache`` is not exactly a ``DynamicCache`` (its subclasses count positions in their own way).
        """
        if type(cache) is not DynamicCache:
            raise TypeError(f"only a DynamicCache can be turned into a GrowingCache, not a {type(cache).__name__}")
        grown = cls.__new__(cls)
        grown.__dict__.update(cache.__dict__)
        grown._grow(growth, expected_length, dtype)
        return grown

    def _grow(self, growth: float, expected_length: int | None, dtype: str | None) -> None:
        if not 1 <= growth < math.inf:
            raise ValueError(f"growth must be at least 1 and finite, not {growth}")
        if expected_length is not None and expected_length < 1:
            raise ValueError(f"expected_length must be positive or None, not {expected_length}")
        kind = None if dtype is None else kind_named(dtype)
        self.codes = dtype
        if self.layer_class_to_replicate is not None and (kind is not None or not self.offloading):
            self.layer_class_to_replicate = functools.partial(
                grown_new, growth, expected_length, kind, bool(self.offloading)
            )
        self.layers = [
            grown(layer, growth, expected_length, kind, self.offloading and not (sliding and self.only_non_sliding))
            for layer, sliding in zip(self.layers, self.is_sliding, strict=True)
        ]

    def __repr__(self) -> str:
        said = super().__repr__()
        return said if self.codes is None else f"{said.removesuffix(')')}, dtype={self.codes!r}, which is not exact)"

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """As in ``Cache``, but the copy to the GPU begins after what was asked of the GPU before.

        Else it overtakes the layer's copy to the CPU, or writes to memory that another layer still reads (up to
        transformers 5.23 the tokens then differ from run to run).
        """
        if torch.cuda.is_available():
            self.prefetch_stream.wait_stream(torch.cuda.current_stream(self.prefetch_stream.device))
        super().prefetch(layer_idx, only_non_sliding)

    @property
    def is_compileable(self) -> bool:
        """False: the buffers move, so ``generate`` must not compile around them."""
        return False

    def capacity(self, layer_idx: int = 0) -> int:
        """How many keys fit into a layer before it has to grow."""
        layer = self.layers[layer_idx]
        room = layer._held() if isinstance(layer, GrowingMixin) else None
        if room is None:
            return int(layer.get_seq_length())
        return room.capacity - room.start + getattr(layer, "shared_length", 0)

    def share(self, rows: int | None = None) -> GrowingCache:
        """Another cache that begins with all that this one holds, which is kept once for both: a prefix of many calls.

        Full-attention layers share their memory, sliding ones are copied. Both caches may be used on: what either adds,
        drops or reorders, the other does not see.

        Args:
            rows: how many rows the new cache has, a multiple of this one's, each of which comes that many times in a
                row. None: as many as this one's.

        Raises:
            ValueError: the cache holds nothing yet, or ``rows`` is no multiple of its rows.
            TypeError: it has layers that hold more than keys and values (linear attention and the like).

        >>> import torch
        >>> from hf_attn_patch import GrowingCache
        >>> prefix, token = GrowingCache(), torch.ones(1, 4, 1, 64)
        >>> with torch.no_grad():
        ...     _ = prefix.update(token.expand(1, 4, 900, 64), token.expand(1, 4, 900, 64), layer_idx=0)
        ...     cache = prefix.share(rows=8)
        ...     keys, values = cache.update(token.expand(8, 4, 1, 64), token.expand(8, 4, 1, 64), layer_idx=0)
        >>> tuple(keys.shape), prefix.get_seq_length(), cache.get_seq_length()
        ((8, 4, 901, 64), 900, 901)
        """
        before = rows_of(self.layers)
        if not before:
            raise ValueError("the cache holds nothing yet that could be shared: run the model on the prefix first")
        rows = before if rows is None else rows
        if rows < 1 or rows % before:
            raise ValueError(f"rows={rows} is no multiple of the {before} rows of the cache")
        made = copy.copy(self)
        made.layers = begin_with(self.layers, [row for row in range(before) for _ in range(rows // before)], keep=True)
        return made

    def begin_rows(self, of: Sequence[int], share: bool = True) -> None:
        """Make the batch one of ``len(of)`` rows, of which row i goes on from row ``of[i]``.

        What full-attention layers hold so far is kept once for all rows that go on from it, where it is long enough for
        that to pay.

        Args:
            share: False: each row has its own copy.
        """
        self.layers = begin_with(self.layers, of, share)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As in ``Cache``. Where rows share a prompt, only what is their own moves (``beam_idx`` is read once)."""
        if not take_rows(self.layers, beam_idx):
            super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As in ``Cache``: rows that share a prompt go on sharing it."""
        if not take_rows(self.layers, indices):
            super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in ``Cache``, but what full-attention layers hold is kept once for the rows that are repeated."""
        rows = rows_of(self.layers)
        if rows and can_begin(self.layers):
            self.begin_rows([row for row in range(rows) for _ in range(repeats)])
        else:
            super().batch_repeat_interleave(repeats)

    def trim(self) -> None:
        """Give the unused room of all layers back, say before a prefix is kept for later."""
        for layer in self.layers:
            if isinstance(layer, GrowingMixin):
                layer.trim()


class Growth(NamedTuple):
    """How somebody wants a growing cache."""

    growth: float = 1.25
    dtype: str | None = None


@dataclass(eq=False)
class _StandsBefore:
    """Stands before a method of a model's ``generate``. An object, and not a bound function: copies and pickles of the
    model take it along.

    Args:
        name: of the method.
        work: called with the method (its ``self`` given), the model, and the arguments.
        inner: the method that it stands before: the class's, or one that lay in the instance and has its ``self``.
        asked: by whom, with what growth. Nobody: it is only still there because something else stands before it.
    """

    model: Any
    name: str
    work: Callable[..., Any]
    inner: Callable[..., Any]
    bound: bool
    asked: Asked = field(default_factory=Asked)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.inner if self.bound else functools.partial(self.inner, self.model)
        return self.work(inner, self, *args, **kwargs) if self.asked else inner(*args, **kwargs)


def _prefill(inner: Callable[..., Any], standing: _StandsBefore, *args: Any, **kwargs: Any) -> Any:
    """Compute prompts that are repeated once."""
    return prefill_once(inner, standing.model, *args, **kwargs)


def _prepare(inner: Callable[..., Any], standing: _StandsBefore, *args: Any, **kwargs: Any) -> Any:
    """Make the cache that a model's ``generate`` makes a growing one. The cross-attention cache is written once, so it
    is left at its exact size."""
    wanted: Growth = standing.asked.setting
    names = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")
    given = dict(zip(names, args, strict=False)) | kwargs
    model_kwargs, expected = given["model_kwargs"], given.get("max_cache_length")
    before = {id(value) for value in model_kwargs.values()}
    result = inner(*args, **kwargs)
    if not (isinstance(expected, int) and expected > 0):
        expected = None
    for name, cache in model_kwargs.items():
        if not isinstance(cache, Cache) or id(cache) in before:  # what the user passed is the user's
            continue
        if type(cache) is DynamicCache:
            model_kwargs[name] = _growing(standing.model, cache, expected, wanted)
        elif type(cache) is EncoderDecoderCache and type(cache.self_attention_cache) is DynamicCache:
            cache.self_attention_cache = _growing(standing.model, cache.self_attention_cache, expected, wanted)
    return result


def _growing(model: Any, cache: DynamicCache, expected: int | None, wanted: Growth) -> GrowingCache:
    return make_together(model, GrowingCache.from_dynamic(cache, expected_length=expected, **wanted._asdict()))


def use_growing_cache(model: torch.nn.Module, *, growth: float = 1.25, dtype: str | None = None) -> Handle:
    """Make ``model.generate`` cache into a :class:`GrowingCache` wherever it would make a ``DynamicCache``.

    A cache that is passed to ``generate``, or another ``cache_implementation``, is respected. Wrappers (PEFT,
    ``torch.compile``) and composite models are looked through: every module that can generate is switched.

    Args:
        growth, dtype: of the cache. With ``dtype`` ("int8", "fp8") it is not exact.

    Returns:
        a handle that undoes it. Asked for several times, the last wish that was not undone counts.

    Raises:
        TypeError: if nothing in ``model`` can generate.
        ValueError: there is no such ``dtype``.
    """
    return ask_for_growing(model, object(), Growth(growth, dtype))


def ask_for_growing(model: torch.nn.Module, owner: Any, wanted: Growth = Growth()) -> Handle:  # noqa: B008
    """:func:`use_growing_cache` in the name of ``owner``, who asks once however often it asks."""
    if wanted.dtype is not None:
        kind_named(wanted.dtype)
    generators = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    if not generators:
        raise TypeError(f"{type(model).__name__} cannot generate, so it has no use for a growing cache")
    standing = []
    for module in generators:
        for name, work in ((PREPARE_CACHE, _prepare), (PREFILL, _prefill)):
            own = module.__dict__.get(name)
            if not isinstance(own, _StandsBefore):
                own = _StandsBefore(module, name, work, own or generate_method(module, name), own is not None)
                module.__dict__[name] = own
            own.asked.ask(owner, wanted)
            standing.append(own)
    return of_each(standing, functools.partial(_withdraw, owner=owner))


def codes_cached_by(model: torch.nn.Module) -> str | None:
    """The codes that ``generate`` of a model caches ("int8", "fp8"); None where it caches what is computed."""
    for module in model.modules():
        own = module.__dict__.get(PREPARE_CACHE)
        if isinstance(own, _StandsBefore) and own.asked and own.asked.setting.dtype is not None:
            return str(own.asked.setting.dtype)
    return None


def withdraw_growing(model: torch.nn.Module, owner: Any) -> None:
    """Undo :func:`ask_for_growing`."""
    for module in model.modules():
        for name in (PREPARE_CACHE, PREFILL):
            if isinstance(own := module.__dict__.get(name), _StandsBefore):
                _withdraw(own, owner)


def _withdraw(standing: _StandsBefore, owner: Any) -> None:
    """A model has its own method back once nobody asks any more (and nothing else stands before ours)."""
    own = standing.model.__dict__
    standing.asked.withdraw(owner)
    if not standing.asked and own.get(standing.name) is standing:
        if standing.bound:
            own[standing.name] = standing.inner
        else:
            del own[standing.name]
