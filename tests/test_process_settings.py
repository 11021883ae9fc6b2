"""What a process has set is as it was after running, training and choosing what to train."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import save_tiny, tiny_llama
from transformers.utils import logging as hf_logging

import hf_attn_patch
from hf_attn_patch import enable, override, use_backend


def settings_of_the_process() -> dict[str, Any]:
    """What packages like this one are found to change behind their users' backs."""
    config = torch._dynamo.config
    return {
        "environment": dict(os.environ),
        "dynamo": (config.recompile_limit, config.accumulated_recompile_limit),
        "filters": list(warnings.filters),
        "loggers": [(logger.level, list(logger.handlers)) for logger in map(logging.getLogger, (None, "transformers"))],
        "bars": (hf_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()),
        "random": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "kernels": [
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def test_running_leaves_the_process_as_it_was() -> None:
    model = enable(tiny_llama(2, num_hidden_layers=1), cache="growing")
    ids, mask = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = settings_of_the_process()
    model(input_ids=ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with hf_attn_patch.unpadded(model.eval()), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    hf_attn_patch.explain(model, batch=1, q_len=4, kv_len=4)
    with override("sdpa"), use_backend("reference"):
        model(input_ids=ids)
    assert settings_of_the_process() == before


def test_training_leaves_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from hf_attn_patch.training.loop.schedule import Count
    from hf_attn_patch.training.model.compiling import compile_layers
    from hf_attn_patch.training.options import UptrainOptions
    from hf_attn_patch.training.run import load_run

    (tmp_path / "text.txt").write_text("A few words.\n\nAnd a few more of them.\n" * 50)
    model = save_tiny(tmp_path / "model", tiny_llama(2, num_hidden_layers=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    options = UptrainOptions(
        model=model,
        dataset=str(tmp_path / "text.txt"),
        output=str(tmp_path / "out"),
        mode="lora",
        batch_size=2,
        sequence_length=32,
        tokens=Count(1000),
    )
    before = settings_of_the_process()
    run = load_run(options)
    assert run.accelerator.gradient_accumulation_steps == options.batch_size // options.micro_batch_size
    compile_layers(run.student, one_shape=True)
    after = settings_of_the_process()
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"random", "environment", "loggers"}  # new weights; accelerate's own
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "3"


def test_adapters_are_the_same_everywhere_and_nothing_else_is_seeded() -> None:
    pytest.importorskip("peft")
    from hf_attn_patch.training.model.trainable import choose_trainable

    torch.manual_seed(5)
    state, weights = torch.random.get_rng_state(), []
    for _ in range(2):
        wrapped = choose_trainable(tiny_llama(2, num_hidden_layers=1), "lora", seed=1)
        weights.append([p.clone() for p in wrapped.parameters() if p.requires_grad])
        torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    model = tiny_llama(2, num_hidden_layers=1)
    torch.random.set_rng_state(state)
    choose_trainable(model, "lora", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
