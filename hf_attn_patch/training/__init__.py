"""Uptraining: what examples/uptrain.py is made of.

Data that is streamed, packed and resumable at a token; losses that never make whole logits; checkpoints that are
there whole or not at all. Needs ``pip install 'hf-attn-patch[train]'`` (accelerate, datasets, peft).
"""

from .checkpoints import Progress, load_checkpoint, save_checkpoint
from .errors import TrainingError
from .evaluation import trained_value
from .interrupts import StopSignals
from .losses import Head, LossSums, linear_loss
from .meters import Flops, Throughput
from .options import UptrainOptions, parse_options
from .output import claimed_output
from .packing import pack
from .run import Run, load_run
from .schedule import Count, learning_rate
from .steps import ahead, document_lengths
from .stream import Position, TokenStream

__all__ = [
    "Count",
    "Flops",
    "Head",
    "LossSums",
    "Position",
    "Progress",
    "Run",
    "StopSignals",
    "Throughput",
    "TokenStream",
    "TrainingError",
    "UptrainOptions",
    "ahead",
    "claimed_output",
    "document_lengths",
    "learning_rate",
    "linear_loss",
    "load_checkpoint",
    "load_run",
    "pack",
    "parse_options",
    "save_checkpoint",
    "trained_value",
]
