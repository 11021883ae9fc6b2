"""The errors that users can cause: each message names the thing and the way out, in one sentence.

>>> import hf_attn_patch
>>> try:
...     hf_attn_patch.KVGrouping(8, 3)
... except hf_attn_patch.HFAttnError as error:
...     print(error)
8 query heads cannot share 3 KV heads evenly; choose one of 1, 2, 4, 8
"""

from __future__ import annotations


class HFAttnError(Exception):
    """What every error of this package is that a user can cause, and nothing else is."""


class AttentionError(HFAttnError, ValueError):
    """A request that cannot be run exactly; the message names it and the way out."""


class GroupingError(HFAttnError, ValueError):
    """The numbers of query heads and KV heads do not go together."""


class ConversionError(HFAttnError, ValueError):
    """A conversion that was asked for cannot be done; the message is one sentence that names the thing and the way out.

    The command line prints it on stderr and ends with exit code 2.
    """


class TrainingError(HFAttnError, ValueError):
    """The run cannot start, or cannot go on, for a reason that its owner can change."""
