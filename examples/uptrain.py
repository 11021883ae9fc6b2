"""Uptrain a converted model.

    accelerate launch -q examples/uptrain.py --model DST --teacher SRC --dataset TEXT --tokens 50M

Packed documents, cross-entropy and/or distillation, exact resume. The loop below is meant to be read and copied; its
parts are in hf_attn_patch.training. `--help` lists the options; `--config FILE.yaml` takes them from a file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.errors import HFAttnError
from hf_attn_patch.training import (
    Flops,
    Progress,
    StepResult,
    StopSignals,
    Throughput,
    TrainingError,
    TrainingRun,
    TrainingStep,
    ahead,
    claimed_output,
    document_lengths,
    learning_rate,
    load_checkpoint,
    load_run,
    parse_options,
    told_to_launcher,
    trained_value,
)


def in_steps(tokens: int, run: TrainingRun) -> int:
    """A budget in whole steps, where all steps are full; padded ones hold fewer tokens than they have room for."""
    size = run.options.tokens_per_step if run.kind == "causal" else 1
    return -(-tokens // size) * size


def at_start(run: TrainingRun) -> Progress:
    """Where this run stands: at its last checkpoint, or at the beginning."""
    options = run.options
    checkpoints = Path(options.output, "checkpoints")
    found = load_checkpoint(run.accelerator, checkpoints, options.lasting) if options.resume else None
    return found or Progress(settings=options.lasting)


def evaluate(run: TrainingRun, model: Any, held_out: list[Any], progress: Progress, bar: Any) -> None:
    """Into the log, and the model into its folder if it is the best so far."""
    options = run.options
    found = {"step": progress.step, "tokens": progress.tokens, **run.evaluate(model, held_out)}
    progress.history.append(found)
    run.log.write({f"eval/{k}": v for k, v in found.items() if k != "step"}, progress.step)
    if run.accelerator.is_main_process:
        shown = ", ".join(f"{k} {found[k]:.4f}" for k in ("loss", "kl") if k in found)
        bar.write(f"step {progress.step}: held-out {shown}")
    value = trained_value(found, *options.loss_weights)
    if progress.best is None or value < progress.best:
        progress.best = value
        if progress.step:
            run.save_model(Path(options.output, "best"), model, progress)


def take_step(
    run: TrainingRun,
    model: Any,
    optimizer: Any,
    step: TrainingStep[Any],
    mode: str,
    progress: Progress,
    stop: StopSignals,
) -> StepResult:
    """Forward, backward, and the optimizer, over the micro-batches of a step."""
    accelerator, teacher = run.accelerator, run.teacher
    sums, norm = [], None
    for micro in step.micro:
        batch = run.data.framing.collate(micro).to(accelerator.device)
        with accelerator.accumulate(model):
            part = model(batch, told=teacher(batch, mode) if teacher else None, mode=mode)
            # gradients are averaged over processes and micro-batches; this makes it the mean over labels
            scale = accelerator.num_processes * len(step.micro) / step.targets
            accelerator.backward(part.loss * scale)
            sums.append(torch.stack([part.loss.detach(), part.ce, part.kl]))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), run.options.clip or math.inf)
                # the step's one wait for the device: nobody steps on a loss that is not finite
                result = run.agree(sums, norm, stop.asked, step, progress)
            optimizer.step()
            optimizer.zero_grad()
    return result


def report(run: TrainingRun, result: StepResult, lr: float, progress: Progress, bar: Any) -> None:
    speed = run.speed
    shown = {"loss": f"{result.loss:.4f}", "tok/s": f"{speed.tokens_per_second:,.0f}"}
    shown |= {"MFU": f"{speed.mfu:.1%}"} if speed.mfu else {}
    bar.set_postfix(shown, refresh=False)
    if progress.step % run.options.log_every == 0:
        values = {"loss": result.loss, "ce": result.ce, "kl": result.kl, "grad_norm": result.grad_norm}
        values |= {"lr": lr, "tokens": progress.tokens, "epoch": progress.position.epoch}
        values |= {"tokens_per_second": speed.tokens_per_second}
        values |= {"mfu": speed.mfu} if speed.mfu else {}
        run.log.write({f"train/{k}": v for k, v in values.items()}, progress.step)


def uptrain(run: TrainingRun) -> Progress:
    options, accelerator, data = run.options, run.accelerator, run.data
    model, optimizer = accelerator.prepare(run.objective, run.optimizer)
    with progress_bar(desc="preparing", shown=accelerator.is_main_process, leave=False):
        run.check(model)  # that packed documents don't see each other, for one; and compile, if wanted
        held_out = data.held_out()
    progress = at_start(run)
    run.log.start(progress.step)
    first_phase, main_phase = (in_steps(t, run) for t in (options.layerwise_tokens, options.budget))
    total = first_phase + main_phase
    causal = run.kind != "encoder"
    flops = [Flops(run.student, causal=causal)]
    flops += [Flops(run.teacher_model, causal=causal, forward_only=True)] if run.teacher else []
    run.speed = Throughput(run.peak_flops)
    bar = progress_bar(
        desc="uptraining", total=total, initial=progress.tokens, unit="tok", unit_scale=True, mininterval=0.5,
        shown=accelerator.is_main_process,
    )  # fmt: skip
    if held_out and not progress.history:
        evaluate(run, model, held_out, progress, bar)
    steps = ahead(lambda: data.steps(progress.position, accelerator.process_index, accelerator.num_processes))
    with StopSignals() as stop, bar:
        for step in steps:
            if progress.tokens >= total:
                break
            fitting = progress.tokens < first_phase  # of attention outputs, layer by layer; optional
            start, length = (0, first_phase) if fitting else (first_phase, main_phase)
            lr = learning_rate(
                progress.tokens - start + step.tokens // 2, total=length, peak=options.lr,
                warmup=options.warmup, decay=options.decay, floor=options.lr_floor,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            result = take_step(run, model, optimizer, step, "fit" if fitting else "loss", progress, stop)

            progress.step, progress.position = progress.step + 1, step.position
            before, progress.tokens = progress.tokens, progress.tokens + step.tokens
            lengths = [n for micro in step.micro for n in document_lengths(micro)]
            run.speed.step(step.tokens, sum(f.of(lengths) for f in flops) * accelerator.num_processes)
            bar.update(step.tokens)
            report(run, result, lr, progress, bar)

            done = progress.tokens >= total
            now = progress.step, (before, progress.tokens)
            if held_out and (done or options.due(*now, options.eval_every)):
                evaluate(run, model, held_out, progress, bar)
            if result.asked or options.due(*now, options.checkpoint_every):
                run.save_checkpoint(model, progress)
            if result.asked and not done:
                accelerator.end_training()
                bar.write(
                    f"stopped by signal {result.asked} after step {progress.step}; go on with --resume", file=sys.stderr
                )
                sys.exit(128 + result.asked)
            run.speed.pause()
    run.save_model(Path(options.output), model, progress)
    accelerator.end_training()
    return progress


def main(arguments: list[str] | None = None) -> None:
    try:
        options = parse_options(arguments, __doc__)
        set_seed(options.seed)
        with claimed_output(options):
            run = load_run(options)  # accelerator, tokenizer, data, student and teacher, checked against each other
            try:
                uptrain(run)
            except torch.OutOfMemoryError as error:
                raise TrainingError(run.out_of_memory_advice()) from error
    except HFAttnError as error:
        sys.exit(told_to_launcher(f"uptrain: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
