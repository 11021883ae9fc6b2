"""What is generated with a cache is what is generated without, by every family, implementation and way to search."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from zoo_cases import BEFORE_5_24, BY_NAME, CASES, HEADS, VOCAB, Case

from hf_attn_patch.compat.cache_keyword import NAMES
from hf_attn_patch.modeling.grouped import GroupedAttention

GENERATING = [c for c in CASES if c.generates]
generating = pytest.mark.parametrize("case", GENERATING, ids=[c.stock for c in GENERATING])
NEW = 6
SEARCH = {
    "greedy": {"do_sample": False, "repetition_penalty": 1.6},
    "beams": {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.6},
}


def prompt(case: Case) -> dict[str, Any]:
    feed = case.inputs(batch=2, length=6, padding="left" if case.kind == "causal" else None)
    feed.pop("decoder_input_ids", None)
    return feed


def filled(case: Case, out: Any) -> int:
    """The tokens in the first layer of what ``generate`` gave back as its cache."""
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    return int((cache.self_attention_cache if case.seq2seq else cache).get_seq_length())


@generating
@pytest.mark.parametrize("attn", ["eager", "sdpa", "hf_attn_patch"])
@pytest.mark.parametrize("search", SEARCH)
def test_cached_tokens_are_the_uncached_ones(case: Case, attn: str, search: str) -> None:
    model = case.make(2, attn)
    options = {**SEARCH[search], "max_new_tokens": NEW, "eos_token_id": None, "return_dict_in_generate": True}
    cached = model.generate(**prompt(case), **options, use_cache=True)
    without = model.generate(**prompt(case), **options, use_cache=False).sequences
    assert torch.equal(cached.sequences, without)
    assert filled(case, cached) == without.shape[1] - 1  # the last token is not fed back
    assert without.unique().numel() > 3, "the model says one thing only: the test would prove little"


@pytest.mark.parametrize("search", SEARCH)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "hf_attn_patch"])
@pytest.mark.parametrize("stock", ["bert", "roberta", "electra", "bart", "mbart", "marian", "whisper"])
def test_encoders_and_decoders_that_stand_alone(stock: str, attn: str, search: str) -> None:
    """BERT as a decoder, and the decoder of an encoder-decoder by itself."""
    more = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1, "is_decoder": True, "is_encoder_decoder": False}
    config = BY_NAME[stock].make_config(2, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    assert type(model).__name__.startswith("Grouped")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.dim() > 1:
                p.normal_(0, 0.2 if "embed" in name else 1.4 / p.shape[-1] ** 0.5)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    options = {**SEARCH[search], "max_new_tokens": NEW, "return_dict_in_generate": True}
    cached = model.generate(ids, **options)
    assert torch.equal(cached.sequences, model.generate(ids, **options, use_cache=False).sequences)
    cache = cached["cache"] if "cache" in cached else cached["past_key_values"]
    assert cache.get_seq_length() == cached.sequences.shape[1] - 1
    assert cached.sequences.unique().numel() > 3


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("case", [c for c in GENERATING if c.kind == "causal"], ids=lambda c: c.stock)
def test_a_static_cache_gives_the_same_tokens(case: Case, padding: str | None) -> None:
    """Without padding, generate may drop the mask and make one of four dimensions."""
    static = {"cache_implementation": "static", "disable_compile": True}
    if case.stock == "bloom" and padding is None:
        try:
            case.make(None).generate(**case.inputs(), max_new_tokens=2, **static)
        except ValueError:
            pytest.skip("this transformers' own BLOOM reads the mask of four dimensions as one of two")
    model, options = case.make(2, "hf_attn_patch"), {**SEARCH["greedy"], "max_new_tokens": NEW, "eos_token_id": None}
    feed = case.inputs(padding=padding)
    want = model.generate(**feed, **options, use_cache=False)
    got = model.generate(**feed, **options, **static)
    assert torch.equal(got, want)


#: the stock code of these hands paged caches to its layers, some of it only up to 5.23 or from 5.24
PAGED = {"gpt2", "gpt_neox", "opt", "biogpt"} | (set() if BEFORE_5_24 else {"gptj", "codegen"})
if not BEFORE_5_24:
    PAGED -= {"opt", "biogpt"}  # they ask it for a length that it does not know, stock ones too: an error, not silence


@pytest.mark.parametrize("case", [c for c in GENERATING if c.kind == "causal"], ids=lambda c: c.stock)
def test_continuous_batching_runs_or_is_refused(case: Case) -> None:
    prompts = [case.inputs(batch=1, length=n, seed=n)["input_ids"][0].tolist() for n in (3, 7)]
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, block_size=8, max_batch_tokens=16)
    model = case.make(2, "sdpa")
    if case.outside and case.stock not in PAGED:
        with pytest.raises(ValueError, match=r"continuous batching.*call generate instead of generate_batch"):
            model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
        return
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
    found = {tuple(o.prompt_ids): o for o in outputs.values()}
    for ids in prompts:
        if case.stock in PAGED:
            want = model.generate(torch.tensor([ids]), generation_config=generation)[0, len(ids) :].tolist()
            assert found[tuple(ids)].generated_tokens == want
        else:
            assert found[tuple(ids)].error


@pytest.mark.parametrize("name", [*NAMES, "kv_store"])
@pytest.mark.parametrize("case", [c for c in GENERATING if not c.seq2seq], ids=lambda c: c.stock)
def test_a_cache_under_another_name_is_filled_all_the_same(case: Case, name: str) -> None:
    """Stock blocks hand it to our attentions by the name that their release has; a release to come may have its own."""
    model = case.make(HEADS // 2)

    def renamed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (old,) = [n for n in NAMES if n in kwargs]
        return args, {name if n == old else n: value for n, value in kwargs.items()}

    options = {**SEARCH["greedy"], "max_new_tokens": NEW, "return_dict_in_generate": True}
    want = model.generate(**prompt(case), **options, use_cache=False).sequences
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, GroupedAttention)]
    if "forward" not in vars(type(attentions[0])) and not hasattr(type(attentions[0]), "project"):
        pytest.skip("the stock forward serves this family, whose names are its own")
    for module in attentions:
        module.register_forward_pre_hook(renamed, with_kwargs=True)
    out = model.generate(**prompt(case), **options)
    assert torch.equal(out.sequences, want)
    assert filled(case, out) == want.shape[1] - 1


@pytest.mark.parametrize("case", [c for c in GENERATING if not c.seq2seq], ids=lambda c: c.stock)
def test_a_cache_that_is_given_is_used(case: Case) -> None:
    """By either name, by the model and by its body, whatever ``use_cache`` says: as one forward over all tokens."""
    model = case.make(2)
    ids = case.inputs()["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits[:, 4:]
        for name in ("cache", "past_key_values"):
            if name == "cache" and name not in keyword_names(model):
                continue  # stock models up to 5.23 drop what they do not know
            for use_cache in (True, False):
                cache = DynamicCache(config=model.config)
                model(input_ids=ids[:, :4], use_cache=use_cache, **{name: cache})
                assert cache.get_seq_length() == 4
                got = model(input_ids=ids[:, 4:], use_cache=use_cache, **{name: cache}).logits
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        body, cache = model.base_model, DynamicCache(config=model.config)
        whole = body(input_ids=ids, use_cache=False)[0][:, 4:]
        body(ids[:, :4], **{body_keyword(body): cache})
        got = body(ids[:, 4:], **{body_keyword(body): cache})[0]
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)


def keyword_names(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def body_keyword(body: nn.Module) -> str:
    return next(n for n in NAMES if n in keyword_names(body))
