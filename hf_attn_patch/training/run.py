"""Everything a run needs, loaded and checked against each other."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.documents.bars import no_progress_bars, progress_bar
from hf_attn_patch.documents.tokenizers import load_tokenizer
from hf_attn_patch.errors import TrainingError

from .data.steps import TrainingStep, micro_batches
from .data.training_data import TrainingData, framing_for
from .loop.checkpoints import Progress, save_checkpoint, save_model
from .loop.held_out import evaluate
from .loop.log import RunLog
from .loop.meters import Throughput, peak_tflops
from .loop.out_of_memory import out_of_memory_advice
from .loop.output import CHECKPOINTS
from .loop.run_card import write_card
from .model import zero
from .model.objectives import Objective
from .model.precision import keep_fp32_in_fsdp2, round_between_layers
from .model.teacher import TeacherCall, place_teacher
from .model.trainable import as_saved, choose_trainable, merged_state, parameter_groups
from .models import Kind, load_config, load_student, load_teacher, make_objective, objective_kind
from .options import UptrainOptions


class StepResult(NamedTuple):
    """Losses per label over the whole step, the gradient's norm and the signal that asked to stop (or 0)."""

    loss: float
    ce: float
    kl: float
    grad_norm: float
    asked: int


@dataclass
class TrainingRun:
    """The parts of a run; ``objective`` and ``optimizer`` are still to be prepared by ``accelerator``."""

    options: UptrainOptions
    accelerator: Any
    kind: Kind
    tokenizer: Any
    data: TrainingData
    student: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    teacher: TeacherCall | None
    saved_dtype: torch.dtype
    log: RunLog
    speed: Throughput = field(default_factory=Throughput)

    @property
    def teacher_model(self) -> Any:
        assert self.teacher is not None
        return self.teacher.objective.model

    @property
    def peak_flops(self) -> float | None:
        """Of all processes' accelerators together; None where it is not known."""
        tflops = self.options.peak_tflops
        if tflops is None and self.accelerator.device.type == "cuda":
            tflops = peak_tflops(torch.cuda.get_device_name(self.accelerator.device))
        return None if tflops is None else tflops * 1e12 * self.accelerator.num_processes

    def check(self, model: Any) -> None:
        """Try ``model``, prepared, and the teacher on a few tokens (see ``Objective.check``); compile if asked to."""
        batch = self.objective.check_batch(self.accelerator.device)
        with torch.no_grad():  # DDP would wait for a backward
            for objective in [model] + ([self.teacher.objective] if self.teacher else []):
                objective(batch, mode="check")
        if self.options.compile:  # now, so that nothing is compiled for the few tokens above
            for part in [self.objective] + ([self.teacher.objective] if self.teacher else []):
                part.compile_layers()

    def evaluate(self, model: Any, examples: list[Any]) -> dict[str, float]:
        """Loss, perplexity and KL on held-out examples, of the weights as they would be saved."""
        o = self.options
        with as_saved(model, self.saved_dtype, o.lora_alpha / o.lora_rank):
            collate, size = self.data.framing.collate, o.micro_batch_size
            found = evaluate(self.accelerator, model, examples, collate, self.teacher, size)
        if self.kind == "encoder":  # see EncoderObjective
            tokens, texts = found["loss"], found["kl"]
            return {"loss": tokens + texts, "token_error": tokens, "text_distance": texts, "scored": found["scored"]}
        return found

    def agree(
        self, sums: list[Tensor], norm: Any, asked: int, step: TrainingStep[Any], progress: Progress
    ) -> StepResult:
        """What all processes found, in the step's one wait for the device.

        Args:
            sums: [3] for each micro-batch of this process: loss, ce, kl.
            norm: of the gradient: a number, a tensor, or None where it was not worked out.
            asked: the signal that asked this process to stop, or 0.

        Raises:
            TrainingError: a sum or the norm is not finite; it says where.
        """
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        last = sums[0].new_tensor([asked, 0.0, 0.0])
        if norm is not None:
            last[1] = norm
        lines = self.accelerator.gather(torch.stack([*sums, last])[None]).double().cpu()
        losses, last = lines[:, :-1], lines[:, -1]
        what = where = ""
        if not losses.isfinite().all():
            process, micro, _ = (~losses.isfinite()).nonzero()[0].tolist()
            what, numbers = f"loss is {float(losses[process, micro, 0])}", [step.numbers[process][micro]]
            where = f", micro-batch {micro + 1} of process {process}"
        # a scaler passes over such a step itself; older versions of DeepSpeed say -1
        elif not (last.isfinite() & (last >= 0)).all() and self.accelerator.scaler is None:
            what, numbers = f"gradient's norm is {float(last[0, 1])}", [n for part in step.numbers for n in part]
        if what:
            documents = f"documents {min(n[0] for n in numbers)} to {max(n[1] for n in numbers)}"
            advice = "lower --lr, or use --precision bf16 or no; --resume goes on from the last checkpoint"
            if not progress.step:
                advice = "at the weights of --model and --teacher, or use --precision no: nothing has been trained yet"
            raise TrainingError(
                f"the {what} at step {progress.step + 1}{where} ({documents} of epoch {step.position.epoch}); nothing "
                f"of this step is kept. Look at these documents, {advice}"
            )
        loss, ce, kl = (losses.sum((0, 1)) / step.targets).tolist()
        return StepResult(loss, ce, kl, float(last[0, 1]), int(last[:, 0].max()))

    def save_checkpoint(self, model: Any, progress: Progress) -> None:
        """All of the run into its folder of checkpoints.

        Raises:
            TrainingError: a weight is not finite; the checkpoints stay as they are.
        """
        self._require_finite(model, progress)
        save_checkpoint(self.accelerator, Path(self.options.output, CHECKPOINTS), progress, self.options.keep)

    def _require_finite(self, model: Any, progress: Progress) -> None:
        """Nothing good is replaced by NaN, whatever the options.

        Raises:
            TrainingError: a weight is not finite.
        """
        weights = [(name, w) for name, w in model.named_parameters() if w.is_floating_point()]
        own = [w.to_local() if hasattr(w, "to_local") else w for _, w in weights]  # of a sharded model
        bad = torch.stack([(~w.detach().isfinite()).any() for w in own]).float()
        for index in self.accelerator.reduce(bad).nonzero().flatten().tolist():  # all processes raise, or none
            raise TrainingError(
                f"{weights[index][0]} is not finite after step {progress.step}, so nothing is written; lower --lr, and "
                "--resume goes on from the last checkpoint"
            )

    def save_model(self, folder: Path, model: Any, progress: Progress) -> None:
        """The student as it is now as a plain checkpoint in ``folder``: merged, in the dtype that it came in.

        Raises:
            TrainingError: a weight is not finite; the folder stays as it is.
        """
        self._require_finite(model, progress)
        state = self.accelerator.get_state_dict(model)  # all processes take part in gathering it
        if self.accelerator.is_main_process:
            o, state = self.options, {k.removeprefix("model."): v for k, v in state.items()}
            state = merged_state(state, o.mode, o.lora_alpha / o.lora_rank, self._is_transposed)
            plain = plain_model(self.student, state, self.saved_dtype)

            def extras(to: Path) -> None:
                self.tokenizer.save_pretrained(to)
                write_card(to, options=self.options, progress=progress, config=plain.config, kind=self.kind)

            save_model(folder, plain, extras=extras, among=folder == Path(o.output))
        self.accelerator.wait_for_everyone()

    def _is_transposed(self, name: str) -> bool:
        return type(self.student.get_submodule(name).base_layer).__name__ == "Conv1D"

    def out_of_memory_advice(self) -> str:
        """What to change in this run."""
        o = self.options
        return out_of_memory_advice(
            micro_batch_size=o.micro_batch_size, gradient_checkpointing=o.gradient_checkpointing, mode=o.mode,
            sequence_length=o.sequence_length, sharded=self.accelerator.is_fsdp2,
        )  # fmt: skip


#: what accelerate launch makes of its own option
_STEPS = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def load_run(options: UptrainOptions) -> TrainingRun:
    """Load and check everything that ``options`` name.

    Raises:
        TrainingError: something is missing, or does not go with the rest.
    """
    main = not int(os.environ.get("RANK", "0"))
    with no_progress_bars(), progress_bar(desc="loading", shown=main, leave=False):  # a run shows its own bars alone
        return _load_run(options)


def _load_run(options: UptrainOptions) -> TrainingRun:
    accelerator = make_accelerator(options)
    config = load_config(options.model)
    kind = objective_kind(config, options.objective)
    tokenizer = load_tokenizer(options.model)
    saved_dtype = config.dtype or torch.float32
    low = zero.computes_in_bf16(accelerator) or options.dtype == "bfloat16"
    teacher = None
    if options.teacher:  # first, because it is what is most often refused
        dtype = torch.bfloat16 if low else torch.float32
        objective = load_teacher(options, tokenizer, config, kind, dtype)
        teacher = TeacherCall(place_teacher(accelerator, objective), accelerator)
    student = load_student(options, config, kind)
    choose_trainable(
        student, options.mode, rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets,
        seed=options.seed,
    )  # fmt: skip
    round_between_layers(student)
    objective = make_objective(student, kind, options)
    optimizer = torch.optim.AdamW(
        parameter_groups(student, options.weight_decay), lr=options.lr, betas=(options.beta1, options.beta2),
        fused=accelerator.device.type == "cuda",
    )  # fmt: skip
    data = TrainingData(options, tokenizer, framing_for(kind, options, tokenizer))
    log = RunLog(accelerator, Path(options.output, "training_log.jsonl"))
    return TrainingRun(
        options, accelerator, kind, tokenizer, data, student, objective, optimizer, teacher, saved_dtype, log
    )


def make_accelerator(options: UptrainOptions) -> Any:
    """The accelerator that the options and accelerate's own config ask for."""
    try:
        import accelerate
    except ImportError as error:
        raise TrainingError("training needs accelerate: pip install 'hf-attn-patch[train]'") from error
    precision: str = options.precision
    if precision == "auto":
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
        precision = configured if configured != "no" or not on_gpu else "bf16"
    installed = [str(tracker) for tracker in accelerate.tracking.get_available_trackers()]
    if options.log_with and options.log_with not in ["all", *installed]:
        there = ", ".join(installed) or "none"
        raise TrainingError(f"--log-with {options.log_with}: that tracker is not installed; installed: {there}")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    # several processes without any GPU are meant for the CPU; accelerate would run each of them alone
    cpu = (launched > 1 or zero.is_wanted()) and not torch.accelerator.is_available()
    # the first phase leaves most weights without a gradient
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=options.layerwise_tokens > 0)
    launchers = os.environ.pop(_STEPS, None)  # it would win over ours
    try:
        accelerator = accelerate.Accelerator(
            mixed_precision="no" if zero.is_wanted() else precision,  # see zero.py
            log_with=options.log_with, project_dir=options.output, cpu=cpu,
            kwargs_handlers=[unused],
        )  # fmt: skip
    finally:
        if launchers is not None:
            os.environ[_STEPS] = launchers
    if launched != accelerator.num_processes:
        raise TrainingError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}; start them with "
            "accelerate launch and a config of examples/accelerate/"
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and max(parallel.cp_size, parallel.tp_size, parallel.sp_size) > 1:
        raise TrainingError(
            "context, sequence and tensor parallelism are not for this script, which shares out whole texts; use FSDP2 "
            "(examples/accelerate/fsdp2.yaml) and --gradient-checkpointing for long sequences"
        )
    accelerator.gradient_accumulation_steps = micro_batches(
        options.batch_size, options.micro_batch_size, accelerator.num_processes
    )
    if accelerator.distributed_type == accelerate.DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainingError("FSDP version 1 is not supported; set fsdp_version: 2 (examples/accelerate/fsdp2.yaml)")
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        keep_fp32_in_fsdp2(accelerator.state.fsdp_plugin)
    if zero.is_wanted():
        zero.configure(accelerator, options, precision)
    if options.log_with:
        simple = {k: v for k, v in asdict(options).items() if isinstance(v, (str, int, float, bool))}
        accelerator.init_trackers("uptrain", config=simple)
    return accelerator


def plain_model(model: Any, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A model like ``model``, without whatever was put into it for training, that holds ``state``."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with torch.device("meta"):
        plain = type(model)(config)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, p in plain.named_parameters() if p.is_meta]
    if missing:
        raise RuntimeError(f"the trained state lacks {', '.join(missing[:5])}")
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain
