"""transformers' mask functions: read where they are known, refused by name where they are not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from hf_attn_patch import AttentionError
from hf_attn_patch.compat import mask_functions
from hf_attn_patch.compat.mask_functions import KNOWN, taken_apart
from hf_attn_patch.hf.mask_function import read_mask_function

IDS = torch.tensor([[0, 0, 1, 1, 2]])


def user(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k != q


ARGUMENTS: dict[str, dict[str, Any]] = {
    "causal_mask_function": {},
    "bidirectional_mask_function": {},
    "and_masks": {"mask_functions": (user, masking_utils.causal_mask_function)},
    "or_masks": {"mask_functions": (user, masking_utils.causal_mask_function)},
    "sliding_window_overlay": {"sliding_window": 3},
    "sliding_window_bidirectional_overlay": {"sliding_window": 3},
    "chunked_overlay": {"chunk_size": 4, "left_padding": torch.tensor([0])},
    "blockwise_overlay": {"block_sequence_ids": IDS},
    "packed_sequence_mask_function": {"packed_sequence_mask": IDS},
    "remap_positions_for_packed_sequence": {"mask_function": user, "position_ids": IDS},
    "padding_mask_function": {"padding_mask": IDS > 0},
    "add_offsets_to_mask_function": {"mask_function": user, "q_offset": 2, "kv_offset": 0},
}
HERE = [name for name in KNOWN if hasattr(masking_utils, name)]  # positions are remapped from 5.23 on
CLOSURES = [name for name in HERE if ARGUMENTS[name]]


def made(make: Callable[..., Any], name: str) -> Callable[..., Any]:
    arguments = ARGUMENTS[name]
    if "mask_functions" in arguments:
        return make(*arguments["mask_functions"])
    return make(**arguments) if arguments else make


def changed(name: str, old: str, new: str, words: bool = True) -> Any:
    """One of transformers' functions with its source changed, as a release might."""
    source = inspect.getsource(getattr(masking_utils, name))
    assert old in source
    source = re.sub(rf"\b{old}\b", new, source) if words else source.replace(old, new)
    namespace = dict(vars(masking_utils))
    exec(source, namespace)
    (function,) = [
        v for k, v in namespace.items() if getattr(masking_utils, k, None) is not v and inspect.isfunction(v)
    ]
    return function


def test_all_that_is_known_is_tried() -> None:
    assert set(ARGUMENTS) == set(KNOWN)
    assert set(KNOWN) - set(HERE) <= {"remap_positions_for_packed_sequence"}


@pytest.mark.parametrize("name", HERE)
def test_a_known_function_is_taken_apart(name: str) -> None:
    found = taken_apart(made(getattr(masking_utils, name), name))
    assert found is not None
    assert found.name == name
    assert found.values == ARGUMENTS[name]


@pytest.mark.parametrize("name", CLOSURES)
def test_a_renamed_inner_function_is_refused_with_the_known_versions(name: str) -> None:
    inner = KNOWN[name][0]
    function = made(changed(name, inner, "see"), name)
    with pytest.raises(AttentionError, match=rf"{name} of transformers {transformers.__version__} .* 5\.17 to 5\.24"):
        read_mask_function(function)


@pytest.mark.parametrize("name", CLOSURES)
def test_a_renamed_value_is_refused(name: str) -> None:
    value = KNOWN[name][1][0]
    make = changed(name, value, "another_name")
    arguments = {("another_name" if k == value else k): v for k, v in ARGUMENTS[name].items()}
    function = make(*arguments.pop("another_name")) if value == "mask_functions" else make(**arguments)
    with pytest.raises(AttentionError, match=name):
        read_mask_function(function)


@pytest.mark.parametrize("name", HERE)
def test_a_renamed_function_is_refused(name: str) -> None:
    with pytest.raises(AttentionError, match="new_function"):
        read_mask_function(made(changed(name, name, "new_function"), name))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("causal_mask_function", "<=", "<"),
        ("bidirectional_mask_function", ">=", ">"),
        ("and_masks", "result &", "result |"),
        ("or_masks", "result |", "result &"),
        ("sliding_window_overlay", "kv_idx >", "kv_idx >="),
        ("sliding_window_bidirectional_overlay", "<= sliding_window\n", "< sliding_window\n"),
        ("chunked_overlay", "(kv_idx - left_padding[batch_idx])", "kv_idx"),
        ("blockwise_overlay", "(q_group >= 0)", "(q_group >= -1)"),
        ("packed_sequence_mask_function", "] ==", "] >="),
        ("padding_mask_function", "kv_idx]", "q_idx]"),
        ("add_offsets_to_mask_function", "q_idx + q_offset", "q_idx - q_offset"),
    ],
)
def test_a_function_that_means_something_else_is_refused(
    name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking_utils, name, changed(name, old, new, words=False))
    with pytest.raises(AttentionError, match=name):
        read_mask_function(made(getattr(masking_utils, name), name))


def test_an_unknown_one_is_found_inside_others() -> None:
    unknown = changed("sliding_window_overlay", "inner_mask", "see")(3)
    causal = masking_utils.causal_mask_function
    for function in (
        masking_utils.and_masks(causal, unknown),
        masking_utils.or_masks(unknown, causal),
        masking_utils.and_masks(masking_utils.or_masks(causal, user), masking_utils.and_masks(user, unknown)),
    ):
        with pytest.raises(AttentionError, match="sliding_window_overlay"):
            read_mask_function(function)


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_the_examples_hold_where_tensors_have_no_values(mode: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask_functions._check.cache_clear()
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        assert taken_apart(masking_utils.sliding_window_overlay(3)) == ("sliding_window_overlay", {"sliding_window": 3})


@pytest.mark.parametrize("function", [user, lambda b, h, q, k: k <= q, max, torch.nn.Linear(1, 1)])
def test_a_users_own_function_is_not_ours_to_read(function: Any) -> None:
    assert taken_apart(function) is None
    assert read_mask_function(masking_utils.and_masks(masking_utils.causal_mask_function, function)) is None
