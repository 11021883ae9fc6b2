"""The errors that users can cause."""


class AttentionError(ValueError):
    """A request that cannot be run exactly; the message names it and the way out."""
