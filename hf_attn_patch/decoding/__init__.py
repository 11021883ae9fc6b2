"""Decoding steps that are recorded once and run again."""
