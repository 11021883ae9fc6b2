"""Masks that users hand in, and padding that holds garbage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, families
from family_inputs import Inputs, make_inputs, normal, padding_mask, tokens
from family_runs import assert_close, gradients, pair, run

_TEXT = families("decoder", "encoder")


def _embedded(model: Any, inputs: Inputs, filling: float) -> Inputs:
    """The same inputs as embeddings, with ``filling`` wherever there is padding."""
    kwargs = dict(inputs.kwargs)
    for prefix in ("", "decoder_"):
        if f"{prefix}input_ids" not in kwargs:
            continue
        embeddings = model.get_input_embeddings()(kwargs.pop(f"{prefix}input_ids")).detach()
        padding = kwargs[f"{prefix}attention_mask"] == 0
        kwargs[f"{prefix}inputs_embeds"] = embeddings.masked_fill(padding[..., None], filling)
    return Inputs(kwargs, inputs.rows)


@pytest.mark.parametrize("padding", ["left", "right", "two-sided", "holes", "empty-row"])
@pytest.mark.parametrize(
    "name", [n for n in families("decoder", "encoder", "encoder-decoder") if "moe" not in FAMILIES[n].traits]
)
def test_nan_in_padding_does_not_leak(name: str, padding: str) -> None:
    """Eager lets it leak (0 * NaN), so the truth is eager without the NaN."""
    ours, eager = pair(name)
    inputs = make_inputs(FAMILIES[name], padding)
    with torch.no_grad():
        wanted = run(eager, _embedded(eager, inputs, 0.0))
        assert_close(run(ours, _embedded(ours, inputs, 0.0)), wanted)
        assert_close(run(ours, _embedded(ours, inputs, float("nan"))), wanted)


@pytest.mark.parametrize("padding", ["left", "empty-row"])
@pytest.mark.parametrize("name", _TEXT)
def test_rows_without_keys_are_finite(name: str, padding: str) -> None:
    """Forward and backward over all rows, those of padding too: no NaN or infinity anywhere."""
    ours, _ = pair(name)
    inputs = make_inputs(FAMILIES[name], padding)
    everywhere = Inputs(inputs.kwargs, dict.fromkeys(inputs.rows))
    found = run(ours, everywhere)
    for path, value in (found | gradients(ours, found)).items():
        assert torch.isfinite(value).all(), path


def _allowed(B: int, S: int) -> torch.Tensor:
    """A pattern of no particular structure: [B, 1, S, S] bool, every row sees itself and about half of the others."""
    return (normal(B, 1, S, S, seed=3) > 0) | torch.eye(S, dtype=torch.bool)


def _additive(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _with_mask(name: str, mask: torch.Tensor) -> Inputs:
    family = FAMILIES[name]
    rows: dict[str, torch.Tensor | None] = {"logits" if family.kind == "decoder" else "last_hidden_state": None}
    return Inputs({"input_ids": tokens(mask.shape[0], mask.shape[-1]), "attention_mask": mask}, rows)


@pytest.mark.parametrize("name", [n for n in _TEXT if "2d-only" not in FAMILIES[n].traits])
def test_four_dimensional_masks(name: str) -> None:
    """Bool and float. Eager adds a bool mask to the scores as 0 and 1, so its truth is the float one."""
    ours, eager = pair(name)
    allowed = _allowed(2, 11)
    wanted = run(eager, _with_mask(name, _additive(allowed)))
    grads = gradients(eager, wanted)
    for mask in (_additive(allowed), allowed):
        found = run(ours, _with_mask(name, mask))
        assert_close(found, wanted)
        assert_close(gradients(ours, found), grads, rtol=2e-5)


@pytest.mark.parametrize("name", list(families("decoder", "encoder", trait="core")))
def test_bias_for_each_head(name: str) -> None:
    """ALiBi and its like: a float mask [B, HQ, S, S] with a slope for each head."""
    ours, eager = pair(name)
    S, heads = 11, 4
    distance = (torch.arange(S)[None] - torch.arange(S)[:, None]).float()
    slopes = 2.0 ** -torch.arange(1, heads + 1)[None, :, None, None]
    mask = (_additive(_allowed(2, S)) + slopes * -distance.abs()).contiguous()
    found, wanted = run(ours, _with_mask(name, mask)), run(eager, _with_mask(name, mask))
    assert_close(found, wanted)
    assert_close(gradients(ours, found), gradients(eager, wanted), rtol=2e-5)


@pytest.mark.parametrize("name", families(trait="core"))
def test_an_empty_row_of_a_bool_mask_gives_zeros_and_no_nan(name: str) -> None:
    """With its attention zero, such a row is a function of its own token alone."""
    if FAMILIES[name].kind not in ("decoder", "encoder"):
        pytest.skip("takes no 4-D mask of its own")
    ours, eager = pair(name)
    allowed = _allowed(2, 11)
    allowed[0, :, 4] = False
    inputs = _with_mask(name, allowed)
    path = next(iter(inputs.rows))
    found = run(ours, inputs)[path]
    assert torch.isfinite(found).all()
    # the empty row's own value also feeds the rows that see it, so eager can only be the truth where none does
    unseen = allowed.clone()
    unseen[0, :, :, 4] = False
    unseen[0, :, 4] = False
    keep = torch.arange(11) != 4
    ours_out, wanted = run(ours, _with_mask(name, unseen))[path], run(eager, _with_mask(name, _additive(unseen)))[path]
    assert_close({"row 0": ours_out[0, keep], "row 1": ours_out[1]}, {"row 0": wanted[0, keep], "row 1": wanted[1]})


def test_padding_patterns_are_what_they_say() -> None:
    """The patterns above reach every case: a full row, padding on each side, holes, a row of nothing."""
    assert padding_mask("none", 9) is None
    masks: dict[str, Any] = {
        p: padding_mask(p, 9) for p in ("ones", "left", "right", "two-sided", "holes", "empty-row")
    }
    assert all(m is not None and m[0].all() for m in masks.values())
    assert masks["left"][1].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert masks["holes"][1].tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 1]
    assert not masks["empty-row"][1].any()
