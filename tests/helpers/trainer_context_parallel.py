"""Run by torchrun, one process a device: transformers' Trainer under FSDP2 with context parallelism, packed documents.

torchrun --nproc-per-node 2 tests/helpers/fsdp2_on_cpu.py tests/helpers/trainer_context_parallel.py cpu
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from context_parallel_training import DOCUMENTS, alone, batch_of, model_of
from leaving import leave

import hf_attn_patch


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def main(kind: str) -> None:
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    from accelerate.utils import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    documents = DOCUMENTS["packed"]
    ids, positions, following = batch_of(documents)
    truth, _ = alone(model_of("llama"), documents, (ids, positions, following))
    expected = float(truth) / int((following != -100).sum())
    model = model_of("llama")
    model.set_attn_implementation("sdpa")  # the Trainer takes no other name, and this one is ours from here on
    hf_attn_patch.override("sdpa")
    row = {"input_ids": ids[0], "position_ids": positions[0], "labels": ids[0], "shift_labels": following[0]}
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"parallelism_config": ParallelismConfig(cp_size=2), "use_cpu": kind == "cpu"}
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, report_to=[], save_strategy="no", logging_steps=1,
            optim="sgd", max_grad_norm=0, remove_unused_columns=False, disable_tqdm=True, **how,
        )  # fmt: skip
        rows: Any = [row, row]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=together)
        trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(loss - expected) < 1e-4 * expected, (loss, expected)
    print(f"rank {trainer.accelerator.process_index}: the loss of each document by itself", flush=True)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
