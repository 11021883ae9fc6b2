"""Converted checkpoints in other people's engines: the same greedy tokens and log probabilities as transformers.

``run.py`` converts and knows the right answers; a worker (``*_worker.py``) asks one engine inside the engine's own
environment, which has nothing of this package. They talk by two JSON files.
"""
