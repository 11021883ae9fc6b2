"""Uptraining: what examples/uptrain.py is made of.

Data that is streamed, packed and resumable at a token; losses that never make whole logits; checkpoints that are
there whole or not at all. Needs ``pip install 'hf-attn-patch[train]'`` (accelerate, datasets, peft).
"""

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import Head, LossSums, linear_loss

from .data.packing import pack
from .data.steps import TrainingStep, ahead, document_lengths
from .data.stream import Position, TokenStream
from .loop.checkpoints import Progress, load_checkpoint, save_checkpoint
from .loop.held_out import trained_value
from .loop.interrupts import StopSignals
from .loop.launcher import told_to_launcher
from .loop.meters import Flops, Throughput
from .loop.output import claimed_output
from .loop.schedule import Count, learning_rate
from .options import UptrainOptions, parse_options
from .run import StepResult, TrainingRun, load_run

__all__ = [
    "Count",
    "Flops",
    "Head",
    "LossSums",
    "Position",
    "Progress",
    "StepResult",
    "StopSignals",
    "Throughput",
    "TokenStream",
    "TrainingError",
    "TrainingRun",
    "TrainingStep",
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
    "told_to_launcher",
    "trained_value",
]
