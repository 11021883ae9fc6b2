"""Two GPUs that calibrate one model together: what one GPU gives, as far as bf16 goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT
from tiny import python_sources, save_tiny, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
DRIVER = str(ROOT / "tests" / "helpers" / "convert_together.py")
#: how a model is converted -> its arguments
WAYS = {
    "fitted": ["--refit", "--polish", "0"],
    "polished": ["--no-refit", "--polish", "524288"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source S, and each way by one GPU ("1 WAY") and by two ("2 WAY")."""
    root = tmp_path_factory.mktemp("together")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    save_tiny(root / "S", tiny_llama(4, num_hidden_layers=3, initializer_range=0.1, **sizes))
    (root / "text.txt").write_text("".join(p.read_text() for p in python_sources()))
    running = {}
    for count in (1, 2):
        cases = [
            ["convert", "S", f"{count} {way}", "--kv-heads", "2", "--calibrate", "text.txt", "-q",
             "--calibration-tokens", "65536", "--calibration-length", "128", *arguments]
            for way, arguments in WAYS.items()
        ]  # fmt: skip
        (root / f"{count}.jsonl").write_text("".join(json.dumps({"command": command}) + "\n" for command in cases))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", DRIVER, f"{count}.jsonl"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        running[count] = subprocess.Popen(
            [sys.executable, *launch], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root,
            env=environment,
        )  # fmt: skip
    for process in running.values():
        told = process.communicate(timeout=240)[0]
        assert process.returncode == 0, told
    return root


def details(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "conversion.json").read_text())["details"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_give_what_one_gives(world: Path, way: str) -> None:
    one, two = (details(world / f"{count} {way}") for count in (1, 2))
    assert two["processes"] == 2 and "processes" not in one
    assert two["calibration"] == one["calibration"]
    first, second, source = (load_file(world / name / "model.safetensors") for name in (f"1 {way}", f"2 {way}", "S"))
    name = "model.layers.1.self_attn.q_proj.weight"  # learned, not merged
    moved = (first[name] - source[name]).norm()
    assert moved > 0.02 * source[name].norm()
    print(f"{way}: {(second[name] - first[name]).norm() / moved:.3f} of what was learned", one, two)
    assert (second[name] - first[name]).norm() < 0.3 * moved
    assert second["model.layers.1.mlp.up_proj.weight"].equal(source["model.layers.1.mlp.up_proj.weight"])
    for key in ("loss_before", "loss_after", "kl"):
        assert two["held_out"][key] == pytest.approx(one["held_out"][key], rel=0.05)
    assert "polish" not in one or one["polish"]["kl_after"] < one["polish"]["kl_before"]
    for layer, errors in one.get("layers", {}).items():
        assert two["layers"][layer]["refitted"] == pytest.approx(errors["refitted"], rel=0.05)
