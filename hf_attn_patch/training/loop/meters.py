"""Tokens a second, and model FLOPs utilisation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_attn_patch.training.model.trainable import is_projection

#: dense bf16 TFLOPS from the makers' data sheets; the longest matching name counts
PEAK_TFLOPS = {
    "B200": 2250.0, "GB200": 2500.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0,
    "A100": 312.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX 6000 Ada": 364.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0, "MI300X": 1307.0, "MI325X": 1307.0, "MI250X": 383.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """The accelerator's dense bf16 peak, or None if it is not known.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("a toaster")
    (989.0, 756.0, None)
    """
    names = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(names, key=len)] if names else None


class Flops:
    """Floating-point operations of a model's training step (2 per multiplication and addition).

    Per token: 2 N forward through the N weights of its matrices, 2 N for the gradient of its activations, and 2 for
    each weight that is trained. Attention adds 4 s^2 HQ D per document of s tokens, layer and pass, half of it if
    causal, and twice that backward. Recomputation (gradient checkpointing) does not count: it is not the model's.
    """

    def __init__(self, model: nn.Module, *, causal: bool = True, forward_only: bool = False) -> None:
        matrices = [m for m in model.modules() if is_projection(m)]
        weights = [p for m in matrices for p in m.parameters() if p.dim() == 2]
        self.weights = sum(p.numel() for p in weights)
        trained = sum(p.numel() for p in weights if p.requires_grad)
        self.per_token = 2.0 * self.weights if forward_only else 4.0 * self.weights + 2.0 * trained
        config: Any = model.config
        if config.is_encoder_decoder:  # a token passes through one of two halves
            self.per_token /= 2
        config = config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.per_square = (2.0 if causal else 4.0) * width * config.num_hidden_layers * (1.0 if forward_only else 3.0)

    def of(self, lengths: Sequence[int]) -> float:
        """For documents of these lengths."""
        return self.per_token * sum(lengths) + self.per_square * sum(n * n for n in lengths)


class Throughput:
    """A running rate that forgets the past slowly, so that a slow start does not linger."""

    def __init__(self, peak_flops: float | None = None, memory: float = 0.9) -> None:
        self.peak, self.memory = peak_flops, memory
        self._tokens = self._flops = self._seconds = 0.0
        self.steps: list[tuple[float, int, float]] = []  # seconds, tokens, operations of every step of this process
        self._last = time.perf_counter()

    def pause(self) -> None:
        """What happened since the last step (evaluation, a checkpoint) is not training time."""
        self._last = time.perf_counter()

    def step(self, tokens: int, flops: float) -> None:
        """One step of all processes has ended."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._tokens = self.memory * self._tokens + tokens
        self._flops = self.memory * self._flops + flops
        self._seconds = self.memory * self._seconds + seconds
        self.steps.append((seconds, tokens, flops))

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """The share of all accelerators' peak that the model's own arithmetic makes up."""
        if self.peak is None or not self._seconds:
            return None
        return self._flops / self._seconds / self.peak
