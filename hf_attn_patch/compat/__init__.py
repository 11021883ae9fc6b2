"""The only place that touches private names of others: one small function for each thing that is read or changed.

``transformers.py`` (accelerate too), ``torch.py``, ``triton.py`` and ``python.py``. Each function says for which
versions it is known (:func:`.ground.known`), and says in one sentence what to do where the ground has changed. Nothing
private is touched when these files are imported, so that a change ends the feature that needs it and not
``import hf_attn_patch``. ``tests/compat/test_private_names.py`` holds the rest of the code to it.
"""
