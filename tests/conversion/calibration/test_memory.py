"""The memory that a plan says it needs, against what a process of its own has allocated while it converts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import python_sources, trained_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen3MoeConfig

from hf_attn_patch.conversion import plan
from hf_attn_patch.conversion.calibration.memory import memory_needed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONVERT = """
import functools, json, sys, threading, time
from pathlib import Path
from hf_attn_patch.conversion import calibrated, convert

def anonymous():  # bytes that belong to no file: a mapped checkpoint's pages don't count
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not stop.wait(0.005):
        seen.append(anonymous())

# as much memory as a whole fit, in less time
calibrated.RefitRecipe = functools.partial(calibrated.RefitRecipe, epochs=0.3)
first, source, out, kv_heads, options = sys.argv[1:]
convert(first, out + "0", 1, method="calibrated", **json.loads(options) | {"calibration_tokens": 64})  # all is imported
stop, seen = threading.Event(), []
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
convert(source, out, int(kv_heads), method="calibrated", **json.loads(options))
stop.set()
watcher.join()
print(max(seen) - before)
"""


def allocated(first: Path, source: Path, kv_heads: int, options: dict[str, Any], out: Path) -> int:
    """Bytes on top of a process that has already converted ``first``."""
    command = [sys.executable, "-c", CONVERT, str(first), str(source), str(out), str(kv_heads), json.dumps(options)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # each thread has buffers of its own, and they wait for each other
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def made(config: Any, auto: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def llama(hidden: int, mlp: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=vocabulary,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "auto", "kv_heads", "tokens", "length"),
    [
        pytest.param(llama(512, 1408, 3, 60_000), AutoModelForCausalLM, 2, 2048, 64, id="most is weights"),
        pytest.param(
            llama(256, 1024, 2, 512), AutoModelForCausalLM, 2, 32768, 128,
            id="most is activations", marks=pytest.mark.slow,
        ),
        pytest.param(
            BertConfig(
                hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=512
            ),
            AutoModel, 2, 32768, 128, id="an encoder", marks=pytest.mark.slow,
        ),
        pytest.param(
            Qwen3MoeConfig(
                hidden_size=256, moe_intermediate_size=512, num_experts=32, num_experts_per_tok=2, num_hidden_layers=4,
                num_attention_heads=8, num_key_value_heads=8, head_dim=32, vocab_size=512,
            ),
            AutoModelForCausalLM, 2, 2048, 64, id="experts", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_calibration_takes_what_the_plan_says(
    config: Any, auto: Any, kv_heads: int, tokens: int, length: int, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(p.read_text() for p in python_sources()))
    options: dict[str, Any] = {
        "calibrate": str(text),
        "calibration_tokens": tokens,
        "calibration_length": length,
        "device": "cpu",
    }
    first = made(llama(64, 96, 2, 512), AutoModelForCausalLM, tmp_path / "first")
    source = made(config, auto, tmp_path / "source")
    said = memory_needed(plan(source, kv_heads, method="calibrated", **options))
    seen = allocated(first, source, kv_heads, options, tmp_path / "out")
    assert said / 2 <= seen <= said, f"seen {seen / 1e6:.0f} MB, said {said / 1e6:.0f} MB"
