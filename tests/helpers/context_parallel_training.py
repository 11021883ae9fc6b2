"""Run by torchrun, one process a device: packed documents under torch's context_parallel train as on one process.

torchrun --nproc-per-node 2 tests/helpers/context_parallel_training.py cuda|cpu
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leaving import leave
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import hf_attn_patch
from hf_attn_patch.errors import AttentionError

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
#: documents of each row; the borders of the four chunks of two processes lie inside of some and between others
DOCUMENTS = {
    "one text": [[64]],
    "packed": [[5, 27, 11, 21]],
    "two rows": [[16, 32, 16], [3, 61]],
    "tiny": [[1] * 64],
    "not in four chunks": [[5, 27, 11, 19]],  # so torch gives each process one chunk, not two
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9, attn_implementation="eager"))


def batch_of(documents: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions that count from 0 in each document, and the next token's id, -100 where that is another's."""
    ids = torch.randint(2, 128, (len(documents), sum(documents[0])), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    following = functional.pad(ids[:, 1:], (0, 1), value=-100)
    return ids, positions, following.where(functional.pad(positions[:, 1:], (0, 1)) != 0, -100)


def loss_of(model: Any, ids: Tensor, positions: Tensor, labels: Tensor, **more: Any) -> Tensor:
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def alone(model: Any, documents: list[list[int]], batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of every document by itself, one after the other."""
    model.zero_grad()
    total = torch.zeros((), device=batch[0].device)
    for row, lengths in enumerate(documents):
        begin = 0
        for n in lengths:
            loss = loss_of(model, *(t[row : row + 1, begin : begin + n] for t in batch))
            loss.backward()
            total, begin = total + loss.detach(), begin + n
    return total, [p.grad.clone() for p in model.parameters()]


def together(model: Any, batch: tuple[Tensor, ...], mesh: Any, **more: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    ids, positions, labels = (t.clone() for t in batch)
    buffers = [ids, positions, labels]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(buffers)):
        assert ids.shape[1] == batch[0].shape[1] // mesh.size()
        loss = loss_of(model, ids, positions, labels, **more)
        loss.backward()
    loss = loss.detach().clone()
    for tensor in [loss, *(p.grad for p in model.parameters())]:
        distributed.all_reduce(tensor)
    return loss, [p.grad.clone() for p in model.parameters()]


def torch_splits(length: int, mesh: Any) -> bool:
    """Whether torch shares out a text of so many tokens; before 2.13 it takes multiples of twice the processes."""
    tokens = torch.zeros(1, length, dtype=torch.long, device=mesh.device_type)
    try:
        with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
            return True
    except AssertionError:
        return False


def refused(why: str, call: Callable[[], Any]) -> None:
    with pytest.raises(AttentionError, match=f"context_parallel.*{why}"):
        call()


def refusals(model: Any, mesh: Any, device: torch.device) -> None:
    ids, positions, _ = (t.to(device) for t in batch_of(DOCUMENTS["packed"]))
    local = torch.arange(32, device=device)[None]

    def split(buffers: dict[str, Tensor], **more: Any) -> Callable[[], Any]:
        def call() -> Any:
            mine = {name: t.clone() for name, t in buffers.items()}
            with context_parallel(mesh, buffers=list(mine.values()), buffer_seq_dims=[1] * len(mine)):
                return model(**mine, **more)

        return call

    tokens, whole = {"input_ids": ids}, {"input_ids": ids, "position_ids": positions}
    refused("position_ids that go from 31 to 16", split(tokens, position_ids=local, use_cache=False))
    refused("with padding", split({**whole, "attention_mask": (ids % 7 > 0).long()}))
    if torch_splits(63, mesh):
        refused("has .32, 31. tokens on the processes", split({name: t[:, :63] for name, t in whole.items()}))
    refused("a mask of its own", split(whole, attention_mask=torch.ones(1, 1, 32, 32, dtype=torch.bool, device=device)))
    refused("not those of one whole text", split(whole, cu_seq_lens_q=torch.tensor([0, 32], device=device)))
    refused("is asked for its weights", split(whole, output_attentions=True))

    def with_cache() -> None:
        mine = [ids.clone(), positions.clone()]
        with context_parallel(mesh, buffers=mine, buffer_seq_dims=[1, 1]):
            cache = model(input_ids=mine[0], position_ids=mine[1], use_cache=True).past_key_values
            model(input_ids=ids[:, :1], position_ids=positions[:, :1], past_key_values=cache)

    refused("1 queries and 33 keys", with_cache)
    q = torch.randn(1, 8, 32, 16, device=device)
    with context_parallel(mesh, buffers=[ids.clone()], buffer_seq_dims=[1]):
        refused("", lambda: hf_attn_patch.attention(q, q, q, causal=True))
    out = model(input_ids=ids, position_ids=positions, use_cache=False)  # and afterwards all is as before
    assert out.logits.shape[1] == 64


def main(kind: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
    every = {name: lengths for name, lengths in DOCUMENTS.items() if torch_splits(sum(lengths[0]), mesh)}
    for family in ("llama", "mistral"):
        for name, documents in every.items():
            model = model_of(family).to(device)
            batch = tuple(t.to(device) for t in batch_of(documents))
            loss, gradients = alone(model, documents, batch)
            hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
            ways: dict[str, dict[str, Any]] = {"positions": {}}
            if len(documents) == 1:
                cu = torch.tensor([0, *documents[0]], device=device).cumsum(0).int()
                ways["borders"] = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 64, "max_length_k": 64}
            for more in ways.values():
                for checkpointing in (False, True):
                    model.train()
                    model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
                    found, by_parameter = together(model, batch, mesh, **more)
                    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-4)
                    for p, q in zip(by_parameter, gradients, strict=True):
                        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4 * float(q.abs().max()))
            print(f"rank {rank}: {family}, {name}: as each document by itself, by {', '.join(ways)}", flush=True)
    refusals(hf_attn_patch.enable(model_of("llama").to(device), cache=None, cuda_graphs=False), mesh, device)
    print(f"rank {rank}: what cannot be split was refused", flush=True)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
