"""Packed documents under torch's context_parallel: the loss and gradients of each document by itself, or a reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import on_two
from torch.nn import functional

from hf_attn_patch import attention
from hf_attn_patch.attn.context_parallel import chunks, in_order, rows_of
from hf_attn_patch.attn.visibility import Dense, Packed, Visibility, full
from hf_attn_patch.compat.context_parallel import Split, context_parallel, own_attention
from hf_attn_patch.compat.ground import CompatError
from hf_attn_patch.errors import AttentionError
from hf_attn_patch.hf.mask_pattern import Pattern


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    told = on_two("tests/helpers/context_parallel_training.py")
    assert told.count("as each document by itself") == 2 * 2 * 5
    assert told.count("what cannot be split was refused") == 2


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_chunks_are_where_the_order_puts_them(count: int, length: int, balanced: bool) -> None:
    n = 2 * length if balanced else length
    splits = [Split(None, rank, count, balanced) for rank in range(count)]
    held = [torch.cat([torch.arange(*span) for span in chunks(n, split)]) for split in splits]
    assert in_order(torch.stack(held), 0, splits[0]).tolist() == list(range(n * count))


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("lengths", [[[24]], [[1, 7, 9, 7]], [[6, 18], [24]], [[1] * 24, [12, 12]]])
def test_rows_of_a_text_see_what_they_saw(lengths: list[list[int]], window: int | None) -> None:
    """Against a mask that is written out from the documents and the window."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    B, S = positions.shape
    sides = (None if window is None else window - 1, None)
    whole: Visibility = Pattern(B, S, S, True, sides).resolve(positions)
    q, k = torch.arange(S)[:, None], torch.arange(S)
    expected = (k <= q) & (q - k < (window or S)) & (q - k <= positions[:, :, None])
    for first, last in [(0, 6), (5, 12), (12, 24), (23, 24), (0, 24)]:
        part = rows_of(whole, first, last)
        assert (part.batch, part.q_len, part.kv_len) == (B, last - first, last)
        mask = part.dense(torch.device("cpu"))
        if mask is None:
            mask = torch.ones(1, 1, last - first, part.keys, dtype=torch.bool)
        if mask.shape[-1] < last:  # keys that no query reaches back to
            mask = functional.pad(mask, (last - mask.shape[-1], 0))
        assert torch.equal(mask[:, 0].expand(B, -1, -1), expected[:, first:last, :last])


def test_a_written_out_mask_is_cut() -> None:
    mask = torch.rand(2, 1, 8, 8) < 0.5
    assert torch.equal(rows_of(Dense(2, 8, 8, mask=mask), 3, 5).mask, mask[:, :, 3:5, :5])  # type: ignore[union-attr]


def test_padding_beside_documents_is_refused() -> None:
    cu = torch.tensor([0, 4, 8], dtype=torch.int32)
    seen = Packed(1, 8, 8, True, cu_q=cu, cu_k=cu, max_q=4, max_k=4, padding=torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(AttentionError, match="padding"):
        rows_of(seen, 0, 4)
    assert rows_of(full(8, 8, True, (None, None)), 0, 4).kv_len == 4


@pytest.fixture
def replaced() -> Iterator[None]:
    functional.scaled_dot_product_attention = lambda *args, **kwargs: own_attention(*args, **kwargs)
    yield
    functional.scaled_dot_product_attention = own_attention


@pytest.mark.usefixtures("replaced")
def test_others_may_replace_torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    assert context_parallel() is None
    monkeypatch.setattr(_attention, "_replaced_functions", {functional.scaled_dot_product_attention: None})
    with pytest.raises(CompatError, match="context_parallel"):  # torch's, but not as it was
        context_parallel()


def test_distributed_tensors_are_refused() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    if distributed.is_initialized():
        pytest.skip("another test's process group is open")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        q, k = (DTensor.from_local(torch.randn(1, h, 4, 8), mesh, [Shard(1)]) for h in (4, 2))
        for _ in range(2):  # also where a call of such shapes is known
            with pytest.raises(AttentionError, match="is a DTensor"):
                attention(q, k, k, causal=True)
            assert attention(q.to_local(), k.to_local(), k.to_local(), causal=True).shape == (1, 4, 4, 8)
    finally:
        distributed.destroy_process_group()
