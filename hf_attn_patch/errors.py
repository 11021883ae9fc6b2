"""The errors that users can cause: each message names the thing and the way out, in one sentence.

>>> import hf_attn_patch
>>> try:
...     hf_attn_patch.KVGrouping(8, 3)
... except hf_attn_patch.HFAttnError as error:
...     print(error)
8 query heads cannot share 3 KV heads evenly; choose one of 1, 2, 4, 8
"""

from __future__ import annotations

#: characters of a message at most; what it quotes of a file may be of any length
LONGEST = 1200


class HFAttnError(Exception):
    """What every error of this package is that a user can cause, and nothing else is.

    A message is shortened in its middle beyond :data:`LONGEST` characters.

    >>> len(str(HFAttnError(f"layer_types is {['full_attention'] * 10_000}, which no model has"))) <= LONGEST
    True
    """

    def __init__(self, message: object = "", *more: object) -> None:
        text = message
        if isinstance(message, str) and len(message) > LONGEST:
            text = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 + 10 :]}"
        super().__init__(text, *more)


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


def one_line(error: object) -> str:
    """What another package's error says, for one of our sentences: on one line, 300 characters at most.

    >>> one_line(ValueError("no such file\\n  and a long story"))
    'no such file and a long story'
    """
    return " ".join(str(error).split())[:300]


def sentence_of(error: Exception) -> str | None:
    """What to tell of an error that a user, the disk or a lack of memory caused; None for a fault of ours.

    >>> sentence_of(FileNotFoundError(2, "No such file or directory", "a.png"))
    'a.png cannot be used: No such file or directory'
    >>> sentence_of(KeyError("x"))
    """
    if isinstance(error, HFAttnError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be used: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        where = "this machine" if isinstance(error, MemoryError) else "the GPU"
        return (
            f"{where} has not enough memory for this; what helps: fewer tokens at a time (--context, "
            "--calibration-length), --device cpu, or no other program beside it"
        )
    return None
