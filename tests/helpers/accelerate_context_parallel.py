"""Run by torchrun, one process a device: accelerate's FSDP2 with context parallelism, packed documents.

torchrun --nproc-per-node 2 tests/helpers/accelerate_context_parallel.py cuda
torchrun --nproc-per-node 2 tests/helpers/fsdp2_on_cpu.py tests/helpers/accelerate_context_parallel.py cpu
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.append(str(Path(__file__).parent))
from context_parallel_training import DOCUMENTS, alone, batch_of, loss_of, model_of
from leaving import leave

import hf_attn_patch


def main(kind: str) -> None:
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

    more: dict[str, Any] = {"cpu": True}
    if kind == "cuda":
        more = {"fsdp_plugin": FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )}  # fmt: skip
    accelerator = Accelerator(parallelism_config=ParallelismConfig(cp_size=2), **more)
    documents = DOCUMENTS["packed"]
    batch = tuple(t.to(accelerator.device) for t in batch_of(documents))
    truth = model_of("llama").to(accelerator.device)
    before = {name: p.detach().clone() for name, p in truth.named_parameters()}
    loss, gradients = alone(truth, documents, batch)
    expected = {name: before[name] - 0.1 * g for name, g in zip(before, gradients, strict=True)}

    model = hf_attn_patch.enable(model_of("llama"), cache=None, cuda_graphs=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids, positions, labels = (t.clone() for t in batch)
    buffers = [ids, positions, labels]
    with accelerator.maybe_context_parallel(
        buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)
    ):
        assert ids.shape[1] == 32
        mine = loss_of(model, ids, positions, labels)
        accelerator.backward(mine * distributed.get_world_size())  # FSDP2 averages gradients, and this is a sum
    whole = mine.detach().clone()
    distributed.all_reduce(whole)
    torch.testing.assert_close(whole, loss, rtol=1e-4, atol=1e-4)
    optimizer.step()
    for name, p in model.named_parameters():
        found = p.full_tensor() if hasattr(p, "full_tensor") else p
        assert tuple(p.placements) == (torch.distributed.tensor.Shard(0),), p.placements
        moved = float((expected[name] - before[name]).abs().max())
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-3 * moved)
    print(f"rank {accelerator.process_index}: the step of each document by itself", flush=True)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
