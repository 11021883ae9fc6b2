"""Calibration on every kind of model that reads text: nothing is lost where heads are one head in several bases."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from shared_heads import KEYS_HAVE_A_NORM, share_heads
from tiny import python_sources, trained_tokenizer
from tiny_families import FAMILIES, tiny_config
from zoo_cases import BY_NAME, output

from hf_attn_patch.conversion import ConversionError, convert, plan

SMALL: dict[str, Any] = {"method": "auto", "calibration_tokens": 1500, "calibration_length": 16}
#: one of each kind: biases, odd head_dim, softcaps and windows, norms of K, partial and interleaved RoPE, fused, sinks
STOCK = (
    "llama",
    "gemma2",
    "gemma3_text",
    "qwen3",
    "phi",
    "phi3",
    "glm",
    "stablelm",
    "cohere2",
    "olmo2",
    "gpt_oss",
    "mixtral",
)
ZOO = (
    "gpt2", "gpt_neox", "opt", "biogpt", "gptj", "codegen", "gpt_neo", "mpt", "bert", "roberta", "electra", "distilbert"
)  # fmt: skip
PAIRED = ("t5", "mt5", "bart", "mbart", "marian")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(p.read_text() for p in python_sources())[:12_000])
    return str(path)


def made(name: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of that family in ``folder``, with a tokenizer; what loads it, and what to feed it."""
    torch.manual_seed(0)
    ids = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    if name in BY_NAME:
        case = BY_NAME[name]
        model, kind = case.make(None, vocab_size=512), getattr(transformers, case.auto)
        feed = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if case.seq2seq else {})
    else:
        model = getattr(transformers, FAMILIES[name][0])(tiny_config(name, vocab_size=512)).eval()
        kind, feed = transformers.AutoModelForCausalLM, {"input_ids": ids}
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return kind, feed


def told(kind: Any, folder: Path, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return output(kind.from_pretrained(folder).eval(), feed)


@pytest.mark.parametrize("name", STOCK + ZOO + PAIRED)
def test_lossless_where_heads_are_one_in_several_bases(name: str, text: str, tmp_path: Path) -> None:
    kind, feed = made(name, tmp_path / "src")
    heads = BY_NAME[name].all_attentions(2) if name in BY_NAME else 2
    share_heads(plan(tmp_path / "src", heads, method="aligned"), tmp_path / "src", 2, keys=name not in KEYS_HAVE_A_NORM)
    record = convert(tmp_path / "src", tmp_path / "dst", heads, calibrate=text, **SMALL)
    before, after = (told(kind, tmp_path / d, feed) for d in ("src", "dst"))
    assert float((after - before).abs().max()) < 2e-4 * float(before.abs().max())
    layers = record["details"]["layers"]
    assert len(layers) == {True: 6, False: 2}[name in PAIRED]
    assert all(fit["error"] < 1e-6 for fit in layers.values())
    convert(tmp_path / "src", tmp_path / "mean", heads, method="mean")
    lost = float((told(kind, tmp_path / "mean", feed) - before).abs().max())
    assert lost > 1e-3 * float(before.abs().max())  # the feed would show a loss


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart", "gemma2"])
def test_fitting_gains_on_text_that_was_not_fitted_to(name: str, text: str, tmp_path: Path) -> None:
    kind, feed = made(name, tmp_path / "src")
    record = convert(tmp_path / "src", tmp_path / "fit", 1, calibrate=text, **{**SMALL, "calibration_tokens": 4000})
    convert(tmp_path / "src", tmp_path / "aligned", 1, method="aligned")
    words = trained_tokenizer()(python_sources()[-1].read_text())["input_ids"][: 24 * 12]
    feed = {key: torch.tensor(words).view(24, 12)[:, : value.shape[1]] for key, value in feed.items()}
    if "decoder_input_ids" in feed:  # what a decoder reads is what it said; drawn by transformers
        torch.manual_seed(3)
        model, length = kind.from_pretrained(tmp_path / "src").eval(), feed["decoder_input_ids"].shape[1]
        more = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "do_sample": True, "top_k": 0}
        feed["decoder_input_ids"] = model.generate(input_ids=feed["input_ids"], **more)
    truth, fit, aligned = (told(kind, tmp_path / d, feed) for d in ("src", "fit", "aligned"))
    assert (fit - truth).norm() < 0.95 * (aligned - truth).norm()
    assert any(f["refitted"] < 0.95 * f["error"] for f in record["details"]["layers"].values())


def test_an_already_grouped_source(text: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config("llama", vocab_size=512, num_key_value_heads=4))
    model.save_pretrained(tmp_path / "src")
    trained_tokenizer().save_pretrained(tmp_path / "src")
    share_heads(plan(tmp_path / "src", 2, method="aligned"), tmp_path / "src", 2, keys=True)
    convert(tmp_path / "src", tmp_path / "dst", 2, calibrate=text, **SMALL)
    feed = {"input_ids": torch.arange(2, 30)[None]}
    before, after = (told(transformers.AutoModelForCausalLM, tmp_path / d, feed) for d in ("src", "dst"))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [{"decoder": 1, "cross": 2}, {"cross": 1}, {"encoder": 2}])
def test_some_of_an_encoder_decoders_attentions(heads: dict[str, int], text: str, tmp_path: Path) -> None:
    """The others' tensors stay as they are, to the byte."""
    made("t5", tmp_path / "src")
    record = convert(tmp_path / "src", tmp_path / "dst", heads, calibrate=text, **SMALL)
    assert record["details"]["calibration"]["pairs"] == "own answers"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dst")
    assert {name: getattr(config, f"{name}_kv_heads") for name in heads} == heads
    old = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "src").state_dict()
    new = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dst").state_dict()
    changed = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    parts = {"encoder": "encoder.block", "decoder": "decoder.block.*.SelfAttention", "cross": "EncDecAttention"}
    found = {name for name, part in parts.items() if any(fnmatch(n, f"*{part}*") for n in changed)}
    assert found == set(heads)
    assert all("Attention." in n for n in changed)


def test_what_reads_no_text_or_cannot_go_layer_by_layer_is_refused(text: str, tmp_path: Path) -> None:
    for name in ("bloom",):
        BY_NAME[name].make(None).save_pretrained(tmp_path / name)
        with pytest.raises(ConversionError, match="use --method aligned"):
            convert(tmp_path / name, tmp_path / "dst", 2, calibrate=text, method="auto")
        assert not (tmp_path / "dst").exists()
    made("roberta", tmp_path / "roberta")
    config = tmp_path / "roberta" / "config.json"  # its own code counts positions by the padding's id
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    with pytest.raises(ConversionError, match=r"cannot run on the calibration data .*; use --method aligned"):
        convert(tmp_path / "roberta", tmp_path / "dst", 2, calibrate=text, **SMALL)
