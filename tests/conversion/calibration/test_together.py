"""Two processes that convert one model together give what one process gives, and end together."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT
from tiny import python_sources, save_tiny, tiny_llama
from zoo_cases import BY_NAME

from hf_attn_patch.cli import main
from hf_attn_patch.conversion.calibration import own_pairs
from hf_attn_patch.conversion.calibration.own_samples import own_samples
from hf_attn_patch.conversion.calibration.polish import batch_of_all
from hf_attn_patch.conversion.calibration.written_pairs import written
from hf_attn_patch.conversion.processes import Processes, Several, current, together

pytestmark = pytest.mark.slow

DRIVER = str(ROOT / "tests" / "helpers" / "convert_together.py")
#: 64 steps of four sequences of 80: two for each process
POLISH = ["--polish", "20480"]
SMALL = ["--calibration-tokens", "1500", "--calibration-length", "16"]  # 93 sequences
#: how a model is converted -> its arguments
WAYS: dict[str, list[str]] = {
    "fitted": ["--calibrate", "text.txt", *SMALL],
    "fitted, three sequences": ["--calibrate", "text.txt", "--calibration-tokens", "48", "--calibration-length", "16"],
    "merged": ["--calibrate", "text.txt", *SMALL, "--no-refit"],
    "polished": ["--calibrate", "text.txt", *SMALL, "--no-refit", *POLISH],
    "fitted and polished": ["--calibrate", "text.txt", *SMALL, "--refit", *POLISH],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source S, a text, and all ways converted by two processes that accelerate launched once: "two WAY"."""
    root = tmp_path_factory.mktemp("together")
    save_tiny(root / "S", tiny_llama(4, num_hidden_layers=3, initializer_range=0.1))
    (root / "text.txt").write_text("".join(p.read_text() for p in python_sources())[:20_000])
    cases = [convert(f"two {way}", *arguments) for way, arguments in WAYS.items()]
    made = BY_NAME["t5"].make(None, vocab_size=512, eos_token_id=2)
    save_tiny(root / "T", made)
    cases += [answered("two answers")]
    cases += [convert("two own", "--calibrate", "own", *SMALL, "--no-refit"), *DEPENDENT]
    (root / "cases.jsonl").write_text("".join(json.dumps({"command": command}) + "\n" for command in cases))
    launch = ["-m", "accelerate.commands.launch", "-q", "--multi_gpu", "--num_processes", "2", DRIVER, "cases.jsonl"]
    done = subprocess.run(
        [sys.executable, *launch], capture_output=True, text=True, env=ENVIRONMENT, cwd=root, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (root / "stdout").write_text(done.stdout)
    return root


def convert(dst: str, *arguments: str) -> list[str]:
    return ["convert", "S", dst, "--kv-heads", "2", *arguments]


def answered(dst: str) -> list[str]:
    """An encoder-decoder that says something of a text itself, is fitted and taught."""
    return ["convert", "T", dst, *convert("", *WAYS["fitted"])[3:], "--polish", "4096"]


#: other things that two processes are asked for at once
DEPENDENT = [
    convert("two mean", "--method", "mean"),
    convert("two dry", *WAYS["fitted"], "--dry-run"),
]


def alone(world: Path, *command: str) -> None:
    """The same in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        main(list(command), prog_name="hf-attn", standalone_mode=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def details(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "conversion.json").read_text())["details"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_of_one_process(world: Path, way: str) -> None:
    alone(world, *convert(f"one {way}", *WAYS[way]))
    one, two, source = (weights(world / name) for name in (f"one {way}", f"two {way}", "S"))
    assert one.keys() == two.keys()
    changed = [name for name in one if one[name].shape != source[name].shape]
    assert len(changed) == 6  # K and V of three layers
    for name, tensor in one.items():
        error = (two[name] - tensor).norm() / tensor.norm()
        assert error < 1e-3, name
    # what a fit or a polish moved is far more than that
    assert details(world / f"two {way}")["processes"] == 2
    first, second = details(world / f"one {way}"), details(world / f"two {way}")
    assert second["calibration"] == first["calibration"]
    for name in ("loss_before", "loss_after", "kl"):
        assert second["held_out"][name] == pytest.approx(first["held_out"][name], rel=1e-3, abs=1e-6)
    assert first["layers" if "fitted" in way and "three" not in way else "held_out"]
    if "polished" in way:
        assert first["polish"]["kl_after"] < 0.99 * first["polish"]["kl_before"]
    for layer, errors in first.get("layers", {}).items():
        assert second["layers"][layer] == pytest.approx(errors, rel=1e-3)


def test_what_a_fit_does_is_far_more_than_rounding(world: Path) -> None:
    """Else the comparison above would say nothing of it."""
    for one, other in (("merged", "fitted"), ("merged", "polished"), ("fitted", "fitted and polished")):
        a, b = weights(world / f"two {one}"), weights(world / f"two {other}")
        name = "model.layers.1.self_attn.k_proj.weight"
        assert (a[name] - b[name]).norm() / a[name].norm() > 0.02


def test_a_model_s_own_text_is_written_by_both(world: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(world / "S").eval()
    second = Processes()
    second.number = 1
    written = [
        own_samples(model, rows * 16, 16, seed=who.seed(0), row_bytes=1)
        for who, rows in ((Processes(), 47), (second, 46))
    ]
    assert not torch.equal(written[0][:46], written[1])
    ids = torch.cat(written)[torch.randperm(93, generator=torch.Generator().manual_seed(0))]
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert details(world / "two own")["calibration"]["ids_sha256"] == digest


def test_an_encoder_decoder_answers_in_both(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whose answers to the second half of what is read are drawn as the second process draws them."""
    second = Processes()
    second.number = 1

    def drawn(model: Any, memory: torch.Tensor, prefix: torch.Tensor, length: int, *, end: int, seed: int) -> Any:
        half = -(-len(memory) // 2)
        parts = ((slice(0, half), Processes()), (slice(half, None), second))
        given = [(memory[rows], prefix[rows], who.seed(seed)) for rows, who in parts]
        return [row for m, p, s in given for row in written(model, m, p, length, end=end, seed=s)]

    monkeypatch.setattr(own_pairs, "written", drawn)
    alone(world, *answered("one answers"))
    first, second_told = details(world / "one answers"), details(world / "two answers")
    assert second_told["calibration"] == first["calibration"] and first["calibration"]["pairs"] == "own answers"
    assert second_told["polish"]["kl_after"] == pytest.approx(first["polish"]["kl_after"], rel=0.01)
    one, two = weights(world / "one answers"), weights(world / "two answers")
    assert max(float((two[name] - one[name]).norm() / one[name].norm()) for name in one) < 1e-3


def test_one_of_them_speaks_and_writes(world: Path) -> None:
    told = (world / "stdout").read_text()
    assert [told.count(f"two {way}: ") for way in WAYS] == [1] * len(WAYS)
    assert told.count("k_proj") == 0 and told.count("layers") >= 1  # one dry run
    alone(world, *convert("one mean", "--method", "mean"))
    for name, tensor in weights(world / "one mean").items():
        assert torch.equal(tensor, weights(world / "two mean")[name])
    assert not [path for path in world.iterdir() if path.name.startswith(".")]


def pair(folder: Path, case: dict[str, Any]) -> list[subprocess.Popen[str]]:
    """Two processes without a launcher that would end one when the other ends."""
    folder.joinpath("case.jsonl").write_text(json.dumps(case) + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, DRIVER, "case.jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=folder, start_new_session=True,
            env={
                **ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip


LOST = "process 0 of 2: another process of this conversion is gone, or did not answer"


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("error", "process 1: layer 1 is not to my taste"),
        ("fault", "process 1: KeyError: 'nobody expected this'"),
        ("killed", LOST),
        ("stopped", LOST),
    ],
)
def test_they_end_together(world: Path, trouble: str, sentence: str) -> None:
    case = {"command": convert("troubled", *WAYS["fitted"], "-q"), "trouble": trouble, "timeout": 8}
    both = pair(world, case)
    try:
        begun = time.monotonic()
        out, err = both[0].communicate(timeout=100)
        assert both[0].returncode == 2, err
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and errors[0].startswith(f"Error: {sentence}"), err
        assert out == "" and time.monotonic() - begun < 60
        if trouble != "stopped":
            more = both[1].communicate(timeout=30)[1]
            assert both[1].returncode == {"error": 2, "fault": 1, "killed": -signal.SIGKILL}[trouble]
            assert "Error: " not in more.replace("KeyError: ", "")
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert not [path for path in world.iterdir() if "troubled" in path.name]


def test_an_error_of_all_is_told_once(world: Path) -> None:
    command = convert("nowhere", "--calibrate", "missing.txt", "-q")
    launch = ["-m", "accelerate.commands.launch", "-q", "--multi_gpu", "--num_processes", "2", "-m", "hf_attn_patch"]
    done = subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=world, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("Error: --calibrate: there is no file or folder missing.txt\n") == 1, done.stderr
    assert not (world / "nowhere").exists() and not (world / ".nowhere.hf-attn").exists()


def test_a_killed_run_goes_on(world: Path) -> None:
    """Both are killed; two start again, and what was copied already is not copied again."""
    command = convert("resumed", *WAYS["fitted"], "-q")
    both = pair(world, {"command": command, "trouble": "stopped"})
    journal = world / ".resumed.hf-attn" / "journal.jsonl"
    end = time.monotonic() + 60
    while not (journal.exists() and "copy " in journal.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    for process in both:
        process.kill()
        process.communicate()
    assert "copy " in journal.read_text() and "unit " not in journal.read_text()
    assert not (world / "resumed").exists()
    again = pair(world, {"command": [*command, "--resume"]})
    assert [process.wait(timeout=100) for process in again] == [0, 0], [p.communicate() for p in again]
    for name, tensor in weights(world / "two fitted").items():
        assert torch.equal(weights(world / "resumed")[name], tensor)


def test_a_process_alone_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    with together() as processes:
        assert processes is current() and processes.main and processes.share(7) == slice(0, 7)
    from hf_attn_patch.conversion import ConversionError

    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = pytest.raises(ConversionError, match="--device cuda:1: of 2 processes each takes its own GPU")
    with alone, together("cuda:1"):
        pass
    with pytest.raises(ConversionError, match="3 sequences cannot be shared out to 4 processes"):
        batch_of_all(3, 3, 4)
    assert Several.__mro__[1] is Processes
