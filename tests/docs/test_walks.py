"""The walks of docs/internals.md are gone: every function that a station names runs on the way, or is listed here."""

from __future__ import annotations

import ast
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from scripts import load_script
from stations import PAGES, ROOT, STATION
from tiny import python_sources, save_tiny, tiny_llama

from hf_attn_patch.attn import plan
from hf_attn_patch.cli.main import main

Called = dict[tuple[str, str], int]
#: what the pages name beside the way: kernels of a GPU, other methods, other kinds of model
BESIDE = {"register", "when_imported", "run_varlen", "grouped_decode", "method_options", "mean_of", "chunks"}
BESIDE.add("rows_loss")


@contextmanager
def watched() -> Iterator[Called]:
    """(file, function) -> its place in the order of first calls."""
    called: Called = {}

    def note(frame: FrameType, event: str, arg: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(ROOT)):
            called.setdefault((Path(name).relative_to(ROOT).as_posix(), frame.f_code.co_name), len(called))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def stations(walk: str) -> list[tuple[int, str, str]]:
    """(station, file, function) of the rows of a walk's table; classes and constants left out."""
    text = PAGES[0].read_text(encoding="utf-8").partition(f"\n## {walk}\n")[2].partition("\n## ")[0]
    found = []
    for number, row in re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE):
        for path, names in STATION.findall(row):
            functions = {
                node.name for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
                if isinstance(node, ast.FunctionDef)
            }  # fmt: skip
            last = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", names)]
            found += [(int(number), path, name) for name in last if name in functions and name not in BESIDE]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 KV heads, and a text."""
    folder = tmp_path_factory.mktemp("walks")
    save_tiny(folder / "source", tiny_llama(4))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in python_sources(3))
    (folder / "text.txt").write_text(text[:60_000], encoding="utf-8")
    return folder


def test_one_forward_in_the_order_of_its_stations() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="hf_attn_patch").eval()
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    plan.forget()
    with watched() as called, torch.no_grad():
        model(input_ids=torch.arange(12).view(2, 6), attention_mask=padding)
    way = stations("One forward")
    missing = [(path, name) for _, path, name in way if (path, name) not in called]
    assert not missing
    assert {number for number, *_ in way} >= {2, 3, 4, 5, 6, 7, 8, 9}
    first = [min(called[path, name] for n, path, name in way if n == number) for number in range(2, 9)]
    assert first == sorted(first)


def test_one_weight(folder: Path) -> None:
    calibrated = ["--calibrate", str(folder / "text.txt"), "--calibration-tokens", "2048"]
    source, result = str(folder / "source"), str(folder / "result")
    with watched() as called:
        for arguments in (["convert", source, result, "--kv-heads", "2", *calibrated], ["verify", source, result]):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 0
    assert not [(path, name) for _, path, name in stations("One weight") if (path, name) not in called]


def test_one_batch(folder: Path) -> None:
    shutil.copytree(folder / "source", folder / "student")
    uptrain = load_script("examples/uptrain.py")
    options = {
        "model": folder / "student", "teacher": folder / "source", "dataset": folder / "text.txt", "tokens": 512,
        "batch-size": 4, "sequence-length": 64, "held-out-every": 3, "output": folder / "trained",
    }  # fmt: skip
    try:
        with watched() as called:
            uptrain.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert not [(path, name) for _, path, name in stations("One batch") if (path, name) not in called]
