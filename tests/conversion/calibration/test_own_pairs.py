"""Encoder-decoders without data: what their decoders say follows their own distribution, they are calibrated on it by
default, and what was lost is told after every conversion of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from tiny import trained_tokenizer
from zoo_cases import BY_NAME, output

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, plan
from hf_attn_patch.conversion.calibration import answers
from hf_attn_patch.conversion.calibration.answers import Answerer, Heard, losses
from hf_attn_patch.conversion.calibration.babble import babble
from hf_attn_patch.conversion.calibration.layers import load
from hf_attn_patch.conversion.calibration.own_pairs import heard, own_pairs, read_by_encoder
from hf_attn_patch.conversion.calibration.polish import PolishRecipe
from hf_attn_patch.conversion.calibration.samples import Samples, ended
from hf_attn_patch.conversion.calibration.written_pairs import written
from hf_attn_patch.conversion.methods import registry

SMALL: dict[str, Any] = {"calibration_tokens": 2048, "calibration_length": 16}


@pytest.fixture(autouse=True)
def _real_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFAULT", registry.AUTO)


def made(stock: str, folder: Path, **more: Any) -> Path:
    model = BY_NAME[stock].make(None, **({"eos_token_id": 2} | more))
    model.save_pretrained(folder)
    return folder


def distance(stock: str, one: Path, other: Path) -> float:
    """KL between two checkpoints' words, by transformers alone, on what neither made."""
    case = BY_NAME[stock]
    feed = case.inputs(batch=12, seed=7)
    with torch.no_grad():
        p, q = (
            output(getattr(transformers, case.auto).from_pretrained(f).eval(), feed).log_softmax(-1)
            for f in (one, other)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_words_follow_the_decoder(tmp_path: Path) -> None:
    """First words occur as often as a plain forward says: chi-square; nothing forbidden, nothing after the end."""
    made("bart", tmp_path / "src", vocab_size=12)
    model = BY_NAME["bart"].make(None, vocab_size=12, eos_token_id=2)
    N, read = 4096, torch.randint(3, 12, (1, 6), generator=torch.Generator().manual_seed(0))
    memory = heard(model, read).expand(N, -1, -1)
    start, never = torch.zeros(N, 1, dtype=torch.int64), torch.tensor([5, 1])
    said = written(model, memory, start, 4, end=2, seed=1, forbidden=never)
    with torch.no_grad():
        logits = model(input_ids=read, decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0]
    logits[[5, 1]] = -torch.inf
    want = N * logits.softmax(-1)
    got = torch.bincount(torch.tensor([row[1] for row in said]), minlength=12)
    there = want > 0
    assert not got[~there].any()
    assert ((got - want).square() / want)[there].sum() < 9 + 5 * 18**0.5
    assert all(2 not in row[1:-1] and len(row) <= 4 for row in said)
    assert any(row[-1] == 2 and len(row) < 4 for row in said)
    assert said == written(model, memory, start, 4, end=2, seed=1, forbidden=never)


@pytest.mark.parametrize("stock", ["t5", "bart", "marian"])
def test_pairs_are_what_the_decoder_says(stock: str, tmp_path: Path) -> None:
    made(stock, tmp_path / "src")
    ready = plan(tmp_path / "src", 2, check_load=False)
    assert ready.method.name == "calibrated"
    given, about, _ = read_by_encoder(ready, None, "own", tokens=240, length=10, longest=48)
    pairs = own_pairs(ready, load(ready), given, 10, about)
    read, ids = pairs.inputs
    assert read.shape == (24, 10) and (read[:, -1] == 2).all() and len(ids) == 24 and ids.shape[1] <= 10
    assert pairs.labels is not None and pairs.kept is not None
    words = pairs.labels >= 0
    assert (words == pairs.kept).all() and bool((ids[:, 1:][words[:, 1:]] == pairs.labels[:, :-1][words[:, 1:]]).all())


def test_rows_begin_where_documents_and_paragraphs_do(tmp_path: Path) -> None:
    """Of records each by itself, its beginning first; of a text each paragraph, short ones with the next; by shares."""
    src, tokenizer = made("t5", tmp_path / "src", vocab_size=512), trained_tokenizer()
    ready = plan(src, 2, check_load=False)
    words = [f"summarize: {'class' if i % 2 else 'import'} {i} " + "def main self " * 9 for i in range(40)]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*words, "short"]))
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    begun = {tuple(tokenizer(text)["input_ids"][:12]) for text in words}
    for name in ("records.jsonl", "text.txt"):
        read, about, _ = read_by_encoder(
            ready, tokenizer, str(tmp_path / name), tokens=100_000, length=12, longest=48
        )  # fmt: skip
        rows = list(map(tuple, read.tolist()))
        assert read.shape[1] == 12 and len(rows) == about["parts"][str(tmp_path / name)]
        assert begun <= set(rows) and len(begun) > 20
        few, _, _ = read_by_encoder(ready, tokenizer, str(tmp_path / name), tokens=60, length=12, longest=48)
        assert len(few) == 5 and set(map(tuple, few.tolist())) <= set(rows)
    both, about, _ = read_by_encoder(
        ready, tokenizer, f"own:1,{tmp_path / 'records.jsonl'}:3", tokens=480, length=None, longest=12
    )  # fmt: skip
    assert both.shape == (40, 12) and about["parts"]["own"] == 10
    assert sum(tuple(row) in begun for row in both.tolist()) >= 1


def test_an_encoder_is_read_again_where_its_output_is_not_kept(tmp_path: Path) -> None:
    """Losses of kept outputs, of outputs worked out when they are read, and of transformers' own forward."""
    src = made("t5", tmp_path / "src")
    ready = plan(src, 2, check_load=False)
    model, other = load(ready), BY_NAME["t5"].make(None, eos_token_id=2)
    with torch.no_grad():
        other.get_decoder().block[0].layer[0].SelfAttention.v.weight.mul_(-1.5)
    read, about, _ = read_by_encoder(ready, None, "own", tokens=190, length=10, longest=48)
    samples = own_pairs(ready, model, read, 10, about)
    assert samples.memory is not None and samples.labels is not None
    samples.labels[:, -2:] = -100  # nobody is to say the last words, which are then not read
    rows = torch.arange(len(samples))
    again = Heard(model, samples)
    found = [
        losses(Answerer(model, memory, samples), Answerer(other, memory, samples), samples, rows)
        for memory in (samples.memory, again)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and again(rows) is again(rows)
    with torch.no_grad():
        for key, one in (("loss_before", model), ("loss_after", other)):
            logits = one(
                encoder_outputs=(samples.memory,), decoder_input_ids=samples.inputs[1], use_cache=False
            ).logits  # fmt: skip
            want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples.labels.flatten())
            assert found[0][key] == pytest.approx(float(want), rel=1e-5)


def test_teaching_on_what_the_original_said_before_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of unequal length, gone through twice: the original reads each once, or without room each time."""
    draw = torch.Generator().manual_seed(0)
    rows = [[1, *torch.randint(3, 60, (n,), generator=draw).tolist(), 2] for n in (5, 2, 7, 3, 6, 4, 2, 5)]
    ids, kept, labels = ended(rows, 8, 1, 2)
    memory = torch.randn(8, 6, 32, generator=draw)
    done, calls = [], []
    for room in (answers.KEPT_BYTES, 0):
        monkeypatch.setattr(answers, "KEPT_BYTES", room)
        original: Any = BY_NAME["bart"].make(None, eos_token_id=2).eval().requires_grad_(False)
        converted: Any = BY_NAME["bart"].make(None, eos_token_id=2).eval().requires_grad_(False)
        trained = list(converted.get_decoder().layers[0].encoder_attn.parameters())
        for i, p in enumerate(trained):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        states = memory[..., : original.config.d_model]
        samples = Samples([torch.zeros(8, 6), ids], {}, [], kept, labels, states)
        pair = Answerer(original, states, samples), Answerer(converted, states, samples)
        read: list[int] = []
        original.get_decoder().register_forward_hook(lambda m, args, out, read=read: read.append(len(out[0])))
        answers.teach(*pair, trained, samples, torch.arange(8), PolishRecipe(2 * int((labels >= 0).sum())))
        done.append([p.clone() for p in trained])
        calls.append(sum(read))
    assert calls == [8, 1 + 2 * 8]  # the first shows how much room it takes
    for one, other in zip(*done, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stock", ["t5", "bart", "marian", "whisper"])
def test_without_data_less_is_lost_than_by_the_mean(stock: str, tmp_path: Path) -> None:
    src = made(stock, tmp_path / "src")
    if stock == "whisper":
        from transformers import WhisperFeatureExtractor

        WhisperFeatureExtractor(8, sampling_rate=3840, chunk_length=1).save_pretrained(src)
        record = convert(src, tmp_path / "own", 1)
    else:
        record = convert(src, tmp_path / "own", 1, **SMALL)
    convert(src, tmp_path / "mean", 1, method="mean")
    assert any("made itself" in note and "--calibrate" in note for note in record["details"]["notes"])
    assert record["details"]["held_out"]["kl"] > 0
    assert distance(stock, src, tmp_path / "own") < 0.8 * distance(stock, src, tmp_path / "mean")


def test_what_cannot_be_made_is_replaced_or_refused(tmp_path: Path) -> None:
    """A T5 whose config does not say how its decoder begins and ends; a Whisper without its feature extractor."""
    BY_NAME["t5"].make(None, decoder_start_token_id=None, eos_token_id=None).save_pretrained(tmp_path / "bare")
    record = convert(tmp_path / "bare", tmp_path / "made", 1)
    assert any("neither eos_token_id nor decoder_start_token_id" in note for note in record["details"]["notes"])
    src = made("whisper", tmp_path / "src")
    record = convert(src, tmp_path / "dst", 1)
    assert any("random inputs" in note and "feature extractor" in note for note in record["details"]["notes"])
    with pytest.raises(ConversionError, match="feature extractor"):
        convert(src, tmp_path / "asked", 1, calibrate="own")
    made("t5", tmp_path / "t5")
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(tmp_path / "t5", tmp_path / "asked", 1, calibrate="own,python")
    trained_tokenizer().save_pretrained(tmp_path / "t5")
    (tmp_path / "short.txt").write_text("import numpy")
    with pytest.raises(ConversionError, match=r"short\.txt: no 16 tokens of text in a row"):
        convert(tmp_path / "t5", tmp_path / "asked", 1, calibrate=str(tmp_path / "short.txt"), calibration_length=16)


@pytest.mark.parametrize("method", ["random", "auto"])
def test_the_command_tells_what_an_encoder_decoder_lost(method: str, tmp_path: Path) -> None:
    src = made("bart", tmp_path / "src")
    words = ["convert", str(src), str(tmp_path / "dst"), "--kv-heads", "1", "--method", method]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "before" in shown.output and "encoder's attention keeps its 4 KV heads" in shown.output


def test_babble_is_sound_of_a_voice() -> None:
    """As loud as it says, of one seed one sound; most of its power where speech has it, and silence between."""
    one, again = (babble(3.0, 16_000, torch.Generator().manual_seed(4)) for _ in range(2))
    other = babble(3.0, 16_000, torch.Generator().manual_seed(5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len(one) == 48_000 and float(one.abs().max()) == pytest.approx(0.5) and bool(one.isfinite().all())
    power = torch.fft.rfft(one.double()).abs().square()
    frequency = torch.linspace(0, 8000, len(power))
    assert power[(frequency > 80) & (frequency < 4000)].sum() > 0.6 * power.sum()
    loudness = one.unfold(0, 800, 800).square().mean(1).sqrt()
    assert float(loudness.min()) < 0.05 * float(loudness.max())
    assert len(babble(0.5, 3840, torch.Generator().manual_seed(1))) == 1920  # no harmonics above half the rate
