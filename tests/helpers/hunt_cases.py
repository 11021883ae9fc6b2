"""The kinds of cases of ``hunt.py``: which files are damaged, and which commands read them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from mutations import CONFIG_KEYS, dumped, mutate_bytes, mutate_json, mutate_safetensors, odd_jsonl, odd_text

SRC, DST, OTHER, WORK = "src", "dst", "other", ".dst.hf-attn"
#: lies beside SRC, and may be found nowhere else
SECRET = b"what nobody may copy"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass
class Case:
    """A folder, the randomness to damage it, and what shall then be run."""

    draw: random.Random
    seeds: Path
    folder: Path
    commands: list[Callable[[], list[str]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    may_change: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[Callable[[], list[str]]]:
        return iter(self.commands)

    def bring(self, seed: str, name: str = SRC) -> Path:
        """A sound checkpoint as ``name``, beside somebody's file."""
        if not (self.folder / OTHER).exists():
            (self.folder / OTHER).mkdir()
            (self.folder / OTHER / "mine.txt").write_bytes(SECRET)
        shutil.copytree(self.seeds / seed, self.folder / name)
        return self.folder / name

    def damage_json(self, path: Path, keys: tuple[str, ...] = ()) -> None:
        try:
            value = json.loads(path.read_text()) if path.exists() else {}
        except (ValueError, RecursionError):  # it was damaged before
            path.write_bytes(mutate_bytes(self.draw, path.read_bytes()))
        else:
            path.write_bytes(dumped(self.draw, mutate_json(self.draw, value, keys)))

    def command(self, *arguments: object, codes: tuple[int, ...] = (0, 2)) -> None:
        """``hf-attn ARGUMENTS``, with paths below this folder."""
        self.commands.append(lambda: self._run([str(a) for a in arguments], codes))

    def _run(self, arguments: list[str], codes: tuple[int, ...]) -> list[str]:
        from hf_attn_patch.cli import main

        done = CliRunner().invoke(main, arguments)
        self.said += [done.stderr, str(done.exception)]
        what = " ".join(arguments).replace(str(self.folder), "")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            import traceback

            return [f"{what}: {''.join(traceback.format_exception(done.exception, limit=-5))}"]
        if done.exit_code not in codes:
            return [f"{what}: exit code {done.exit_code}: {done.output[-500:]}"]
        if "Traceback" in done.output:
            return [f"{what}: {done.output[-800:]}"]
        if done.exit_code == 2:
            lines = done.stderr.strip().splitlines()
            if not lines or not lines[-1].startswith("Error: ") or done.stdout or len(lines[-1]) > 2000:
                return [f"{what}: no sentence but {done.output[-500:]!r}"]
        return []

    def call(self, function: Callable[[], object]) -> None:
        """A reader that has no command of its own."""
        self.commands.append(lambda: self._call(function))

    def _call(self, function: Callable[[], object]) -> list[str]:
        import traceback

        from hf_attn_patch import HFAttnError

        try:
            with redirect_stderr(StringIO()):
                function()
        except HFAttnError as error:
            self.said.append(str(error))
            return (
                [] if "\n" not in str(error) and len(str(error)) < 2000 else [f"no sentence but {str(error)[:500]!r}"]
            )
        except Exception:
            return [traceback.format_exc(limit=-5)]
        return []


@dataclass(frozen=True)
class Kind:
    """``weight``: its share of the cases."""

    prepare: Callable[[Case], None]
    weight: int


#: sources of configs: stock families, and those that become grouped ones
GROUPED = ("gpt2", "bert", "t5", "bart", "clip", "codegen", "gpt_neo", "whisper")
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip
STOCK = (
    "llama",
    "gemma3_text",
    "falcon",
    "gpt_bigcode",
    "phi3",
    "cohere2",
    "smollm3",
    "gpt_oss",
    "qwen2_moe",
    "stablelm",
)


def make_seeds(folder: Path) -> Path:
    """The sound checkpoints that cases begin with."""
    from tiny import save_tiny, tiny_llama
    from tiny_families import COMMON, tiny_model
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging
    from zoo_cases import BY_NAME

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in STOCK:
        tiny_model(name).save_pretrained(folder / name)
    for name in GROUPED:
        BY_NAME[name].make(None).save_pretrained(folder / name)
    AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("llava", text_config={"model_type": "llama", **COMMON}, vision_config=VISION)
    ).save_pretrained(folder / "llava")
    tiny_model("llama").save_pretrained(folder / "sharded", max_shard_size="20KB")
    save_tiny(folder / "spoken", tiny_llama(4, num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    shutil.copytree(folder / "llama", folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pickled" / "pytorch_model.bin")
    CliRunner().invoke(
        __import__("hf_attn_patch.cli", fromlist=["main"]).main,
        ["convert", str(folder / "llama"), str(folder / "converted"), "--kv-heads", "2", "--method", "mean", "-q"],
    )
    (folder / "text.txt").write_text(
        "import os\n\n\ndef main(argument):\n    return os.fspath(argument)  # Ünïcode\n" * 30
    )
    return folder


def configs(case: Case) -> None:
    names = sorted(p.name for p in case.seeds.iterdir() if p.is_dir())
    src = case.bring(case.draw.choice([n for n in names if n not in ("pickled", "converted")]))
    case.damage_json(src / "config.json", CONFIG_KEYS)
    if case.draw.random() < 0.2:
        case.command("inspect", src)
    elif case.draw.random() < 0.8:
        case.command("convert", src, "--kv-heads", 1, "--method", "mean", "--dry-run")
    else:
        case.command("convert", src, case.folder / DST, "--kv-heads", 1, "--method", "mean", "-q")


def headers(case: Case) -> None:
    src = case.bring("llama")
    path = src / "model.safetensors"
    path.write_bytes(mutate_safetensors(case.draw, path.read_bytes()))
    case.command("convert", src, case.folder / DST, "--kv-heads", 2, "--method", "mean", "-q")


def indices(case: Case) -> None:
    src = case.bring("sharded")
    path = src / "model.safetensors.index.json"
    if case.draw.random() < 0.3:
        index = json.loads(path.read_text())
        name = case.draw.choice(list(index["weight_map"]))
        elsewhere = (
            "../other/mine.txt",
            "../other",
            ".",
            "model.safetensors",
            "config.json",
            "model-00001-of-00009",
            "a/b",
        )
        index["weight_map"][name] = case.draw.choice(elsewhere)
        path.write_text(json.dumps(index))
    else:
        case.damage_json(path, ("weight_map", "metadata", "total_size"))
    if case.draw.random() < 0.2:
        shard = case.draw.choice(sorted(src.glob("*.safetensors")))
        case.draw.choice((shard.unlink, lambda: shard.write_bytes(b""), lambda: _link(shard, case)))()
    case.command("convert", src, case.folder / DST, "--kv-heads", 2, "--method", "mean", "-q")


def _link(path: Path, case: Case) -> None:
    path.unlink()
    path.symlink_to(case.draw.choice(("../other/mine.txt", "nowhere", path.name, "/dev/zero", "/dev/null")))


def journals(case: Case) -> None:
    from hf_attn_patch.conversion import plan
    from hf_attn_patch.conversion.execute import fingerprint

    src = case.bring("llama")
    made = plan(src, 2, method="mean", check_load=False)
    work = case.folder / WORK
    (work / "out").mkdir(parents=True)
    lines: list[Any] = [{"fingerprint": fingerprint(made)}]
    lines += [{"job": f"unit {n}", "note": dict.fromkeys(unit.writes, "0" * 64)} for n, unit in enumerate(made.units)]
    lines += [{"job": "copy model.safetensors", "note": None}, {"job": "details", "note": None}]
    raw = b"\n".join(dumped(case.draw, mutate_json(case.draw, x) if case.draw.random() < 0.3 else x) for x in lines)
    (work / "journal.jsonl").write_bytes(raw + b"\n" if case.draw.random() < 0.7 else mutate_bytes(case.draw, raw))
    if case.draw.random() < 0.5:
        shutil.copy(src / "model.safetensors", work / "out")
    if case.draw.random() < 0.2:
        case.draw.choice((
            lambda: (work / "lock").mkdir(), lambda: (work / "old").write_text(""), lambda: (work / "x").write_text(""),
            lambda: os.mkfifo(work / "lock"), lambda: (work / "old").mkdir(), lambda: (work / "lock").symlink_to(work),
        ))()  # fmt: skip
    case.may_change = {WORK}
    case.command("convert", src, case.folder / DST, "--kv-heads", 2, "--method", "mean", "--resume", "-q")


def records(case: Case) -> None:
    src, dst = case.bring("llama"), case.bring("converted", DST)
    (dst / "mine.txt").write_text("mine")
    for _ in range(case.draw.choice((1, 1, 2))):
        name = case.draw.choice(("conversion.json", "conversion.json", "config.json", "model.safetensors"))
        if name.endswith("json"):
            case.damage_json(
                dst / name, ("method", "kv_heads", "options", "seed", "files", "source", "format", "with_code")
            )
        else:
            (dst / name).write_bytes(mutate_bytes(case.draw, (dst / name).read_bytes(), 3))
    case.command("verify", src, dst, codes=(0, 1, 2))
    case.command("convert", src, dst, "--kv-heads", 2, "--method", "mean", "--overwrite", "-q")


def pickles(case: Case) -> None:
    src = case.bring("pickled")
    path = src / "pytorch_model.bin"
    path.write_bytes(mutate_bytes(case.draw, path.read_bytes(), 6, within=case.draw.choice((200, 6000, 10**6))))
    case.command("convert", src, case.folder / DST, "--kv-heads", 2, "--method", "mean", "--allow-pickle", "-q")


def tokenizers(case: Case) -> None:
    src = case.bring("spoken")
    for _ in range(case.draw.choice((1, 1, 2))):
        path = src / case.draw.choice(TOKENIZER_FILES)
        if case.draw.random() < 0.8:
            case.damage_json(path, ("tokenizer_class", "auto_map", "added_tokens", "model_max_length", "chat_template"))
        else:
            path.write_bytes(mutate_bytes(case.draw, path.read_bytes() if path.exists() else b"", 4))
    text = case.seeds / "text.txt"
    case.command("evaluate", src, "--text", text, "--context", 16, "--tokens", 40, "--no-speed")
    if case.draw.random() < 0.3:
        case.call(lambda: _training_reader(str(src), str(text)))
    if case.draw.random() < 0.2:
        more = ("--calibrate", text, "--no-refit", "--calibration-tokens", 64, "--calibration-length", 16)
        case.command("convert", src, case.folder / DST, "--kv-heads", 2, "-q", *more)


def loaded(case: Case) -> None:
    """Models that are loaded whole: what evaluation and training read."""
    src = case.bring("spoken")
    if case.draw.random() < 0.7:
        case.damage_json(src / "config.json", CONFIG_KEYS)
    else:
        path = src / "model.safetensors"
        path.write_bytes(mutate_safetensors(case.draw, path.read_bytes()))
    text = case.seeds / "text.txt"
    if case.draw.random() < 0.7:
        case.command("evaluate", src, "--text", text, "--context", 16, "--tokens", 40, "--no-speed")
    else:
        case.call(lambda: _training_model(str(src)))


def texts(case: Case) -> None:
    src = case.bring("spoken")
    whole = (case.seeds / "text.txt").read_bytes()
    kind = case.draw.choice((".txt", ".txt", ".jsonl", ".jsonl", ".json", ".parquet", "", ".jsonl.gz", ".csv"))
    path = case.folder / f"text{kind}"
    if "json" in kind and ".gz" not in kind:
        path.write_bytes(odd_jsonl(case.draw, [line for line in whole.decode().splitlines()[:40] if line]))
    else:
        path.write_bytes(odd_text(case.draw, whole))
    if case.draw.random() < 0.5:
        case.command("evaluate", src, "--text", path, "--context", 16, "--tokens", 40, "--no-speed")
    else:
        case.call(lambda: _training_reader(str(src), str(path)))


def _training_reader(model: str, text: str) -> None:
    """One step's data, as examples/uptrain.py reads it."""
    from hf_attn_patch.documents.tokenizers import load_tokenizer
    from hf_attn_patch.training import Position, parse_options
    from hf_attn_patch.training.data.training_data import TrainingData, framing_for

    given = {"model": model, "dataset": text, "tokens": 64, "sequence-length": 16, "batch-size": 2, "eval-tokens": 0}
    options = parse_options([f"--{name}={value}" for name, value in given.items()])
    tokenizer = load_tokenizer(model)
    data = TrainingData(options, tokenizer, framing_for("causal", options, tokenizer))
    next(iter(data.steps(Position(), 0, 1)))


def _training_model(model: str) -> None:
    """The student, as examples/uptrain.py loads it."""
    from hf_attn_patch.training import parse_options
    from hf_attn_patch.training.models import load_config, load_student, make_objective, objective_kind

    options = parse_options(
        [f"--model={model}", "--dataset=x", "--tokens=64", "--sequence-length=16", "--batch-size=2"]
    )
    config = load_config(model)
    kind = objective_kind(config)
    make_objective(load_student(options, config, kind), kind, options)


KINDS = {
    kind.prepare.__name__: kind
    for kind in (
        Kind(configs, 24), Kind(headers, 20), Kind(indices, 12), Kind(journals, 10), Kind(records, 8), Kind(pickles, 8),
        Kind(tokenizers, 8), Kind(loaded, 8), Kind(texts, 14),
    )
}  # fmt: skip
