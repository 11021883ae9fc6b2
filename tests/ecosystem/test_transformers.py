"""transformers' own tools on a converted model, against the same with eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounded import RoundedCache
from scripts import on_two
from tiny import trained_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from works_with import works_with

import hf_attn_patch
from hf_attn_patch.compat.calls import generate_keyword


def train(model: Any, collator: Any, folder: Path) -> list[float]:
    """The losses of three steps on documents of different lengths."""
    generator = torch.Generator().manual_seed(1)
    documents = [
        {"input_ids": torch.randint(2, 512, (n,), generator=generator).tolist()} for n in (5, 17, 9, 12, 7, 20)
    ]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=3, logging_steps=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, data_seed=0, remove_unused_columns=False,
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model=model.train(), args=arguments, train_dataset=documents, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@works_with("transformers", "Trainer, padded batches", "Trainer(model=hf_attn_patch.enable(model), ...)")
def test_trainer_padded(load: Any, tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(trained_tokenizer(), mlm=False)
    ours, eager = train(load(), collator, tmp_path), train(load("eager"), collator, tmp_path)
    assert len(ours) == 3
    assert ours == pytest.approx(eager, abs=1e-4)
    assert len(set(ours)) == 3


@works_with("transformers", "Trainer, padding-free", "Trainer(..., data_collator=DataCollatorWithFlattening())")
@pytest.mark.parametrize("lengths", [False, True])
def test_trainer_padding_free(load: Any, tmp_path: Path, lengths: bool) -> None:
    """Packed documents give the losses that padded ones give with eager attention: they don't see each other."""
    collator = DataCollatorForLanguageModeling(trained_tokenizer(), mlm=False)
    packed = train(load(), DataCollatorWithFlattening(return_flash_attn_kwargs=lengths), tmp_path)
    assert packed == pytest.approx(train(load("eager"), collator, tmp_path), abs=1e-4)


@works_with("transformers", "pipeline", 'pipeline("text-generation", model=model, tokenizer=tokenizer)')
def test_pipeline(load: Any) -> None:
    tokenizer = trained_tokenizer()
    texts = []
    for implementation in ("hf_attn_patch", "eager"):
        run = pipeline("text-generation", model=load(implementation), tokenizer=tokenizer, device="cpu")
        found = run(["import os", "def f(x, y):"], batch_size=2, max_new_tokens=6, do_sample=False)
        texts.append([row[0]["generated_text"] for row in found])
    assert texts[0] == texts[1]


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


@works_with("transformers", "generate, streaming", "model.generate(..., streamer=TextStreamer(tokenizer))")
def test_streaming(load: Any, batch: dict[str, torch.Tensor]) -> None:
    heard, ids = Heard(), batch["input_ids"][1:]
    out = load().generate(ids, streamer=heard, max_new_tokens=6, do_sample=False)
    assert heard.tokens == out[0].tolist()
    assert torch.equal(out, load("eager").generate(ids, max_new_tokens=6, do_sample=False))


@works_with("transformers", "generate, beam search", "model.generate(..., num_beams=4)")
@pytest.mark.parametrize("cache", [None, "growing"])
def test_beams(load: Any, batch: dict[str, torch.Tensor], cache: str | None) -> None:
    ours = hf_attn_patch.enable(load("eager"), cache=cache)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **options), load("eager").generate(**batch, **options))


@works_with("transformers", "generate, keys and values cached as int8 codes (not exact)", 'enable(model, cache="int8")')
def test_codes(load: Any, batch: dict[str, torch.Tensor]) -> None:
    """Token by token the logits of a cache that rounds what it is given, and not those of one that keeps it."""
    out = []
    for cache in (RoundedCache("int8", load("eager").config), DynamicCache(), None):
        model = load("eager") if cache is not None else hf_attn_patch.enable(load("eager"), cache="int8")
        given = {} if cache is None else {generate_keyword(): cache}
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
        found = model.generate(**batch, **options, **given, return_dict_in_generate=True)
        out.append(torch.stack(found.logits))
    torch.testing.assert_close(out[2], out[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(out[0], out[1])


@works_with("transformers", "generate, assisted decoding", "model.generate(..., assistant_model=converted)")
def test_assisted_by_the_converted_model(multi_head: Path, load: Any, batch: dict[str, torch.Tensor]) -> None:
    """A conversion makes a natural draft model for its source: same tokenizer, smaller cache."""
    source = AutoModelForCausalLM.from_pretrained(multi_head, attn_implementation="hf_attn_patch").eval()
    ids = batch["input_ids"][1:]
    alone = source.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(source.generate(ids, assistant_model=load(), max_new_tokens=8, do_sample=False), alone)


@works_with("transformers", "save_pretrained and from_pretrained", "model.save_pretrained(folder)")
def test_round_trip(load: Any, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = load()
    with torch.no_grad():
        before = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_attn_patch").eval()
    assert again.config.num_key_value_heads == 2
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, before)


@works_with("transformers", "set_attn_implementation, there and back", 'model.set_attn_implementation("hf_attn_patch")')
def test_switching(load: Any, batch: dict[str, torch.Tensor]) -> None:
    model, seen = load("sdpa"), batch["attention_mask"] == 1
    with torch.no_grad():
        before = model(**batch).logits
        model.set_attn_implementation("hf_attn_patch")
        torch.testing.assert_close(model(**batch).logits[seen], before[seen], rtol=1e-4, atol=1e-5)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(**batch).logits, before)


@works_with(
    "transformers", "tensor parallel, growing cache and recorded steps", 'from_pretrained(path, tp_plan="auto")'
)
def test_tensor_parallel(multi_head: Path) -> None:
    """Two processes give the tokens of one, greedily, sampled and with beams (tests/gpu has two GPUs do it)."""
    told = on_two("tests/helpers/tensor_parallel_generate.py", str(multi_head))
    for rank in range(2):
        assert f"rank {rank}: the same tokens; recorded as CUDA graphs; steps in flight: [" in told
        for turn, known in (("first", False), ("again", True)):
            kinds = "2 gated activations, 5 norms, 2 rotary embeddings with the cache's new token; known"
            said = f"rank {rank}, {turn}: the same tokens; recorded as CUDA graphs, with one kernel each for {kinds}"
            assert f"{said} {known}" in told
