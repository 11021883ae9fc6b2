"""The adapter: what transformers calls, and what reaches into transformers."""
