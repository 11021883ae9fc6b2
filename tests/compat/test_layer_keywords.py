"""What transformers' layers and mask code hand over by name: heeded, refused by name, and never passed over."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from hf_attn_patch import AttentionError
from hf_attn_patch.compat.ground import CompatError
from hf_attn_patch.compat.layer_keywords import named_by
from hf_attn_patch.hf.attention_function import NEVER, attention_forward
from hf_attn_patch.hf.mask_function import FURTHER, build_mask

FOLDER = Path(transformers.__file__).parent
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def keywords_of_calls(path: Path, function: str) -> set[str]:
    """The keywords of all calls of a name in a file (whole files take half a minute to parse)."""
    found: set[str] = set()
    _, *calls = re.split(rf"\b{function}\(", path.read_text(encoding="utf-8"))
    for rest in calls:
        depths = itertools.accumulate({"(": 1, ")": -1}.get(character, 0) for character in "(" + rest)
        end = next(place for place, depth in enumerate(depths) if depth == 0)
        call = ast.parse(f"f({rest[:end]}", mode="eval").body
        assert isinstance(call, ast.Call)
        found |= {keyword.arg for keyword in call.keywords if keyword.arg}
    return found


def test_every_keyword_of_a_layer_is_heeded_or_refused() -> None:
    heeded = set(inspect.signature(attention_forward).parameters) | NEVER
    new = {
        path.name: unheard
        for path in sorted((FOLDER / "models").glob("*/modeling_*.py"))
        if (unheard := keywords_of_calls(path, "attention_interface") - heeded)
    }
    assert not new


def test_every_keyword_of_a_mask_is_known() -> None:
    known = set(inspect.signature(build_mask).parameters) | FURTHER
    found = keywords_of_calls(FOLDER / "masking_utils.py", "mask_interface")
    assert {"attention_mask", "q_offset", "config"} <= found <= known


def test_names_are_read_off_layers_of_transformers_alone() -> None:
    class Own(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
            return attention_forward(self, q, k, v, mask, temperature=2.0)

    assert named_by(Own) == frozenset()
    assert named_by(modeling_llama.LlamaAttention) == {"dropout", "scaling"}


def llama_with(tmp_path: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' Llama with its source changed, as a release might."""
    source = inspect.getsource(modeling_llama)
    assert old in source
    path = tmp_path / "modeling_llama_next.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("transformers.models.llama.modeling_llama_next", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    config = transformers.LlamaConfig(**SIZES, **HEADS, attn_implementation="hf_attn_patch")
    return module.LlamaModel(config).eval()


def test_a_new_keyword_of_a_layer_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(6)[None]
    model = llama_with(tmp_path, "scaling=self.scaling,", "scaling=self.scaling, temperature=2.0,", monkeypatch)
    with pytest.raises(CompatError, match=r"what LlamaAttention hands to its attention function \('temperature'\)"):
        model(ids)
    (tmp_path / "none").mkdir()
    model = llama_with(
        tmp_path / "none", "scaling=self.scaling,", "scaling=self.scaling, temperature=None,", monkeypatch
    )
    assert model(ids, anything=torch.ones(1)).last_hidden_state.shape == (1, 6, 32)  # the caller's own words pass


def test_a_renamed_keyword_of_the_mask_is_refused_by_name() -> None:
    mask = torch.tensor([[False, True, True]])
    with pytest.raises(CompatError, match=r"handed to a mask function \(padding_mask\)"):
        build_mask(1, 3, 3, padding_mask=mask)
    assert build_mask(1, 3, 3, padding_mask=None, dtype=torch.float32) is not None


# --- mask functions that have moved, and a user's own --------------------------------------------------------------

IDS = torch.randint(0, 64, (1, 14), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(6), torch.arange(8)])[None]


def model_with_a_window() -> Any:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, **HEADS, sliding_window=4)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="hf_attn_patch").eval()


def as_of(make: Any, module: str) -> Any:
    """``make``, whose functions say that they are of ``module``."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        f = make(*args, **kwargs)
        moved = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        moved.__module__, moved.__qualname__ = module, f.__qualname__
        return moved

    return made


def one_closure(sliding_window: int) -> Any:
    def inner(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < sliding_window)

    return inner


@pytest.mark.parametrize("given", ["nothing", "a mask of ones"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("place", ["transformers.masking", "transformers.utils.masks", "users.own"])
@pytest.mark.parametrize("name", ["and_masks", "sliding_window_overlay", "sliding_window_causal_mask_function"])
def test_documents_stay_apart_or_it_is_refused(
    name: str, place: str, use_cache: bool, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with_a_window()
    with torch.no_grad():
        want = torch.cat([model(part).logits for part in (IDS[:, :6], IDS[:, 6:])], 1)
    make = one_closure if name == "sliding_window_causal_mask_function" else getattr(masking_utils, name)
    monkeypatch.setattr(masking_utils, name, as_of(make, place))
    mask = torch.ones_like(IDS) if given == "a mask of ones" else None
    refused = place.startswith("transformers")
    with torch.no_grad(), pytest.raises(AttentionError, match=place) if refused else contextlib.nullcontext():
        found = model(IDS, position_ids=POSITIONS, use_cache=use_cache, attention_mask=mask).logits
    if not refused:
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_a_function_of_ones_own_that_looks_ahead_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not causal, so positions that go back begin no document."""
    model = model_with_a_window()
    monkeypatch.setattr(
        masking_utils, "sliding_window_causal_mask_function", lambda window: lambda b, h, q, k: k <= q + 1
    )
    call = functools.partial(model, IDS, position_ids=POSITIONS, use_cache=True)
    with torch.no_grad():
        found = call().logits
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(found, call().logits, atol=1e-5, rtol=1e-5)
