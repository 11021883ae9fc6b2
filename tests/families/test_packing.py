"""Documents packed into one row never see one another: each comes out as if it were alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, families
from family_inputs import tokens
from family_runs import IMPLEMENTATION, assert_close, build, gradients, pair
from transformers import DataCollatorWithFlattening

_LENGTHS = {"one-row": [(5, 7, 2)], "two-rows": [(5, 7, 2), (9, 1, 4)]}


def _takes_position_ids(name: str) -> bool:
    return "position_ids" in inspect.signature(type(pair(name)[1]).forward).parameters


def _documents(rows: Sequence[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    return [[tokens(1, n, seed=10 * r + d) for d, n in enumerate(lengths)] for r, lengths in enumerate(rows)]


def _packed(documents: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """input_ids and position_ids, both [B, S]."""
    return {
        "input_ids": torch.cat([torch.cat(row, dim=1) for row in documents]),
        "position_ids": torch.stack([torch.cat([torch.arange(d.shape[1]) for d in row]) for row in documents]),
    }


def _alone(model: Any, documents: list[list[torch.Tensor]]) -> torch.Tensor:
    """[B, S, V]: the logits of each document run by itself."""
    return torch.cat([torch.cat([model(input_ids=d, use_cache=False).logits for d in row], dim=1) for row in documents])


def _cases(condition: str, trait: str, what: str, values: list[Any]) -> list[Any]:
    """(family, value) pairs. Some families' own layers drop what says that rows are packed: nobody behind the
    interface can know, until the day that they hand it on."""
    lost = pytest.mark.xfail(strict=True, reason=f"the family's layers do not hand {what} to the attention function")
    return [
        pytest.param(name, value, marks=[lost] if trait in FAMILIES[name].traits and value != condition else [])
        for name in families("decoder")
        for value in values
    ]


_HOW = ["no-cache", "default-cache", "all-ones-mask", "all-ones-mask-and-cache"]


@pytest.mark.parametrize("rows", list(_LENGTHS))
@pytest.mark.parametrize(("name", "how"), _cases("no-cache", "keeps-position-ids", "position_ids", _HOW))
def test_packed_by_position_ids(name: str, how: str, rows: str) -> None:
    if not _takes_position_ids(name):
        pytest.skip("takes no position_ids")
    ours, eager = pair(name)
    documents = _documents(_LENGTHS[rows])
    inputs: dict[str, Any] = _packed(documents)
    if "mask" in how:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "cache" not in how or how == "no-cache":
        inputs["use_cache"] = False
    found, wanted = {"logits": ours(**inputs).logits}, {"logits": _alone(eager, documents)}
    assert_close(found, wanted)
    if how == "no-cache":
        assert_close(gradients(ours, found), gradients(eager, wanted), rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    _cases("position-ids", "keeps-kwargs", "cu_seq_lens_q", ["position-ids", "no-position-ids"]),
)
def test_packed_by_cu_seqlens(name: str, how: str) -> None:
    """What DataCollatorWithFlattening hands over for flash attention. Without positions RoPE still is relative."""
    with_positions = how == "position-ids"
    ours, eager = pair(name)
    if not with_positions and not hasattr(eager.config, "rope_parameters"):
        pytest.skip("absolute positions")
    if not with_positions and "chunk" in FAMILIES[name].traits:
        pytest.skip("a chunk starts at a position")
    documents = _documents(_LENGTHS["one-row"])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=with_positions)
    features = [{"input_ids": d[0].tolist(), "labels": d[0].tolist()} for d in documents[0]]
    inputs = {k: v for k, v in collate(features).items() if k != "labels"}
    assert torch.equal(inputs["input_ids"], _packed(documents)["input_ids"])
    inputs = {k: v for k, v in inputs.items() if k != "position_ids" or _takes_position_ids(name)}
    found, wanted = {"logits": ours(**inputs, use_cache=False).logits}, {"logits": _alone(eager, documents)}
    assert_close(found, wanted, rtol=1e-5 if with_positions else 3e-5)  # RoPE at other angles rounds differently
    if with_positions:
        assert_close(gradients(ours, found), gradients(eager, wanted), rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_packed_in_training_mode_with_checkpointing(name: str) -> None:
    model = build(name, IMPLEMENTATION)
    model.gradient_checkpointing_enable()
    model.train()
    documents = _documents(_LENGTHS["two-rows"])
    _, eager = pair(name)
    found, wanted = {"logits": model(**_packed(documents)).logits}, {"logits": _alone(eager, documents)}
    assert_close(found, wanted)
    assert_close(gradients(model, found), gradients(eager, wanted), rtol=2e-5)
