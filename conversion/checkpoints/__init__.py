"""Checkpoints as files: headers, tensors, shards; read and written without loading a model."""
