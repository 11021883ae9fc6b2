"""From documents to the batches of a training step."""

from __future__ import annotations

from hf_attn_patch.moved import names_from

__getattr__ = names_from("hf_attn_patch.training.data.training_data", ["Framing", "TrainingData", "framing_for"])
