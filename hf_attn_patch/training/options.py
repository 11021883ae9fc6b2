# ruff: noqa: RUF009  (_option is dataclasses.field with less around it)
"""Every option of an uptraining run: on the command line, in a YAML file, or both (the command line wins)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NoReturn

from hf_attn_patch.compat.python import actions_of
from hf_attn_patch.errors import TrainingError, one_line

from .loop.schedule import Count, token_budget


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


UNDER_1 = math.nextafter(1.0, 0.0)
ABOVE_0 = math.nextafter(0.0, 1.0)
#: the smallest and the largest value of numbers that have one
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("ce", "kl", "layerwise_tokens", "lr", "weight_decay", "clip", "held_out_every"), (0, math.inf)),
    **dict.fromkeys(("eval_tokens", "eval_every", "checkpoint_every"), (0, math.inf)),
    **dict.fromkeys(("tokens", "pretraining_tokens", "batch_size", "micro_batch_size", "lora_rank"), (1, math.inf)),
    **dict.fromkeys(("keep", "log_every"), (1, math.inf)),
    **dict.fromkeys(("alpha", "temperature", "peak_tflops"), (ABOVE_0, math.inf)),
    **dict.fromkeys(("lr_floor", "warmup"), (0, 1)),
    **dict.fromkeys(("beta1", "beta2"), (0, UNDER_1)),
    "sequence_length": (2, math.inf),
    "seed": (0, 2**32 - 1),
}


@dataclass
class UptrainOptions:
    """Options of examples/uptrain.py; in YAML they have the same names, with underscores."""

    # what is trained, on what
    model: str = _option("", "The model to train: a folder or a hub id.")
    teacher: str | None = _option(None, "The model to distil from, usually the one that was converted.")
    output: str = _option("uptrained", "Folder for the trained model, best/ and checkpoints/.")
    objective: Literal["auto", "causal", "seq2seq", "encoder"] = _option("auto", "The loss; auto asks the config.")
    dataset: str = _option("", "A data set of the hub or of a folder, or a file or folder of text, JSONL or Parquet.")
    dataset_config: str | None = _option(None, "The hub data set's configuration.")
    dataset_split: str = _option("train", "The hub data set's split.")
    dataset_glob: str | None = _option(None, "Which files of a folder, such as '**/*.py'.")
    text_field: str = _option("text", "The field that holds the text.")
    source_field: str | None = _option(None, "Sequence to sequence: the field of the input ...")
    target_field: str | None = _option(None, "... and of the output. Without them: span corruption of the text.")
    text_unit: Literal["auto", "file", "paragraph", "line"] = _option("auto", "One document of plain text.")
    # how much
    tokens: Count | None = _option(None, "Train on so many tokens: 50M, 1.5B.")
    alpha: float | None = _option(None, "Or on this share of the pretraining tokens (0.05 in the GQA paper).")
    pretraining_tokens: Count | None = _option(None, "The tokens that the model was pretrained on, for --alpha.")
    sequence_length: int = _option(2048, "Tokens in a packed sequence (S).")
    batch_size: int = _option(16, "Sequences in an optimiser step, over all processes.")
    micro_batch_size: int = _option(1, "Sequences at a time on each process; the rest is accumulated.")
    # loss
    ce: float | None = _option(None, "Weight of cross-entropy (default: 1 without a teacher, 0 with one).")
    kl: float | None = _option(None, "Weight of KL to the teacher (default: 1 with a teacher).")
    temperature: float = _option(1.0, "Softens both distributions in KL.")
    layerwise_tokens: Count = _option(Count(0), "First fit each layer's attention to the teacher's on so many tokens.")
    # optimiser
    mode: Literal["full", "attention", "lora"] = _option("full", "Train all weights, attention only, or adapters.")
    lora_rank: int = _option(16, "Rank of the adapters.")
    lora_alpha: float = _option(32.0, "Scale of the adapters.")
    lora_targets: str = _option("attention", "attention, all-linear, or module names separated by commas.")
    lr: float = _option(1e-4, "Peak learning rate.")
    lr_floor: float = _option(0.0, "Share of the peak at the end.")
    warmup: float = _option(0.02, "Share of the tokens over which the rate rises.")
    decay: Literal["cosine", "linear", "wsd", "constant"] = _option("cosine", "How the rate falls.")
    weight_decay: float = _option(0.1, "Of matrices.")
    beta1: float = _option(0.9, "Of AdamW.")
    beta2: float = _option(0.95, "Of AdamW.")
    clip: float = _option(1.0, "Largest norm of the gradient; 0 leaves it.")
    seed: int = _option(0, "Of the data's order, the adapters and dropout.")
    shuffle: bool = _option(True, "Shuffle the documents (in blocks).")
    packed: bool = _option(True, "Pack documents without padding; false pads, for models without packing.")
    # machine
    precision: Literal["auto", "no", "bf16", "fp16"] = _option("auto", "auto: accelerate's config, else bf16 on GPUs.")
    dtype: Literal["float32", "bfloat16"] = _option("float32", "Of the trained weights and the optimiser's state.")
    gradient_checkpointing: bool = _option(False, "Recompute activations: less memory, a third slower.")
    compile: bool = _option(False, "torch.compile each layer.")
    attn_implementation: str = _option("hf_attn_patch", "Attention of student and teacher.")
    peak_tflops: float | None = _option(None, "Of one accelerator, for MFU (default: by its name).")
    # seeing and keeping
    eval_dataset: str | None = _option(None, "Held-out text (default: some documents of --dataset).")
    held_out_every: int = _option(100, "Hold out every so many-th document of --dataset; 0 for none.")
    eval_tokens: Count = _option(Count(200_000), "Evaluate on at most so many held-out tokens; 0 for never.")
    eval_every: int | None = _option(
        None, "Steps between evaluations (default: a tenth of the run); also at both ends; 0: only there."
    )
    checkpoint_every: int | None = _option(None, "Steps between checkpoints (default: a tenth of the run); 0: none.")
    keep: int = _option(1, "Checkpoints that stay.")
    resume: bool = _option(False, "Go on from the newest checkpoint in --output, if there is one.")
    overwrite: bool = _option(False, "Replace what another run has left in --output.")
    log_every: int = _option(1, "Steps between two lines for the trackers.")
    log_with: str | None = _option(None, "Trackers of accelerate: tensorboard, trackio, wandb, ... or all.")

    @property
    def budget(self) -> int:
        """The tokens of the main phase."""
        return token_budget(self.tokens, self.alpha, self.pretraining_tokens)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def loss_weights(self) -> tuple[float, float]:
        """(ce, kl), with the defaults that depend on the teacher."""
        taught = self.teacher is not None
        return (float(not taught) if self.ce is None else self.ce, float(taught) if self.kl is None else self.kl)

    @property
    def lasting(self) -> dict[str, Any]:
        """What must be the same when a run is continued: all but where and how it is watched."""
        free = {"output", "resume", "overwrite", "keep", "log_every", "log_with", "micro_batch_size"}
        free |= {"gradient_checkpointing", "compile", "peak_tflops", "checkpoint_every", "eval_every"}
        return {k: v for k, v in asdict(self).items() if k not in free}

    def due(self, step: int, tokens: tuple[int, int], every: int | None) -> bool:
        """Whether what happens every so many steps (None: ten times in the run) and at the end is due; 0: never.

        Args:
            step: the step that has ended.
            tokens: trained on before it and after it.
        """
        total = self.layerwise_tokens + self.budget
        before, after = (10 * n // total for n in tokens)
        last = tokens[1] >= total
        return last or before < after if every is None else bool(every) and (last or step % every == 0)

    def validate(self) -> None:
        """Raises TrainingError for what can be seen to be wrong before anything is loaded."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # which NaN is not either
                low = "above 0" if least == ABOVE_0 else f"at least {least:g}"
                high = {math.inf: "", UNDER_1: " and under 1"}.get(most, f" and at most {most:,.0f}")
                raise TrainingError(f"--{name.replace('_', '-')} {value}: it must be {low}{high}")
        missing = [f"--{name}" for name in ("model", "dataset") if not getattr(self, name)]
        if missing:
            raise TrainingError(f"{' and '.join(missing)} must be given")
        ce, kl = self.loss_weights
        if self.teacher is None and (kl or self.layerwise_tokens):
            raise TrainingError("--kl and --layerwise-tokens need a --teacher")
        if ce + kl <= 0:
            raise TrainingError(f"the loss would be nothing: --ce {ce} and --kl {kl}; one must be above 0")
        if (self.source_field is None) != (self.target_field is None):
            raise TrainingError("--source-field and --target-field go together")
        if self.held_out_every == 1 and self.eval_tokens and self.eval_dataset is None:
            raise TrainingError("--held-out-every 1 holds out all of --dataset; nothing would be left to train on")
        if self.resume and self.overwrite:
            raise TrainingError("--resume goes on with what is in --output, --overwrite replaces it; choose one")
        if self.budget < self.tokens_per_step:
            raise TrainingError(
                f"{self.budget} tokens are less than one step of {self.tokens_per_step} (--batch-size "
                f"{self.batch_size} sequences of {self.sequence_length}); train on more, or in smaller steps"
            )


def parse_options(arguments: Sequence[str] | None = None, description: str | None = None) -> UptrainOptions:
    """Options from a command line; ``--config FILE.yaml`` gives defaults.

    >>> parse_options(["--model", "m", "--dataset", "d", "--tokens", "50M"]).tokens
    50000000

    Raises:
        TrainingError: an option does not exist or can't be read, here or in the file, or options contradict each other.
        SystemExit: after ``--help``.
    """
    from transformers import HfArgumentParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # no abbreviations: an option that a later version adds must not change what a script means
    parser = HfArgumentParser(UptrainOptions, description=description, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]
    for action in actions_of(parser):  # HfArgumentParser gives --no_shuffle the words and the default of --shuffle
        if action.nargs == 0 and action.const is False:
            action.help, action.default = f"Short for --{action.dest} false.", argparse.SUPPRESS
    parser.add_argument("--config", help="A YAML file with options.")
    path = parser.parse_known_args(arguments)[0].config
    if path is not None:
        arguments = [*yaml_arguments(path), *arguments]  # what comes later wins
    *found, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        raise TrainingError(f"there is no option {' '.join(rest)}; --help lists all")
    options: UptrainOptions = found[0]
    options.validate()
    return options


def _refuse(message: str) -> NoReturn:
    """In place of argparse's usage of sixty options."""
    raise TrainingError(message)


def yaml_arguments(path: str) -> list[str]:
    """A YAML file's options as they would be on the command line, which so judges both alike.

    Raises:
        TrainingError: it can't be read, or has an option that does not exist.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"--config {path} can't be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise TrainingError(f"--config {path} is no list of options: each line is NAME: VALUE")
    given = {str(name).replace("-", "_"): value for name, value in found.items()}
    unknown = sorted(set(given) - {f.name for f in fields(UptrainOptions)})
    if unknown:
        raise TrainingError(f"--config {path} has unknown options: {', '.join(unknown)}; --help lists all")
    for f in fields(UptrainOptions):  # YAML reads the bare word no as false
        if isinstance(given.get(f.name), bool) and f.type != "bool":
            given[f.name] = "yes" if given[f.name] else "no"
    return [f"--{name}={_one_value(path, name, value)}" for name, value in given.items() if value is not None]


def _one_value(path: str, name: str, value: Any) -> Any:
    """A YAML value as the command line takes it: names of modules may be a list."""
    if name == "lora_targets" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if isinstance(value, (list, dict)):
        raise TrainingError(f"--config {path}: {name} takes one value, not a {type(value).__name__}")
    return value
