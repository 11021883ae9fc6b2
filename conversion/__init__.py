"""Trained multi-head checkpoints into grouped-query ones."""
