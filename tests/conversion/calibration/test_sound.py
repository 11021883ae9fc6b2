"""Calibration on sound: what files and data sets give, what is left out of it, and what a tiny Whisper loses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import trained_tokenizer
from transformers import AutoModelForSpeechSeq2Seq, WhisperFeatureExtractor
from zoo_cases import BY_NAME

from hf_attn_patch.conversion import ConversionError, convert, verify
from hf_attn_patch.conversion.calibration.samples import ended
from hf_attn_patch.conversion.methods import registry
from hf_attn_patch.documents.recordings import Recording, recordings
from hf_attn_patch.errors import TrainingError

soundfile = pytest.importorskip("soundfile")

RATE = 3840  # a second has as many frames as the tiny model reads
WORDS = ["import numpy", "def main", "return value", "class Reader", "for name in names", "self.value = value"]


@pytest.fixture(autouse=True)
def _real_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFAULT", registry.AUTO)


def tone(frequency: float, seconds: float, rate: int) -> torch.Tensor:
    return (0.5 * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate)).float()


def noise(seed: int, seconds: float = 0.9) -> torch.Tensor:
    """Noise whose loudness changes, so that recordings differ."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.rand(9, generator=draw).repeat_interleave(round(seconds * RATE) // 9 + 1)[: round(seconds * RATE)]
    return 0.3 * steps * torch.randn(len(steps), generator=draw)


def write(folder: Path, seeds: range, texts: bool) -> Path:
    folder.mkdir()
    for seed in seeds:
        soundfile.write(folder / f"{seed:03d}.wav", noise(seed).numpy(), RATE)
        if texts:
            (folder / f"{seed:03d}.txt").write_text(f"{WORDS[seed % 6]} {WORDS[seed % 5]}\n")
    return folder


def whisper(folder: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    known = {"vocab_size": 512, "eos_token_id": 2, "decoder_start_token_id": 3, "pad_token_id": 2} | more
    model = BY_NAME["whisper"].make(None, **known)
    model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    WhisperFeatureExtractor(8, sampling_rate=RATE, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper(tmp_path_factory.mktemp("whisper") / "src")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "speech", range(48), texts=True)


def kl(source: Path, result: Path, rows: int = 24) -> float:
    """KL of the words of two checkpoints on features and ids that neither was calibrated on, by transformers alone."""
    extractor = WhisperFeatureExtractor.from_pretrained(source)
    heard = extractor([noise(900 + i).numpy() for i in range(rows)], sampling_rate=RATE, return_tensors="pt")
    ids = torch.randint(3, 512, (rows, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        p, q = (
            AutoModelForSpeechSeq2Seq.from_pretrained(f)(
                heard.input_features, decoder_input_ids=ids
            ).logits.log_softmax(-1)
            for f in (source, result)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_tone_is_the_same_tone_at_another_rate() -> None:
    """Of whole periods, so that its spectrum is one line: exact, up and down."""
    for rate, other in ((22050, 16000), (8000, 16000), (16000, 3840)):
        got = Recording(tone(200, 0.5, rate), rate, None, "tone").at(other)
        torch.testing.assert_close(got, tone(200, 0.5, other), atol=2e-5, rtol=0)
    high = Recording(tone(3000, 0.5, 16000), 16000, None, "high").at(4000)
    assert float(high.abs().max()) < 1e-3  # above half the new rate: not there, rather than folded back


def test_files_with_what_is_said_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "sound"
    (folder / "inner").mkdir(parents=True)
    left, right = tone(100, 0.25, 8000), tone(300, 0.25, 8000)
    soundfile.write(folder / "two.flac", torch.stack([left, right], 1).numpy(), 8000)
    soundfile.write(folder / "inner" / "one.wav", left.numpy(), 8000)
    (folder / "two.txt").write_text(" Said.\n")
    found = {Path(r.name).name: r for r in recordings(str(folder))}
    assert found["two.flac"].text == "Said." and found["one.wav"].text is None
    torch.testing.assert_close(found["two.flac"].wave, (left + right) / 2, atol=1e-4, rtol=0)
    orders = {tuple(r.name for r in recordings(str(folder), seed)) for seed in range(8)}
    assert len(orders) == 2
    (alone,) = recordings(str(folder / "inner" / "one.wav"))
    assert alone.rate == 8000


def test_data_sets_with_sound(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write(tmp_path / "files", range(3), texts=False)
    files = [str(f) for f in sorted(folder.glob("*.wav"))]
    table = datasets.Dataset.from_dict({"sound": files, "sentence": ["one", "two", ""]})
    table.cast_column("sound", datasets.Audio(decode=False)).save_to_disk(str(tmp_path / "set"))
    datasets.Dataset.from_dict({"sentence": ["one"]}).save_to_disk(str(tmp_path / "mute"))
    with pytest.raises(TrainingError, match=r"no column of sound .* sentence"):
        list(recordings(str(tmp_path / "mute")))
    found = list(recordings(str(tmp_path / "set")))
    assert [r.text for r in found] == ["one", "two", None]
    torch.testing.assert_close(found[1].wave, noise(1), atol=1e-4, rtol=0)


def test_ended_pads_and_labels() -> None:
    ids, kept, labels = ended([[3, 7, 8, 2], [3, 9, 9, 9, 9, 9, 9]], 5, 1, end=2)
    assert ids.tolist() == [[3, 7, 8, 2, 2], [3, 9, 9, 9, 9]]
    assert kept.tolist() == [[True, True, True, False, False], [True] * 5]
    assert labels.tolist() == [[7, 8, 2, -100, -100], [9] * 5]  # a row that is cut off has no end


def test_equal_heads_lose_nothing(src: Path, speech: Path, tmp_path: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(src)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "decoder" in name and ("k_proj" in name or "v_proj" in name):
                heads = p.view(2, 2, -1, *p.shape[1:])
                heads[:, 1] = heads[:, 0]
    shared = tmp_path / "src"
    model.save_pretrained(shared)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (shared / name).write_bytes((src / name).read_bytes())
    record = convert(shared, tmp_path / "dst", 2, calibrate=str(speech))
    assert kl(shared, tmp_path / "dst") < 1e-8
    found = record["details"]["held_out"]
    assert found["loss_after"] == pytest.approx(found["loss_before"], abs=1e-4)
    assert len(record["details"]["layers"]) == 4  # two layers' own attention and their cross-attention


def test_better_than_the_mean_on_sound_that_was_not_fitted_to(src: Path, speech: Path, tmp_path: Path) -> None:
    record = convert(src, tmp_path / "fit", 1, calibrate=str(speech))["details"]
    told = convert(src, tmp_path / "told", 1, calibrate=str(speech), polish=30_000)["details"]
    for method in ("mean", "aligned"):
        convert(src, tmp_path / method, 1, method=method)
    lost = {name: kl(src, tmp_path / name) for name in ("mean", "aligned", "fit", "told")}
    assert lost["fit"] < 0.8 * min(lost["mean"], lost["aligned"])
    assert all(f["refitted"] <= f["error"] for f in record["layers"].values())
    assert record["calibration"]["transcripts"] == 48 and record["calibration"]["samples"] == 48
    assert told["polish"]["kl_after"] < 0.9 * told["polish"]["kl_before"]
    assert told["polish"]["kl_before"] == pytest.approx(record["held_out"]["kl"], rel=1e-3)
    assert verify(src, tmp_path / "told").ok


def test_what_is_not_transcribed_the_model_writes_down(src: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "mute", range(16), texts=False)
    soundfile.write(folder / "long.wav", noise(99, 2.5).numpy(), RATE)  # three windows
    (folder / "long.txt").write_text("said somewhere in it")
    record = convert(src, tmp_path / "dst", 2, calibrate=str(folder), calibration_length=9)["details"]
    assert record["calibration"]["samples"] == 19 and record["calibration"]["transcripts"] == 0
    assert record["held_out"]["loss_after"] > 0


def test_what_a_user_can_get_wrong(src: Path, speech: Path, tmp_path: Path) -> None:
    def refused(match: str, calibrate: Any, **more: Any) -> None:
        with pytest.raises(ConversionError, match=match):
            convert(src, tmp_path / "dst", 2, calibrate=str(calibrate), **more)
        assert not (tmp_path / "dst").exists()

    (tmp_path / "empty").mkdir()
    refused("no text, JSONL or Parquet", tmp_path / "empty")
    refused("is no sound file", src / "config.json")
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing else")
    refused("cannot be read as sound", tmp_path / "broken.wav")
    refused("at least 1", speech, calibration_samples=0)
    refused("4 to 40 tokens", speech, calibration_length=200)
    BY_NAME["bart"].make(None).save_pretrained(tmp_path / "bart")
    with pytest.raises(ConversionError, match="counts recordings"):
        convert(tmp_path / "bart", tmp_path / "dst", 2, calibrate=str(speech), calibration_samples=4)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in src.iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConversionError, match=r"preprocessor_config\.json"):
        convert(bare, tmp_path / "dst", 2, calibrate=str(speech))
