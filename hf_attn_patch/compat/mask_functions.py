"""transformers' mask functions taken apart: closures of ``transformers.masking_utils``, known from 5.17 to 5.24.

A mask function is a closure ``f(batch, head, query, key) -> bool``; what it means is told by the name of the function
that made it and by what it closes over. Both are compared with what is known, and once in a process each of them is
called on a small example and compared with the formula that it is read as. A function of the module that is anything
else is refused, and so is one of another module of transformers that is no model's: read wrongly, masks would be wrong
without a word.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .ground import CompatError, changed

MODULE = "transformers.masking_utils"
#: transformers' maker (or the function itself) -> the inner function, and the names that it closes over
KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "causal_mask_function": ("", ()),
    "bidirectional_mask_function": ("", ()),
    "and_masks": ("and_mask", ("mask_functions",)),
    "or_masks": ("or_mask", ("mask_functions",)),
    "sliding_window_overlay": ("inner_mask", ("sliding_window",)),
    "sliding_window_bidirectional_overlay": ("inner_mask", ("sliding_window",)),
    "chunked_overlay": ("inner_mask", ("chunk_size", "left_padding")),
    "blockwise_overlay": ("inner_mask", ("block_sequence_ids",)),
    "packed_sequence_mask_function": ("inner_mask", ("packed_sequence_mask",)),
    "remap_positions_for_packed_sequence": ("inner_mask", ("mask_function", "position_ids")),
    "padding_mask_function": ("inner_mask", ("padding_mask",)),
    "add_offsets_to_mask_function": ("inner_mask", ("kv_offset", "mask_function", "q_offset")),
}


class MaskFunction(NamedTuple):
    """One of transformers' mask functions: the name of what made it, and what it closes over."""

    name: str
    values: dict[str, Any]


def taken_apart(function: Callable[..., Any]) -> MaskFunction | None:
    """One of transformers' mask functions by its name and values; None for a function of anybody else.

    Raises:
        CompatError: a function of transformers' own that is not known, or no longer means what it did.

    >>> from transformers.masking_utils import sliding_window_overlay
    >>> taken_apart(sliding_window_overlay(4))
    MaskFunction(name='sliding_window_overlay', values={'sliding_window': 4})
    """
    module = getattr(function, "__module__", None) or ""
    if module != MODULE:
        # models make functions of their own, which are theirs; any other place would be one where these have moved
        if module.partition(".")[0] == "transformers" and not module.startswith("transformers.models."):
            raise _unknown(getattr(function, "__qualname__", type(function).__qualname__).partition(".")[0], module)
        return None
    maker, _, inner = getattr(function, "__qualname__", type(function).__qualname__).partition(".<locals>.")
    code = getattr(function, "__code__", None)
    names = code.co_freevars if code is not None else ()
    if maker not in KNOWN or (inner, tuple(sorted(names))) != KNOWN[maker]:
        raise _unknown(maker)
    cells = getattr(function, "__closure__", None) or ()
    _hold_to_example(maker)
    return MaskFunction(maker, {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)})


def _unknown(maker: str, module: str = MODULE) -> CompatError:
    return changed("transformers", f"the mask function {module}.{maker}")


_S = 6
_IDS = [0, 0, 1, 1, 1, -1]
_POSITIONS = [0, 1, 0, 1, 2, 0]


def _odd_key(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k % 2 == 1) & (q >= 0)


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def _examples() -> dict[str, tuple[tuple[Any, ...], Callable[[int, int], bool]]]:
    """Maker -> arguments, and the formula of (query, key) that its function is read as."""
    ids, positions = (torch.tensor([values], device="cpu") for values in (_IDS, _POSITIONS))
    return {
        "causal_mask_function": ((), lambda q, k: k <= q),
        "bidirectional_mask_function": ((), lambda q, k: True),
        "and_masks": ((_odd_key, _causal), lambda q, k: k % 2 == 1 and k <= q),
        "or_masks": ((_odd_key, _causal), lambda q, k: k % 2 == 1 or k <= q),
        "sliding_window_overlay": ((2,), lambda q, k: q - k <= 1),
        "sliding_window_bidirectional_overlay": ((2,), lambda q, k: abs(q - k) <= 2),
        "chunked_overlay": ((2, torch.tensor([1], device="cpu")), lambda q, k: (q - 1) // 2 == (k - 1) // 2),
        "blockwise_overlay": ((ids,), lambda q, k: _IDS[q] == _IDS[k] >= 0),
        "packed_sequence_mask_function": ((ids,), lambda q, k: _IDS[q] == _IDS[k]),
        "remap_positions_for_packed_sequence": ((_causal, positions), lambda q, k: _POSITIONS[k] <= _POSITIONS[q]),
        "padding_mask_function": ((ids >= 1,), lambda q, k: _IDS[k] >= 1),
        "add_offsets_to_mask_function": ((_causal, 2, 1), lambda q, k: k + 1 <= q + 2),
    }


def _hold_to_example(maker: str) -> None:
    from transformers import masking_utils

    _check(maker, getattr(masking_utils, maker, None))


@functools.cache
def _check(maker: str, make: Any) -> None:
    """Raise if what ``make`` makes of the example is not what it is read as."""
    with torch.utils._python_dispatch._disable_current_modes():  # fake tensors and the like have no values
        arguments, formula = _examples()[maker]
        try:
            function = make(*arguments) if arguments else make
            index = torch.arange(_S, device="cpu")
            zero = torch.zeros((), dtype=torch.long, device="cpu")
            found = function(zero, zero, index[:, None], index[None, :]).expand(_S, _S).tolist()
        except Exception as error:  # other parameters, say
            raise _unknown(maker) from error
    if any(found[q][k] != formula(q, k) for q, k in itertools.product(range(_S), range(_S))):
        raise _unknown(maker)
