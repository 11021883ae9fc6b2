"""A model's call by its arguments' names, whichever transformers named them, and the cache in what it returns.

For what stands before a forward (hooks, recorded steps) and sees the call as its caller wrote it: a cache may come by
position, as ``cache=`` or as ``past_key_values=``. Known for transformers 5.17 to 5.24; names are read off signatures
and outputs (:mod:`.cache_keyword`), so the old ones are not used where they warn.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache

from .cache_keyword import NAMES, keyword_of, take_cache
from .ground import changed


class Arguments:
    """How a module's forward names its arguments.

    Args:
        module: its own ``forward`` is asked where one lies in the instance (accelerate's), unless that names nothing
            (``*args, **kwargs``); else its class's.

    Attributes:
        names: of all that it names, in their order.
        rest: the name of its ``**kwargs``, "" if it has none.
        cache: its name for the KV cache; "" if it names none.

    >>> from transformers import GPT2Config, GPT2LMHeadModel, DynamicCache
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    >>> arguments, cache = Arguments(model), DynamicCache()
    >>> [arguments.by_name((), {name: cache})[arguments.cache] is cache for name in ("cache", "past_key_values")]
    [True, True]
    """

    def __init__(self, module: torch.nn.Module) -> None:
        parameters = list(inspect.signature(module.forward).parameters.values())
        if not any(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
            parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self._positional = tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = (*self._positional, *(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY))
        self.rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), "")
        self.cache = next((name for name in NAMES if name in self.names), "")
        self._owner = type(module).__name__
        self._other_names = frozenset(NAMES) - {self.cache} if self.cache else frozenset()

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All that a call gives, as keyword arguments, the cache under the forward's own name for it.

        Raises:
            TypeError: as the forward itself would, for arguments that it cannot have; or two different caches.
        """
        given = dict(zip(self._positional, args, strict=False))
        if len(args) > len(self._positional) or not given.keys().isdisjoint(kwargs):
            raise TypeError(
                f"forward() got {len(args)} positional arguments, for {', '.join(self._positional)}, and by name "
                f"{', '.join(kwargs)}"
            )
        given.update(kwargs)
        if self.renames(given):
            cache = take_cache(given)
            if cache is not None:
                given[self.cache] = cache
        return given

    def refuse_unknown_cache(self, given: dict[str, Any]) -> None:
        """For who changes what a cache is filled with.

        Args:
            given: by :meth:`by_name`.

        Raises:
            CompatError: a cache is among them under a name that nobody here knows.
        """
        for name, value in given.items() if given.get(self.cache) is None else ():
            if isinstance(value, Cache) and name not in NAMES:
                raise changed("transformers", f"the name {name!r} under which {self._owner} takes a cache")

    def renames(self, kwargs: dict[str, Any]) -> bool:
        """Whether a cache is among ``kwargs`` under another name than the forward's own."""
        return not self._other_names.isdisjoint(kwargs)


def generate_keyword() -> str:
    """The keyword by which ``generate`` takes a cache, in the transformers that is installed: a way for scripts.

    >>> generate_keyword() in ("cache", "past_key_values")
    True
    """
    from transformers import GenerationMixin

    return keyword_of(GenerationMixin.prepare_inputs_for_generation)


def cache_of(named: Any) -> Any:
    """The cache in what a forward or ``generate`` returned (a ``ModelOutput``), or among keyword arguments, by any of
    its names; None if there is none, as in a tuple.

    >>> from transformers.modeling_outputs import BaseModelOutputWithPast
    >>> name = keyword_of(BaseModelOutputWithPast)
    >>> cache_of(BaseModelOutputWithPast(**{name: (1, 2)})), cache_of({"cache": None, "layer_past": 3}), cache_of((1,))
    ((1, 2), 3, None)
    """
    names = named.keys() if isinstance(named, dict) else ()  # `in` of a ModelOutput maps old names, and warns
    return next((named[name] for name in NAMES if name in names and named[name] is not None), None)
