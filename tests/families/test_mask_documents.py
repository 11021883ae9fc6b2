"""Packed documents stay apart whatever mask functions come with them: transformers' own, a caller's, in every order.

The truth is written out position by position, with each token's document known, and run by eager attention. One layer,
so that rows which see nothing touch no other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    masking_utils,
)
from transformers.models.mistral import modeling_mistral

from hf_attn_patch import AttentionError, override
from hf_attn_patch.compat.mask_functions import KNOWN

LENGTHS = (5, 7, 1)
S = sum(LENGTHS)
DOCUMENT = [d for d, n in enumerate(LENGTHS) for _ in range(n)]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
BLOCKS = [-1, 0, 0, -1, 1, 1, 1, -1, 2, 2, -1, -1, -1]  # block 1 reaches from one document into the next
WINDOW = 3
Rule = Callable[[int, int], bool]


def ahead(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A union to look two tokens ahead: of the distance alone, as transformers counts positions in each document."""
    return (k - q <= 2) & (k - q >= 0)


def thin(b: Any, h: Any, q: Any, k: Any) -> Any:
    """An intersection in which no token sees itself."""
    return (q - k) % 3 != 0


#: name -> what is given to create_causal_mask, and the rule of (query, key) inside a document
FUNCTIONS: dict[str, tuple[dict[str, Any], Rule]] = {
    "nothing": ({}, lambda q, k: k <= q),
    "or": ({"or_mask_function": ahead}, lambda q, k: k - q <= 2),
    "and": ({"and_mask_function": thin}, lambda q, k: k <= q and (q - k) % 3 != 0),
    "or, and": (
        {"or_mask_function": ahead, "and_mask_function": thin},
        lambda q, k: k - q <= 2 and (q - k) % 3 != 0,
    ),
    "transformers' and": (
        {"and_mask_function": masking_utils.sliding_window_overlay(WINDOW)},
        lambda q, k: 0 <= q - k < WINDOW,
    ),
    "or of ands": (
        {"or_mask_function": masking_utils.and_masks(ahead, thin)},
        lambda q, k: k <= q or (k - q <= 2 and (q - k) % 3 != 0),
    ),
    "and of ors": (
        {"and_mask_function": masking_utils.or_masks(thin, masking_utils.sliding_window_overlay(WINDOW))},
        lambda q, k: k <= q and ((q - k) % 3 != 0 or q - k < WINDOW),
    ),
    "blocks": (
        {"block_sequence_ids": torch.tensor([BLOCKS])},
        lambda q, k: k <= q or BLOCKS[q] == BLOCKS[k] >= 0,
    ),
    "blocks, and": (
        {"block_sequence_ids": torch.tensor([BLOCKS]), "and_mask_function": thin},
        lambda q, k: (k <= q and (q - k) % 3 != 0) or BLOCKS[q] == BLOCKS[k] >= 0,
    ),
}
HOW = ["no-cache", "cache", "ones", "ones-and-cache", "borders", "borders-alone", "left-padded"]


@functools.cache
def models(sliding: bool) -> tuple[Any, Any, Any]:
    """Of ours, eager and (for ``override``) sdpa."""
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=WINDOW if sliding else None,
    )  # fmt: skip
    torch.manual_seed(0)
    names = ("hf_attn_patch", "eager", "sdpa")
    ours, eager, sdpa = (
        MistralForCausalLM._from_config(copy.deepcopy(config), attn_implementation=name).eval() for name in names
    )
    ours.load_state_dict(eager.state_dict())
    sdpa.load_state_dict(eager.state_dict())
    return ours, eager, sdpa


def tokens(B: int = 1) -> Tensor:
    return torch.randint(3, 64, (B, S), generator=torch.Generator().manual_seed(1))


def truth(rule: Rule, padding: int = 0) -> Tensor:
    """bool [1, 1, S, S], document by document."""
    see = torch.zeros(1, 1, S, S, dtype=torch.bool)
    for q, k in itertools.product(range(S), range(S)):
        see[0, 0, q, k] = rule(q, k) and DOCUMENT[q] == DOCUMENT[k] and k >= padding
    return see


def given(how: str) -> tuple[dict[str, Any], int]:
    """What the model is called with, and how many of the first document's tokens are padding."""
    inputs: dict[str, Any] = {"input_ids": tokens(), "position_ids": POSITIONS, "use_cache": "cache" in how}
    inputs["use_cache"] &= how != "no-cache"
    padding = 2 if how in ("left-padded", "borders-alone") else 0
    if "ones" in how or padding:
        inputs["attention_mask"] = torch.ones(1, S, dtype=torch.long)
        inputs["attention_mask"][:, :padding] = 0
    if how == "borders-alone":  # the model counts columns, and its rotary positions are relative
        del inputs["position_ids"]
    if "borders" in how:
        borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
        inputs.update(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=7, max_length_k=7)
    return inputs, padding


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("over", [False, True], ids=["ours", "over-sdpa"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_documents_stay_apart(name: str, sliding: bool, over: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, rule = FUNCTIONS[name]
    make = "create_sliding_window_causal_mask" if sliding else "create_causal_mask"
    monkeypatch.setattr(modeling_mistral, make, functools.partial(getattr(masking_utils, make), **options))
    if sliding:  # transformers unites the window with what is given as it does causality
        rule = _in_window(name)
    ours, eager, as_sdpa = models(sliding)
    inputs, padding = given(how)
    see = truth(rule, padding)
    wanted = eager(
        input_ids=tokens(), position_ids=POSITIONS, use_cache=False,
        attention_mask=torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min),
    ).logits  # fmt: skip
    with override("sdpa") if over else contextlib.nullcontext():
        found = (as_sdpa if over else ours)(**inputs).logits
    rows = see[0, 0].any(-1)
    rows[:padding] = False
    assert rows.sum() > S / 2
    torch.testing.assert_close(found[:, rows], wanted[:, rows], rtol=1e-5, atol=1e-5)


def _in_window(name: str) -> Rule:
    """The rule of a sliding-window layer: the window belongs to what the functions are united with."""
    near: Rule = lambda q, k: 0 <= q - k < WINDOW  # noqa: E731
    return {
        "nothing": near,
        "or": lambda q, k: near(q, k) or 0 <= k - q <= 2,
        "and": lambda q, k: near(q, k) and (q - k) % 3 != 0,
        "or, and": lambda q, k: (near(q, k) or 0 <= k - q <= 2) and (q - k) % 3 != 0,
        "transformers' and": near,
        "or of ands": lambda q, k: near(q, k) or (0 <= k - q <= 2 and (q - k) % 3 != 0),
        "and of ors": near,
        "blocks": lambda q, k: near(q, k) or BLOCKS[q] == BLOCKS[k] >= 0,
        "blocks, and": lambda q, k: (near(q, k) and (q - k) % 3 != 0) or BLOCKS[q] == BLOCKS[k] >= 0,
    }[name]


def test_a_mask_that_the_caller_works_on_is_bool_and_still_open(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def create(*args: Any, **kwargs: Any) -> Any:
        mask = masking_utils.create_causal_mask(*args, **kwargs, allow_is_causal_skip=False)
        kinds.append(mask.dtype)
        return mask

    ours, _, _ = models(False)
    inputs, _ = given("cache")
    wanted = ours(**inputs).logits
    monkeypatch.setattr(modeling_mistral, "create_causal_mask", create)
    if "allow_is_causal_skip" not in inspect.signature(masking_utils.create_causal_mask).parameters:
        pytest.skip("callers cannot ask for it in this transformers")
    torch.testing.assert_close(ours(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    assert kinds == [torch.bool]


def test_a_users_own_mask_is_the_whole_truth() -> None:
    """Positions that go back cut nothing off a mask [B, 1, S, S] that says who sees whom (shared prefixes, trees)."""
    ours, eager, _ = models(False)
    see = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    floats = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    wanted = eager(input_ids=tokens(), position_ids=POSITIONS, attention_mask=floats, use_cache=False).logits
    found = ours(input_ids=tokens(), position_ids=POSITIONS, attention_mask=see, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _llama4() -> Any:
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_chunk_size=3, num_local_experts=1,
        layer_types=["chunked_attention"], no_rope_layers=[1], moe_layers=[],
    )  # fmt: skip
    return Llama4ForCausalLM._from_config(config, attn_implementation="hf_attn_patch")


def _bert() -> Any:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    return BertModel._from_config(config, attn_implementation="hf_attn_patch")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("causal_mask_function", lambda: models(False)[0]),
        ("sliding_window_overlay", lambda: models(True)[0]),
        ("and_masks", lambda: models(True)[0]),
        ("chunked_overlay", _llama4),
        ("packed_sequence_mask_function", lambda: models(True)[0]),
        ("remap_positions_for_packed_sequence", lambda: models(True)[0]),
        ("bidirectional_mask_function", _bert),
    ],
)
def test_a_change_inside_transformers_is_loud(
    name: str, build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function renamed inside: the model says so and computes nothing."""
    if not hasattr(masking_utils, name):
        pytest.skip("not in this transformers")
    model = build()
    inputs: dict[str, Any] = {"input_ids": tokens(), "position_ids": POSITIONS}
    if name != "bidirectional_mask_function":
        inputs["use_cache"] = False
    model(**inputs)
    real = getattr(masking_utils, name)
    inner = KNOWN[name][0]

    def renamed(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        if inner:
            made.__qualname__ = f"{name}.<locals>.another"
        return made

    if not inner:
        renamed.__module__, renamed.__qualname__ = masking_utils.__name__, f"{name}_2"
    monkeypatch.setattr(masking_utils, name, renamed)
    with pytest.raises(AttentionError, match=rf"{name}.* from transformers 5\.17 to 5\.24; install one of those"):
        model(**inputs)
