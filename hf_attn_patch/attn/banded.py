"""What all kinds of visibility share: sizes, the facts that decide who runs a call, causality and a window."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import memo

#: how many keys to the left and to the right of its own position a query may see; None is unbounded
Sides = tuple[int | None, int | None]
NO_WINDOW: Sides = (None, None)

T = TypeVar("T")


def band(q: Tensor, k: Tensor, sides: Sides) -> Tensor:
    """Causality and window (:attr:`Banded.sides`) between positions q and k (broadcast): bool."""
    left, right = sides
    mask = torch.ones((), dtype=torch.bool, device=q.device).expand(torch.broadcast_shapes(q.shape, k.shape))
    if right is not None:
        mask = k <= q + right
    if left is not None:
        mask = mask & (k >= q - left)
    return mask


class VisibilityFacts(NamedTuple):
    """What of a visibility decides who can run a call: no tensor, so it can be compared and hashed."""

    kind: str
    causal: bool
    window: Sides
    keys: int
    whole: bool
    per_head_mask: bool


@dataclass(frozen=True, eq=False)
class Sizes:
    """What all four have: the sizes of the call, and the forms that were worked out from them."""

    kind: ClassVar[str]
    #: whether calls share it that know nothing of each other
    shared: ClassVar[bool] = False

    batch: int
    q_len: int
    kv_len: int

    def form(self, key: Hashable, make: Callable[[], T], device: torch.device | None = None) -> T:
        """What ``make`` makes of it (for ``device``), made by who asks first and kept with it: see :func:`memo.once`.

        >>> sizes = Sizes(2, 3, 5)
        >>> sizes.form("area", lambda: sizes.q_len * sizes.kv_len), sizes.form("area", lambda: 0)
        (15, 15)
        """
        return memo.once(self, key, make, device, shared=self.shared)


@dataclass(frozen=True, eq=False)
class Banded(Sizes):
    """What the three that are no written-out mask have: causality and a window, on the keys that are left of a cut.

    ``causal`` and ``window`` are aligned at the lower right: the last query of a row or document sits at its last key.
    ``start`` and ``stop`` (None: the end) cut the key axis, so that static buffers are never read beyond what was
    written.
    """

    causal: bool = False
    window: Sides = NO_WINDOW
    start: int = 0
    stop: int | None = None

    @property
    def keys(self) -> int:
        """Length of the key axis that is left after ``start`` and ``stop``."""
        return (self.kv_len if self.stop is None else self.stop) - self.start

    @property
    def whole(self) -> bool:
        """Whether ``start`` and ``stop`` leave all keys."""
        return self.start == 0 and (self.stop is None or self.stop == self.kv_len)

    @property
    def sides(self) -> Sides:
        """The window, with what causality leaves of it."""
        left, right = self.window
        return left, (0 if right is None else min(right, 0)) if self.causal else right

    @property
    def banded(self) -> bool:
        """Whether causality or a window hide anything at all."""
        return self.causal or self.window != NO_WINDOW

    def told(self) -> VisibilityFacts:
        """:attr:`facts`, worked out anew."""
        return VisibilityFacts(self.kind, self.causal, self.window, self.keys, self.whole, False)

    @functools.cached_property
    def facts(self) -> VisibilityFacts:
        """What of it decides who can run a call."""
        return self.told()

    def band(self, device: torch.device) -> Tensor:
        """Bool [1, 1, Sq, keys]: causality and the window alone."""
        q = torch.arange(self.q_len, device=device)[:, None]
        k = torch.arange(self.keys, device=device)[None, :]
        return band(q + (self.keys - self.q_len), k, self.sides)[None, None]
