"""Who shares a KV head with whom. Integers only: every other module asks here.

Query head ``h`` of ``HQ`` reads KV head ``h // G`` of ``HKV``, with ``G = HQ // HKV`` (the order that transformers,
vLLM and FlashAttention use).
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_patch.errors import GroupingError


@dataclass(frozen=True, slots=True)
class KVGrouping:
    """How ``num_heads`` query heads (HQ) share ``num_kv_heads`` KV heads (HKV).

    >>> g = KVGrouping(num_heads=8, num_kv_heads=2)
    >>> g.group_size, g.kind
    (4, 'GQA')
    >>> g.kv_head(5)
    1
    >>> list(g.query_heads(1))
    [4, 5, 6, 7]

    Raises:
        GroupingError: a number is below 1, or ``num_heads`` is not a multiple of ``num_kv_heads``.
    """

    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_kv_heads < 1:
            raise GroupingError(
                f"{self.num_heads} query heads with {self.num_kv_heads} KV heads: both numbers must be at least 1"
            )
        if self.num_heads % self.num_kv_heads:
            choices = ", ".join(str(n) for n in divisors(self.num_heads))
            raise GroupingError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly; "
                f"choose one of {choices}"
            )

    @property
    def group_size(self) -> int:
        """G: query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kind(self) -> str:
        """'MHA', 'GQA' or 'MQA' (one head of each is MHA)."""
        if self.group_size == 1:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_head(self, query_head: int) -> int:
        """The KV head that ``query_head`` reads."""
        if not 0 <= query_head < self.num_heads:
            raise IndexError(f"query head {query_head} of {self.num_heads}")
        return query_head // self.group_size

    def query_heads(self, kv_head: int) -> range:
        """The query heads that read ``kv_head``."""
        if not 0 <= kv_head < self.num_kv_heads:
            raise IndexError(f"KV head {kv_head} of {self.num_kv_heads}")
        return range(kv_head * self.group_size, (kv_head + 1) * self.group_size)

    def merged(self, num_kv_heads: int) -> tuple[range, ...]:
        """For each KV head after a merge down to ``num_kv_heads``: the present KV heads that it replaces.

        >>> [list(r) for r in KVGrouping(8, 4).merged(2)]
        [[0, 1], [2, 3]]
        """
        if num_kv_heads > self.num_kv_heads:
            raise GroupingError(f"{self.num_kv_heads} KV heads cannot be merged into {num_kv_heads}: that is more")
        step = KVGrouping(self.num_kv_heads, num_kv_heads).group_size
        return tuple(range(i * step, (i + 1) * step) for i in range(num_kv_heads))


def divisors(n: int) -> tuple[int, ...]:
    """Every number that divides ``n``, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    return tuple(d for d in range(1, n + 1) if n % d == 0)
