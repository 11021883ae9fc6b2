"""Tokens chosen inside recorded steps, several in flight: the same tokens, cache and random numbers as without."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from decoding import batch, build, generate
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

import hf_attn_patch
from hf_attn_patch.compat.calls import cache_of, generate_keyword
from hf_attn_patch.decoding import cuda_graphs as graphs
from hf_attn_patch.decoding import flight, step
from hf_attn_patch.decoding.recorded_forward import recorder_of

MANY = list(range(5, 40))  # a third of the words end a row


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})


@pytest.fixture
def landings(monkeypatch: pytest.MonkeyPatch) -> list[flight.Landing]:
    """What the flights of a test came to."""
    found: list[flight.Landing] = []
    run = flight.Flight.run

    def kept(self: flight.Flight) -> flight.Landing:
        found.append(run(self))
        return found[-1]

    monkeypatch.setattr(flight.Flight, "run", kept)
    return found


def both(family: str, inputs: dict[str, torch.Tensor], **how: Any) -> tuple[Any, Any, Any, Any]:
    """A model, and what it gives without and with our steps; the random generator is where it was without."""
    model = build(family, "cpu")
    expected = generate(model, inputs, **how)
    after = torch.get_rng_state()
    hf_attn_patch.enable(model)
    found = generate(model, inputs, **how)
    torch.testing.assert_close(torch.get_rng_state(), after, rtol=0, atol=0)
    return model, inputs, expected, found


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "common": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p and penalty": {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.3},
    "typical": {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 1e-3, "renormalize_logits": True},
    "greedy penalty": {"repetition_penalty": 1.5, "suppress_tokens": [3, 4]},
    "rows end": {"do_sample": True, "eos_token_id": MANY, "min_new_tokens": 12},
    "rows end early": {"do_sample": True, "eos_token_id": MANY, "min_length": 52},
    "never ends": {"do_sample": True, "eos_token_id": MANY, "min_new_tokens": 40},
    "forced at the end": {"forced_eos_token_id": 9, "eos_token_id": 9, "do_sample": True, "temperature": 2.0},
    "several answers": {"do_sample": True, "num_return_sequences": 3, "eos_token_id": [7, 8, 9]},
    "max time": {"max_time": 1e6},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("family", ["llama", "gemma3", "bart"])
def test_the_same_tokens(family: str, how: dict[str, Any], landings: list[flight.Landing]) -> None:
    *_, expected, found = both(family, batch("cpu"), max_new_tokens=40, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sum(landing.steps for landing in landings) >= 8
    assert not any(landing.error for landing in landings)


LATE: dict[str, Any] = {
    "suppressed": transformers.SuppressTokensAtBeginLogitsProcessor([*range(2, 127)], begin_index=45),
    "not penalized": transformers.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=50),
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE.keys())
def test_what_depends_on_the_number_of_tokens_is_over_before(late: Any, landings: list[flight.Landing]) -> None:
    *_, expected, found = both("llama", batch("cpu"), max_new_tokens=30, logits_processor=[late])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert landings


@pytest.mark.parametrize(
    ("family", "padded"), [("llama", False), ("llama", True), ("mistral", True), ("gemma2", True), ("bart", True)]
)
def test_past_windows_and_buffers(
    family: str, padded: bool, landings: list[flight.Landing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are full at 256 keys: the flight lands, the cache grows, the next one starts."""
    if family != "llama":  # so many steps of fused kernels take the interpreter a minute
        monkeypatch.setattr(step.fusing, "can_fuse", lambda device: False)
    *_, expected, found = both(family, batch("cpu", 2, 37, padded), max_new_tokens=275)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(landings) >= 2
    assert sum(landing.steps for landing in landings) >= 260


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bart"])
def test_what_was_started_late_leaves_nothing_in_the_cache(family: str, landings: list[flight.Landing]) -> None:
    model, inputs = build(family, "cpu"), batch("cpu")
    ends = list(range(2, 118))
    how = {"do_sample": True, "eos_token_id": ends, "min_new_tokens": 12, "return_dict_in_generate": True}
    expected: Any = generate(model, inputs, **how)
    hf_attn_patch.enable(model)
    found: Any = generate(model, inputs, **how)
    assert [landing.stopped for landing in landings] == [True]
    torch.testing.assert_close(found.sequences, expected.sequences, rtol=0, atol=0)
    assert {k for k, v in found.items() if v is not None} == {k for k, v in expected.items() if v is not None}
    ours, theirs = cache_of(found), cache_of(expected)
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours, theirs = step.growing_of(ours), step.growing_of(theirs)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, other.values, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_from_the_cache() -> None:
    model, inputs = build("llama", "cpu"), batch("cpu", 2, 20, padded=False)
    answers = []
    for switch in (False, True):
        if switch:
            hf_attn_patch.enable(model)
        cache = hf_attn_patch.GrowingCache(config=model.config)
        said = {generate_keyword(): cache, "max_new_tokens": 30, "eos_token_id": MANY, "min_new_tokens": 14}
        first = generate(model, inputs, do_sample=True, **said)
        more = torch.cat([first, batch("cpu", 2, 9, padded=False)["input_ids"]], 1)
        answers.append(generate(model, {"input_ids": more}, do_sample=True, **said))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.put_.append(value.tolist())

    def end(self) -> None:
        self.put_.append("end")


def test_a_streamer_is_given_every_token_once(landings: list[flight.Landing]) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu", 1)
    how = {"do_sample": True, "eos_token_id": MANY, "min_new_tokens": 12}
    streams = [Kept(), Kept()]
    generate(model, inputs, streamer=streams[0], **how)
    hf_attn_patch.enable(model)
    generate(model, inputs, streamer=streams[1], **how)
    assert streams[1].put_ == streams[0].put_
    assert landings[0].stopped


class Odd(LogitsProcessor):
    """Forbids the words that were said an odd number of times."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(scores)[:, : input_ids.shape[1]])
        return scores.masked_fill(counts % 2 == 1, -torch.inf)


class Seven(StoppingCriteria):
    """Ends a row whose last word can be divided by 7."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


EACH: dict[str, dict[str, Any]] = {
    "processor": {"logits_processor": transformers.LogitsProcessorList([Odd()])},
    "criterion": {"stopping_criteria": transformers.StoppingCriteriaList([Seven()]), "pad_token_id": 0},
    "ngrams": {"no_repeat_ngram_size": 2},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "short": {"max_new_tokens": 9},
}


@pytest.mark.parametrize("how", EACH.values(), ids=EACH.keys())
def test_what_needs_each_token_goes_token_by_token(how: dict[str, Any], landings: list[flight.Landing]) -> None:
    *_, expected, found = both("llama", batch("cpu", 1 if "prompt_lookup_num_tokens" in how else 3), **how)
    if "output_scores" in how:
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
        found, expected = found.sequences, expected.sequences
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not landings


def test_beams_asked_for_in_a_config(landings: list[flight.Landing]) -> None:
    *_, expected, found = both("llama", batch("cpu"), generation_config=GenerationConfig(num_beams=2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    model = build("llama", "cpu")
    model.generation_config.num_beams = 2
    expected = generate(model, batch("cpu"))
    hf_attn_patch.enable(model)
    torch.testing.assert_close(generate(model, batch("cpu")), expected, rtol=0, atol=0)
    assert not landings
    assert generate(model, batch("cpu"), num_beams=1).shape == (4, 97)
    assert landings


def test_an_error_in_flight_is_said_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, landings: list[flight.Landing]
) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs, do_sample=True)
    hf_attn_patch.enable(model)
    work, calls = flight.ChoosingStep.work, []

    def fails(self: Any, cache: Any) -> None:
        work(self, cache)
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("not again")

    monkeypatch.setattr(flight.ChoosingStep, "work", fails)
    caplog.set_level("INFO", logger="hf_attn_patch")
    for _ in range(2):
        torch.testing.assert_close(generate(model, inputs, do_sample=True), expected, rtol=0, atol=0)
    assert [landing.steps for landing in landings] == [4]
    said = [message for message in caplog.messages if "outside its recorded steps" in message]
    assert said == ["tokens of LlamaForCausalLM are chosen outside its recorded steps: ValueError: not again"]


def test_scores_that_are_not_a_number_are_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    hf_attn_patch.enable(model)
    generate(model, inputs, do_sample=True)
    processed = flight.Choosing.processed
    monkeypatch.setattr(flight.Choosing, "processed", lambda self, scores: processed(self, scores) * torch.nan)
    with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan`"):
        generate(model, inputs, do_sample=True)


def test_positions_that_move_in_a_way_of_their_own_are_refused(
    caplog: pytest.LogCaptureFixture, landings: list[flight.Landing]
) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    prepare = model.prepare_inputs_for_generation

    def doubled(ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        made = prepare(ids, **kwargs)
        made["position_ids"] = 2 * made["position_ids"]
        return made

    model.prepare_inputs_for_generation = doubled
    expected = generate(model, inputs)
    hf_attn_patch.enable(model)
    caplog.set_level("INFO", logger="hf_attn_patch")
    torch.testing.assert_close(generate(model, inputs), expected, rtol=0, atol=0)
    assert not landings
    assert any(message.endswith("its position_ids changes with each token") for message in caplog.messages)


def test_generate_is_put_back_and_goes_along_with_copies(landings: list[flight.Landing]) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs)
    hf_attn_patch.enable(model)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    assert twin.generate.model is twin
    assert again.generate.model is again
    hf_attn_patch.enable(model, cuda_graphs=False)
    assert "generate" not in vars(model)
    for other, flown in ((model, 0), (again, 0), (twin, 1)):  # a pickle has its class's forward
        torch.testing.assert_close(generate(other, inputs), expected, rtol=0, atol=0)
        assert len(landings) == flown


def test_a_way_to_generate_that_somebody_put_in_place_stays(landings: list[flight.Landing]) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    theirs = model.generate
    model.generate = lambda *args, **kwargs: theirs(*args, **kwargs)
    mine = vars(model)["generate"]
    hf_attn_patch.enable(model)
    assert vars(model)["generate"] is mine
    generate(model, inputs)
    hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
    assert vars(model)["generate"] is mine
    assert not landings


def test_signatures_are_those_of_the_model() -> None:
    model = build("llama", "cpu")
    before = inspect.signature(model.generate), inspect.signature(model.forward)
    hf_attn_patch.enable(model)
    assert (inspect.signature(model.generate), inspect.signature(model.forward)) == before


def test_a_model_is_compiled_and_loaded_with_its_steps(landings: list[flight.Landing]) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    hf_attn_patch.enable(model)
    expected = generate(model, inputs, max_new_tokens=12)
    compiled: Any = torch.compile(model, backend="eager")
    again = pickle.loads(pickle.dumps(model))
    hf_attn_patch.enable(again)
    recorder = recorder_of(again)
    assert recorder is not None
    assert recorder.inner is type(model).forward
    for other in (compiled, again):
        torch.testing.assert_close(generate(other, inputs, max_new_tokens=12), expected, rtol=0, atol=0)
    assert [landing.steps > 0 for landing in landings] == [True] * 3
    hf_attn_patch.enable(again, cache=None, cuda_graphs=False)
    assert "forward" not in vars(again)


def test_a_model_in_training_is_not_recorded(landings: list[flight.Landing]) -> None:
    """Not even after it was in evaluation; its dropout is drawn as ever."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.5, eos_token_id=None)
    )
    inputs = batch("cpu")
    model.set_attn_implementation("hf_attn_patch")
    expected = generate(model.train(), inputs)
    hf_attn_patch.enable(model)
    generate(model.eval(), inputs)
    assert landings.pop().steps
    torch.testing.assert_close(generate(model.train(), inputs), expected, rtol=0, atol=0)
    assert not landings


def test_hooks_of_the_model_see_each_token(landings: list[flight.Landing]) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    hf_attn_patch.enable(model)
    seen: list[int] = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    generate(model, inputs)
    assert len(seen) == 60
    assert not landings
    hook.remove()
    generate(model, inputs)
    assert len(seen) == 60
    assert landings


class Watch(TorchDispatchMode):
    """Sees how often a word is looked up."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(int(func is torch.ops.aten.embedding.default))
        return func(*args, **(kwargs or {}))


def test_processes_that_step_together_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, landings: list[flight.Landing]
) -> None:
    """Who replaces its loop is not told that every process takes as many steps as the slowest."""
    model, inputs = build("llama", "cpu"), batch("cpu")
    hf_attn_patch.enable(model)
    monkeypatch.setattr(transformers.generation.utils, "is_fsdp_managed_module", lambda module: module is model)
    generate(model, inputs, max_new_tokens=12, custom_generate=None, assistant_model=None)
    assert landings.pop().steps
    for asked in ("is_initialized", "get_world_size"):
        monkeypatch.setattr(torch.distributed, asked, lambda *_: 2)
    synced: list[bool] = []
    loop = type(model)._sample

    def sample(*args: Any, synced_gpus: bool = False, **kwargs: Any) -> Any:
        synced.append(synced_gpus)
        return loop(*args, **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "_sample", sample)
    generate(model, inputs, max_new_tokens=12)
    assert synced == [True]
    assert not landings


@pytest.mark.parametrize("watch", ["modules", "operators"])
def test_who_watches_all_modules_or_operators_sees_those_of_each_token(
    watch: str, landings: list[flight.Landing]
) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    seen: list[int] = []
    hf_attn_patch.enable(model)
    of_all = functools.partial(register_module_forward_pre_hook, lambda module, _: seen.append(int(module is model)))
    with of_all() if watch == "modules" else Watch(seen):
        generate(model, inputs, max_new_tokens=12)
    assert sum(seen) == 12
    assert not landings
    generate(model, inputs, max_new_tokens=12)
    assert landings
