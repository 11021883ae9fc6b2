"""``evaluate``: every token once, nothing scored that is not in the checkpoint, no code but ours."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.reports.causal_models import load_causal
from hf_attn_patch.conversion.reports.evaluation import evaluate, score, windows

CPU = torch.device("cpu")
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(python_sources()[0].read_text()[:1500])
    return tmp_path / "text.txt"


@given(count=st.integers(2, 80), context=st.integers(2, 90), stride=st.integers(1, 200))
def test_every_token_is_scored_once_with_something_before_it(count: int, context: int, stride: int) -> None:
    found = list(windows(count, context, stride))
    assert [t for _, end, first in found for t in range(first, end)] == list(range(1, count))
    for begin, end, first in found:
        assert 0 <= begin < first < end <= begin + context


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (0, 1), (4, 0)])
def test_windows_that_cannot_score_are_refused(context: int, stride: int) -> None:
    with pytest.raises(ValueError, match="windows of"):
        next(windows(10, context, stride))


@pytest.mark.parametrize("stride", [1, 5, 7, 8, 9, 1000])
def test_the_loss_is_that_of_one_token_after_another(stride: int) -> None:
    """Each token's loss from a forward of its own, over the tokens that its window lets it see."""
    model = tiny_llama(4).eval()
    ids = torch.randint(0, 512, (30,), generator=torch.Generator().manual_seed(0))
    total, begin, end = 0.0, 0, 8
    for t in range(1, 30):
        if t >= end:  # the next window, which ends at most `stride` later and holds a token before t
            end = min(end + min(stride, 7), 30)
            begin = end - 8
        with torch.no_grad():
            logits = model(ids[None, begin:t]).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[t]])
    loss, _, _, count = score(model, ids, 8, stride)
    assert count == 29 and loss == pytest.approx(total / 29, rel=1e-5)


def test_a_context_that_the_model_cannot_read_is_cut_with_its_stride(tmp_path: Path, text: Path) -> None:
    src = save_tiny(tmp_path / "src", tiny_llama(4, max_position_embeddings=48))
    (found,) = evaluate([src], text, context=4096, stride=4096, tokens=200, speed=False)
    (wanted,) = evaluate([src], text, context=48, stride=47, tokens=200, speed=False)
    assert (found.loss, found.scored, found.context) == (wanted.loss, 199, 48)


def test_what_is_not_in_the_checkpoint_is_not_scored(tmp_path: Path, text: Path) -> None:
    model = tiny_llama(4)
    save_tiny(tmp_path / "whole", model)
    model.model.save_pretrained(tmp_path / "headless")
    trained_tokenizer().save_pretrained(tmp_path / "headless")
    assert AutoModel.from_pretrained(tmp_path / "headless").config.vocab_size
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        evaluate([str(tmp_path / "headless")], text, speed=False)


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertLMHeadModel])
def test_encoders_have_no_perplexity(model_class: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_class(BertConfig(**SIZES, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="sees the words after"):
        load_causal(str(tmp_path), CPU, "auto")
    BertLMHeadModel(BertConfig(**SIZES, intermediate_size=64, is_decoder=True)).save_pretrained(tmp_path / "decoder")
    assert load_causal(str(tmp_path / "decoder"), CPU, "auto").config.is_decoder


OUTSIDE = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=512)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES)),
}


@pytest.mark.parametrize("family", OUTSIDE)
def test_families_outside_the_interface_run_with_eager_and_say_so(family: str, tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    src = save_tiny(tmp_path / "src", OUTSIDE[family]())
    done = CliRunner().invoke(main, ["evaluate", src, "--text", str(text), "--tokens", "60", "--no-speed"])
    assert done.exit_code == 0, done.output
    assert "ran with eager attention" in done.output
    model, ids = OUTSIDE[family]().eval(), torch.tensor([trained_tokenizer()(text.read_text())["input_ids"][:60]])
    model = type(model).from_pretrained(src, attn_implementation="eager").eval()
    with torch.no_grad():
        want = float(model(ids, labels=ids).loss)
    done = CliRunner().invoke(main, ["evaluate", src, "--text", str(text), "--tokens", "60", "--no-speed", "--json"])
    assert json.loads(done.stdout)[0]["loss"] == pytest.approx(want, rel=1e-4)


def test_pickled_sources_are_evaluated(tmp_path: Path, text: Path) -> None:
    src = Path(save_tiny(tmp_path / "src", tiny_llama(4)))
    wanted = evaluate([str(src)], text, tokens=50, speed=False)
    torch.save(tiny_llama(4).state_dict(), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    found = evaluate([str(src)], text, source=str(src), tokens=50, speed=False)
    assert found[0].loss == wanted[0].loss and found[0].kv_bytes_per_token == wanted[0].kv_bytes_per_token


def test_kv_bytes_are_those_that_are_kept(tmp_path: Path, text: Path) -> None:
    """A sliding window keeps window - 1 tokens of the past, in fp32, K and V, 2 layers of 2 heads of 8."""
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=17)
    src = save_tiny(tmp_path / "src", MistralForCausalLM(config))
    (found,) = evaluate([src], text, context=64, tokens=100, speed=False)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4 * 16 // 64


def test_a_checkpoints_own_code_is_neither_run_nor_asked_for(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = Path(save_tiny(tmp_path / "src", tiny_llama(4)))
    config = json.loads((src / "config.json").read_text())
    config["model_type"] = "of_a_stranger"
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Own")
    (src / "config.json").write_text(json.dumps(config))
    (src / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ConversionError):
        evaluate([str(src)], text, speed=False)
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read().count("y") == 20


def test_no_auto_class_of_ours_is_left_to_ask(request: pytest.FixtureRequest) -> None:
    """Without ``trust_remote_code`` transformers asks on stdin, where ``y`` is enough."""
    root = request.config.rootpath
    calls = []
    for folder in ("hf_attn_patch", "conversion", "modeling", "examples", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = ast.unparse(node.func.value).rsplit(".", 1)[-1]
                if node.func.attr == "from_pretrained" and (owner.startswith("Auto") or owner in ("auto", "kind")):
                    calls.append((path.name, node.lineno, {k.arg for k in node.keywords}))
    assert len(calls) > 8
    assert [(name, line) for name, line, given in calls if "trust_remote_code" not in given] == []
