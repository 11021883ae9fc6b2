"""Attention itself: knows torch, and nothing of transformers."""
