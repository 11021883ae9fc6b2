"""Calibration text from every kind of source, and the moments of what layers read on it, worked out another way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer
from tiny_families import tiny_config
from zoo_cases import BY_NAME

from hf_attn_patch.conversion import ConversionError, convert, evaluate
from hf_attn_patch.conversion.calibration import calibrated
from hf_attn_patch.conversion.calibration.moments import Moments
from hf_attn_patch.conversion.calibration.text import calibration_ids, typical_length

DOCUMENTS = [path.read_text()[:3000] for path in python_sources()[:6]]


def as_text(folder: Path) -> str:
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(document)
    return str(folder)


def as_jsonl(folder: Path) -> str:
    lines = [json.dumps({"text": document, "other": 1}) for document in DOCUMENTS]
    (folder / "a.jsonl").write_text("\n\n".join(lines))  # blank lines do no harm
    return str(folder / "a.jsonl")


def as_folder_of_jsonl(folder: Path) -> str:
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i}.jsonl").write_text(json.dumps({"text": document}) + "\n")
    return str(folder)


def as_parquet(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


def as_saved_data_set(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_dict({"text": x}) for x in (DOCUMENTS, ["not this one"]))
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(folder / "saved")
    return str(folder / "saved")


SOURCES = (as_text, as_jsonl, as_folder_of_jsonl, as_parquet, as_saved_data_set, as_saved_splits)


def rows(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, ids.tolist()))


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_documents_follow_one_another(make: Callable[[Path], str], tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    stream = [word for text in DOCUMENTS for word in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    want = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
    ids, about, notes = calibration_ids(
        tokenizer, make(tmp_path), tokens=100_000, length=32, longest=64, seed=0, whole=False
    )
    assert rows(ids) == sorted(want)
    assert (about["tokens"], about["length"], about["sequences"]) == (32 * len(want), 32, len(want))
    assert len(notes) == 1 and f"only {32 * len(want)} tokens" in notes[0]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id is looked up, streamed and shuffled with the seed; what was read is recorded."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, *_: Any, **options: Any) -> Any:
        asked.append((name, options["split"], options["streaming"]))
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = [
        calibration_ids(trained_tokenizer(), "some/data", tokens=500, length=10, longest=64, seed=seed, whole=False)
        for seed in (0, 0, 1)
    ]
    assert asked == [("some/data", "train", True)] * 3
    hashes = [about["ids_sha256"] for _, about, _ in found]
    assert hashes[0] == hashes[1] != hashes[2]
    assert all(about["source"] == "some/data" and ids.shape == (50, 10) for ids, about, _ in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "good"}\nno json\n', "line 2 is no JSON"),
        ("a.jsonl", b'{"content": "good"}\n', "none of its 1 records"),
        ("a.jsonl", b"", "no text"),
        ("a.jsonl", bytes(range(256)), "is no text"),
        ("a.parquet", b"PAR1 and nothing that a table has", "a.parquet"),
        ("sub/a.bin", b"binary", "holds no"),
    ],
)
def test_what_is_no_text_is_refused_in_a_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if path.suffix == ".bin" else path
    with pytest.raises(ConversionError, match=message):
        calibration_ids(trained_tokenizer(), str(source), tokens=1000, length=8, longest=64, seed=0, whole=False)


def test_a_table_without_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"content": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConversionError, match="no text in field 'text'; their text fields: content"):
        calibration_ids(
            trained_tokenizer(), str(tmp_path / "a.parquet"), tokens=1000, length=8, longest=64, seed=0, whole=False
        )


def test_an_encoder_reads_what_a_paragraph_has() -> None:
    tokenizer = trained_tokenizer()
    lines = DOCUMENTS[0].splitlines()[:41]
    counts = sorted(len(tokenizer(line)["input_ids"]) for line in lines if line.strip())
    want = max(8, counts[len(counts) // 2])
    lines = [line for line in lines if line.strip()]
    assert typical_length(tokenizer, ["\n".join(lines)]) == want  # no blank lines: a line is a paragraph
    assert typical_length(tokenizer, ["\n\n".join(lines)]) == want
    assert typical_length(tokenizer, lines) == want  # as documents


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_moments_on_the_way_are_the_whole_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed layer by layer, they are E[x x^T] of what the original reads in fp64 with all sequences at once."""
    torch.manual_seed(0)
    if name in BY_NAME:
        model = BY_NAME[name].make(None, vocab_size=512)
    else:
        model = transformers.LlamaForCausalLM(tiny_config(name, vocab_size=512))
    model.save_pretrained(tmp_path / "src")
    trained_tokenizer().save_pretrained(tmp_path / "src")
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    kept: list[list[Any]] = []
    ways: list[calibrated.Calibrated] = []

    class Noted(Moments):
        def results(self) -> Any:
            read: Any = self.read
            kept.append([found.sum / found.rows for _, found in read])
            return super().results()

    first = calibrated.Calibrated.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        ways.append(self)

    monkeypatch.setattr(calibrated, "Moments", Noted)
    monkeypatch.setattr(calibrated.Calibrated, "__init__", noting)
    convert(
        tmp_path / "src", tmp_path / "dst", 2, calibrate=str(tmp_path / "text.txt"), calibration_tokens=1500,
        calibration_length=16, refit=False,
    )  # fmt: skip
    texts = ways[0].samples.inputs
    model = type(model).from_pretrained(tmp_path / "src", dtype=torch.float64).eval()
    suffixes = {"llama": (".q_proj",), "bert": (".query",), "t5": (".q", ".k")}[name]
    read: dict[str, torch.Tensor] = {}
    for key, module in model.named_modules():
        if key.startswith("encoder."):  # T5's keeps its heads
            continue
        cross = "EncDecAttention" in key
        if key.endswith(suffixes[:1]) or (cross and key.endswith(suffixes[1:] or ".none")):
            module.register_forward_pre_hook(lambda _m, args, key=key: read.__setitem__(key, args[0]))
    with torch.no_grad():
        model(**dict(zip(("input_ids", "decoder_input_ids"), texts, strict=False)))
    want, there = [], ways[0].samples.kept  # what a decoder said ends where it ended it
    for key, x in read.items():
        x = x.flatten(0, 1) if there is None or key.endswith(".k") else x[there]
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        want.append(x.T @ x / len(x))
    got = [moment for layer in kept for moment in layer]
    assert len(got) == len(want) == {"llama": 2, "bert": 2, "t5": 6}[name]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.diagonal().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_text_shorter_than_a_batch(name: str, tmp_path: Path) -> None:
    """Two dozen tokens: heads are merged, nothing is fitted, the notes say so, and the result is sound."""
    model = BY_NAME[name].make(None, vocab_size=512)
    model.save_pretrained(tmp_path / "src")
    trained_tokenizer().save_pretrained(tmp_path / "src")
    (tmp_path / "text.txt").write_text("def add(first, second): return first + second")
    record = convert(tmp_path / "src", tmp_path / "dst", 1, calibrate=str(tmp_path / "text.txt"), calibration_length=8)
    notes = record["details"]["notes"]
    assert any("nothing was fitted" in note for note in notes)
    assert any("of rank" in note and "of the identity" in note for note in notes)
    assert any("more text gives a better model" in note for note in notes)
    again = getattr(transformers, BY_NAME[name].auto).from_pretrained(tmp_path / "dst")
    assert all(bool(p.isfinite().all()) for p in again.parameters())


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """A word whose embedding is broken is left out with all the sequences that have it; a broken layer is refused."""
    model = tiny_llama(4)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(DOCUMENTS))
    words = torch.tensor(trained_tokenizer()(text.read_text())["input_ids"])
    rare = int((words.bincount(minlength=512) - 3).abs().argmin())
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("inf")
    save_tiny(tmp_path / "word", model)
    known: dict[str, Any] = {
        "calibrate": str(text),
        "calibration_tokens": 3000,
        "calibration_length": 16,
        "allow_nonfinite": True,
    }
    record = convert(tmp_path / "word", tmp_path / "a", 2, **known)
    assert any("not finite" in note for note in record["details"]["notes"])
    fits = record["details"]["layers"].values()
    assert len(fits) == 2 and all(0 < fit["refitted"] <= fit["error"] < 10 for fit in fits)
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = 0
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    save_tiny(tmp_path / "layer", model)
    with pytest.raises(ConversionError, match=r"layer 0 .*not finite"):
        convert(tmp_path / "layer", tmp_path / "b", 2, **known)
    assert not (tmp_path / "b").exists()


def test_tokenizers_that_are_not_the_models(tmp_path: Path) -> None:
    """One that is missing (transformers then makes an empty one) and one with more words than the model has."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    src = Path(save_tiny(tmp_path / "few", tiny_llama(4, vocab_size=100)))
    with pytest.raises(ConversionError, match="ids that the model has no embedding for"):
        convert(src, tmp_path / "dst", 2, calibrate=str(tmp_path / "text.txt"))
    for file in src.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(src, tmp_path / "dst", 2, calibrate=str(tmp_path / "text.txt"))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("length", [1, 0, -5, 257, 100_000])
def test_sequences_that_the_model_cannot_read(length: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    src = save_tiny(tmp_path / "src", tiny_llama(4))
    said = "give at least 2" if length < 2 else "give at most the 256 positions of "
    with pytest.raises(ConversionError, match=f"--calibration-length {length}: {said}"):
        convert(src, tmp_path / "dst", 2, calibrate=str(tmp_path / "text.txt"), calibration_length=length)


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_devices_that_are_not_here(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    src = save_tiny(tmp_path / "src", tiny_llama(4))
    with pytest.raises(ConversionError, match=f"--device {name} cannot be used here"):
        convert(src, tmp_path / "dst", 2, calibrate=str(tmp_path / "text.txt"), device=name)
    with pytest.raises(ConversionError, match=f"--device {name} cannot be used here"):
        evaluate([src], tmp_path / "text.txt", device=name)


MEASURE = """
import pathlib, sys, threading, time
from hf_attn_patch.conversion import convert

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def run(source):
    convert(source, f"{source}-out", 2, method="auto", calibrate="text.txt", calibration_tokens=512,
            calibration_length=32, refit=source == "few")

run("few")  # imports, thread pools
before, peak, done = held(), 0, threading.Event()

def look():
    global peak
    while not done.wait(0.005):
        peak = max(peak, held())

watch = threading.Thread(target=look)
watch.start()
run("many")
done.set()
watch.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use")
def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """The weights stay in their file, which is mapped; what is allocated does not grow with the layers."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    for name, layers in (("few", 1), ("many", 16)):
        model = tiny_llama(4, hidden_size=256, intermediate_size=2048, num_hidden_layers=layers)
        save_tiny(tmp_path / name, model)
    del model
    size = (tmp_path / "many" / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    allocated = int(done.stdout.split()[-1])
    assert allocated < 0.4 * size, f"{allocated / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"


def test_json_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028, U+2029, U+0085 and form feeds are legal inside JSON strings, as they are."""
    from hf_attn_patch.conversion.calibration.text import documents

    texts = ["one\u2028two", "three\u0085four", "five\u2029six", "seven"]
    file = tmp_path / "a.jsonl"
    file.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode())
    assert list(documents(str(file), 0)) == texts
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert list(documents(str(file), 0)) == texts


def test_records_that_lose_their_field_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hf_attn_patch.conversion.calibration.text import documents

    file = tmp_path / "a.jsonl"
    records = [{"text": str(i)} if i % 3 else {"body": "x"} for i in range(90)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert list(documents(str(file), 0)) == [str(i) for i in range(90) if i % 3]
    assert "record 1 of" in caplog.text and "30 of 90 records" in caplog.text
    file.write_text("".join(json.dumps({"text": "x"} if i < 20 else {"body": 1}) + "\n" for i in range(200)))
    with pytest.raises(ConversionError, match=r"44 of the first 64 records .* is it the right field"):
        list(documents(str(file), 0))
