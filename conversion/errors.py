"""The one error of this package that a user can cause."""

from __future__ import annotations


class ConversionError(ValueError):
    """What was asked for cannot be done; the message is one sentence that names the thing and the way out.

    The command line prints it on stderr and ends with exit code 2.
    """
