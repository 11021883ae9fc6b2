"""Static buffers that are rewritten in place between forwards: every forward sees what is in them now."""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers.masking_utils import create_causal_mask

import hf_attn_patch
from hf_attn_patch.attn.visibility import Visibility
from hf_attn_patch.hf import call_visibility, mask_pattern
from hf_attn_patch.hf.attention_function import attention_forward

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
S = 12
IDS = torch.arange(3, 3 + S)[None]


def models(layers: int = 3, count: int = 1) -> tuple[Any, ...]:
    """Of one config object, which is the hardest to tell apart."""
    torch.manual_seed(0)
    first = tiny_llama(2, num_hidden_layers=layers).eval()
    others = [type(first)(first.config).eval() for _ in range(count - 1)]
    return tuple(hf_attn_patch.enable(m) for m in (first, *others))


def apart(model: Any, cuts: list[int]) -> torch.Tensor:
    """Each document by itself."""
    with torch.no_grad():
        parts = IDS.tensor_split(cuts, 1)
        return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts if part.numel()], 1)


def borders(cuts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *cuts, S], dtype=torch.int32)


def positions(cuts: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(b - a) for a, b in zip([0, *cuts], [*cuts, S], strict=True)])[None]


class Packed:
    """Packed documents of a model's input, in buffers that stay where they are."""

    def __init__(self, kind: str, mode: Any) -> None:
        self.kind = kind
        with mode():
            self.borders, self.positions = borders([4]), positions([4])

    def write(self, cuts: list[int]) -> None:
        self.borders.copy_(borders(cuts))
        self.positions.copy_(positions(cuts))

    def run(self, model: Any) -> torch.Tensor:
        given: dict[str, Any] = {"position_ids": self.positions}
        if self.kind == "borders":
            given |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.borders)
            given |= dict.fromkeys(("max_length_q", "max_length_k"), S)
        elif self.kind == "mask of ones":
            given["attention_mask"] = torch.ones(1, S, dtype=torch.int64)
        return model(input_ids=IDS, use_cache=False, **given).logits


def causal_mask(model: Any, keys: torch.Tensor) -> Any:
    """Transformers' own preparation of a mask, whose parameters were renamed now and then."""
    wanted = inspect.signature(create_causal_mask).parameters
    given: dict[str, Any] = {"inputs_embeds": torch.zeros(1, S, 8), "attention_mask": keys}
    given |= {name: None for name in ("past_key_values", "cache") if name in wanted}
    return create_causal_mask(config=model.config, **given)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["borders", "positions", "mask of ones"])
@pytest.mark.parametrize("layers", [1, 3])
def test_forwards_in_a_row(kind: str, layers: int, mode: str) -> None:
    (model,) = models(layers)
    packed = Packed(kind, MODES[mode])
    for cuts in ([4], [7], [7], [2], [9], [4]):
        with MODES[mode]():
            packed.write(cuts)
            found = packed.run(model)
        same(found, apart(model, cuts))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, S - 1), st.booleans()), min_size=2, max_size=6),
    st.sampled_from([*MODES]),
    st.sampled_from([*MODES]),
    st.sampled_from(["borders", "positions"]),
    st.sampled_from([1, 2]),
)
def test_models_that_share_a_buffer(
    steps: list[tuple[int, int, bool]], made: str, ran: str, kind: str, layers: int
) -> None:
    both = models(layers, 2)
    if made == "inference" and ran == "grad":
        ran = "no_grad"  # such a buffer cannot be saved for backward, by torch's rule
    packed, cuts = Packed(kind, MODES[made]), [4]
    for which, cut, rewrite in steps:
        if rewrite:
            cuts = [cut]
            with MODES[made]():
                packed.write(cuts)
        with MODES[ran]():
            found = packed.run(both[which])
        same(found, apart(both[which], cuts))


@pytest.mark.parametrize("kind", ["borders", "positions"])
def test_an_exception_in_the_middle_leaves_nothing_behind(kind: str) -> None:
    (model,) = models()
    packed = Packed(kind, torch.inference_mode)
    broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        packed.run(model)
    broken.remove()
    with torch.inference_mode():
        packed.write([8])
        found = packed.run(model)
    same(found, apart(model, [8]))


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_threads_with_a_model_and_a_buffer_each_or_one_for_both(mode: str) -> None:
    (model,) = models()
    shared = Packed("borders", MODES[mode])
    errors: list[BaseException] = []
    together = threading.Barrier(2)

    def work(own: Packed, mine: list[int]) -> None:
        try:
            for i in range(6):
                with MODES[mode]():
                    own.write([mine[i % len(mine)]])
                    same(own.run(model), apart(model, [mine[i % len(mine)]]))
                together.wait()
                with MODES[mode]():
                    found = shared.run(model)
                same(found, apart(model, [4 + i]))
                if together.wait() == 0:
                    with MODES[mode]():
                        shared.write([5 + i])
                together.wait()
        except BaseException as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(Packed("borders", MODES[mode]), m)) for m in ([3, 8], [5, 1, 10])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["bool", "float", "bias"])
def test_masks_and_biases_of_the_callers(form: str, mode: str) -> None:
    (model,) = models()
    with MODES[mode]():
        mask = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
        static = mask.clone() if form == "bool" else torch.zeros(1, 1, S, S).masked_fill(~mask, -torch.inf)
    for cut in (4, 7, 2):
        document = (torch.arange(S) >= cut).long()
        wanted = torch.ones(S, S, dtype=torch.bool).tril() & (document[:, None] == document[None])
        with MODES[mode]():
            static.copy_(wanted if form == "bool" else torch.zeros(S, S).masked_fill(~wanted, -torch.inf))
        with MODES[mode](), hf_attn_patch.use_backend("torch_sdpa" if form == "bias" else "reference"):
            found = model(input_ids=IDS, attention_mask=static, position_ids=positions([cut]), use_cache=False).logits
        same(found, apart(model, [cut]))


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_that_the_caller_made_once(mode: str) -> None:
    """Transformers' own preparation of masks, kept over several forwards, with positions that change."""
    (model,) = models()
    with MODES[mode]():
        mask = causal_mask(model, torch.ones(1, S))
        ids = positions([4])
        for cuts in ([4], [7], [2]):
            ids.copy_(positions(cuts))
            found = model(input_ids=IDS, attention_mask=mask, position_ids=ids, use_cache=False).logits
            same(found, apart(model, cuts))


def test_the_mask_of_the_keys_is_read_when_it_is_made() -> None:
    """A bool mask is the caller's memory; what was made of it is ours."""
    (model,) = models()
    keys = torch.ones(1, S, dtype=torch.bool)
    keys[:, :3] = False
    mask = causal_mask(model, keys)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=keys.clone(), use_cache=False).logits
        keys.fill_(True)
        found = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    same(found[:, 3:], expected[:, 3:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["positions", "mask of ones", "borders"])
def test_it_is_worked_out_once_a_forward(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"patterns": 0, "borders": 0}
    resolve, packed = mask_pattern.Pattern._resolve, call_visibility.packed

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(mask_pattern.Pattern, "_resolve", count("patterns", resolve))
    monkeypatch.setattr(call_visibility, "packed", count("borders", packed))
    (model,) = models(4)
    static = Packed(kind, MODES[mode])
    for forward in range(1, 4):
        with MODES[mode]():
            static.write([forward + 2])
            static.run(model)
        assert counts["borders" if kind == "borders" else "patterns"] == forward
        assert sum(counts.values()) == forward


def test_what_inference_mode_left_can_be_trained_with() -> None:
    (model,) = models()
    mask = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    packed = Packed("borders", torch.no_grad)
    for masked in ({}, {"attention_mask": mask}):
        with torch.inference_mode():
            model(input_ids=IDS, use_cache=False, **masked)
            packed.run(model)
        model(input_ids=IDS, labels=IDS, use_cache=False, **masked).loss.backward()
        packed.run(model).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_is_kept_with_a_mask_goes_with_it() -> None:
    def layouts() -> int:
        gc.collect()
        return sum(isinstance(o, Visibility) for o in gc.get_objects())

    module: Any = torch.nn.Module()
    module.is_causal, module.layer_idx = False, 0
    q = torch.randn(1, 2, S, 8)
    before = layouts()
    for _ in range(5):
        attention_forward(module, q, q, q, torch.ones(1, 1, S, S, dtype=torch.bool).tril())
    assert layouts() == before
