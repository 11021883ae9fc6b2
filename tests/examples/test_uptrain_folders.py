"""The folder that examples/uptrain.py writes: never another run's, never two runs', never half of a checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, load_script
from tiny import python_sources, save_tiny, tiny_llama

from hf_attn_patch.training import TrainingError
from hf_attn_patch.training.loop.checkpoints import STATE, list_checkpoints, remove_leftovers, written_aside


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    save_tiny(root / "S", tiny_llama(2))
    (root / "text").mkdir()
    for path in python_sources()[:8]:
        shutil.copy(path, root / "text")
    return root


@pytest.fixture
def uptrain():
    """The script's main, called in this process; what it said when it refused."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    main = load_script("examples/uptrain.py").main

    def call(arguments: list[str]) -> str:
        try:
            main(arguments)
        except SystemExit as stopped:
            return str(stopped.code)
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        return ""

    return call


def arguments(world: Path, output: Path, **changes: object) -> list[str]:
    options = {
        "model": world / "S", "dataset": world / "text", "output": output, "tokens": 32 * 2 * 4, "sequence_length": 32,
        "batch_size": 2, "eval_tokens": 0, "checkpoint_every": 1, "lr": 1e-3, **changes,
    }  # fmt: skip
    return [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def test_another_runs_results_are_replaced_only_when_asked(world, uptrain, tmp_path):
    """A shorter run into the folder of a longer one had removed its own checkpoints and kept the other's."""
    assert uptrain(arguments(world, tmp_path / "o", tokens=32 * 2 * 6)) == ""
    message = uptrain(arguments(world, tmp_path / "o"))
    assert "holds another run (checkpoints, config.json)" in message
    assert "--resume true to go on with it, or --overwrite true" in message
    assert list_checkpoints(tmp_path / "o" / "checkpoints")[-1].name == "step-00000006"
    assert uptrain(arguments(world, tmp_path / "o", overwrite="true")) == ""
    assert [p.name for p in list_checkpoints(tmp_path / "o" / "checkpoints")] == ["step-00000004"]
    assert uptrain(arguments(world, tmp_path / "o", resume="true")) == ""
    assert "choose one" in uptrain(arguments(world, tmp_path / "o", resume="true", overwrite="true"))


def test_a_finished_run_without_checkpoints_is_not_done_again_by_resume(world, uptrain, tmp_path):
    assert uptrain(arguments(world, tmp_path / "o", checkpoint_every=0)) == ""
    assert "holds another run (config.json)" in uptrain(
        arguments(world, tmp_path / "o", checkpoint_every=0, resume="true")
    )
    (tmp_path / "o" / "config.json").unlink()  # killed before it was finished
    assert uptrain(arguments(world, tmp_path / "o", checkpoint_every=0, resume="true")) == ""


@pytest.mark.parametrize("source", ["model", "teacher", "dataset", "eval_dataset"])
def test_what_is_read_is_not_written_over(world, uptrain, source):
    before = sorted(p.name for p in (world / "S").iterdir())
    message = uptrain(arguments(world, world / "S", **{source: world / "S", "overwrite": "true"}))
    assert "which is read; give another folder" in message
    message = uptrain(arguments(world, world / "S", **{source: world / "S" / "best", "overwrite": "true"}))
    assert "which is read; give another folder" in message
    assert sorted(p.name for p in (world / "S").iterdir()) == before


def test_two_runs_at_once_are_refused(world, uptrain, tmp_path):
    (tmp_path / "o").mkdir()
    handle = os.open(tmp_path / "o", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another run is writing" in uptrain(arguments(world, tmp_path / "o"))
    finally:
        os.close(handle)
    assert uptrain(arguments(world, tmp_path / "o")) == ""


def test_a_folder_that_cannot_be_made_is_named(world, uptrain, tmp_path):
    (tmp_path / "file").write_text("")
    message = uptrain(arguments(world, tmp_path / "file" / "o"))
    assert f"--output {tmp_path / 'file' / 'o'} can't be written: Not a directory" in message


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(world, tmp_path):
    """No file may be larger than the model; its optimiser is, which comes after it."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (700_000,) * 2); sys.argv.pop(0)"
    limited += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(ROOT / "examples" / "uptrain.py"), *arguments(world, tmp_path / "o")],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert f"uptrain: --output {tmp_path / 'o'} can't be written" in done.stderr
    assert list((tmp_path / "o" / "checkpoints").iterdir()) == []


def test_what_a_kill_left_of_checkpoints_goes(tmp_path):
    for name, whole in {"step-00000002": True, "step-00000004": True, ".step-00000006.incomplete": True}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * 9)
        if whole:
            (tmp_path / name / STATE).write_text("{}")
    (tmp_path / "step-00000001").mkdir()  # its removal was interrupted
    (tmp_path / "step-00000001" / "optimizer.bin").write_bytes(b"0")
    remove_leftovers(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    remove_leftovers(tmp_path / "nowhere", keep=1)


@pytest.mark.parametrize("name", [STATE, "model.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_is_named(world, uptrain, tmp_path, name):
    assert uptrain(arguments(world, tmp_path / "o", keep=2)) == ""
    last = tmp_path / "o" / "checkpoints" / "step-00000004"
    (last / name).write_bytes((last / name).read_bytes()[:-200])
    message = uptrain(arguments(world, tmp_path / "o", keep=2, resume="true"))
    assert message.startswith(f"uptrain: {last} can't be loaded (")
    assert message.endswith("without that folder, --resume goes on from step-00000003")
    shutil.rmtree(last)
    assert uptrain(arguments(world, tmp_path / "o", keep=2, resume="true")) == ""


def test_what_could_not_be_written_whole_takes_no_room(tmp_path):
    def fail() -> None:
        with written_aside(tmp_path / "a") as aside:
            (aside / "x").write_text("1")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_is_not_applied(world, uptrain, tmp_path, monkeypatch):
    """The loss is finite there: the weights had become NaN, and a checkpoint of them had replaced the good one."""
    from hf_attn_patch.training import run as module

    seen = []

    def spoilt(student, *args, **kwargs):
        def hook(gradient):
            seen.append(gradient)
            return gradient * float("nan") if len(seen) > 4 else gradient  # two micro-batches a step

        student.model.norm.weight.register_hook(hook)

    monkeypatch.setattr(module, "round_between_layers", spoilt)
    message = uptrain(arguments(world, tmp_path / "o"))
    assert "the gradient's norm is nan at step 3 (documents " in message
    kept = list_checkpoints(tmp_path / "o" / "checkpoints")
    assert [p.name for p in kept] == ["step-00000002"]
    from safetensors.torch import load_file

    assert all(torch.isfinite(t).all() for t in load_file(kept[0] / "model.safetensors").values())


def test_evaluations_at_both_ends_alone(world, uptrain, tmp_path):
    """--eval-every 0 had left out the last one, and the card had called the first one "after"."""
    changes = {"eval_every": 0, "eval_tokens": 64, "held_out_every": 4, "lr": 1e-2}
    assert uptrain(arguments(world, tmp_path / "o", **changes)) == ""
    log = [json.loads(line) for line in (tmp_path / "o" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "eval/loss" in line] == [0, 4]
    assert not any("train/mfu" in line for line in log), "nobody knows this machine's peak"
    card = (tmp_path / "o" / "README.md").read_text()
    after = next(line["eval/loss"] for line in reversed(log) if "eval/loss" in line)
    assert f"| after | 256 | {after:.4f} |" in card
    assert "fitted layer by layer" not in card


def test_the_card_counts_the_first_phase(world, uptrain, tmp_path):
    assert uptrain(arguments(world, tmp_path / "o", teacher=world / "S", layerwise_tokens=100)) == ""
    card = (tmp_path / "o" / "README.md").read_text()
    assert "uptrained on 384 tokens" in card
    assert "| before that | attention fitted layer by layer on the first 128 tokens |" in card


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("nope", "Target modules {'nope'} not found"),
        ("input_layernorm", "is not supported"),
        ("embed_tokens", "model.embed_tokens is not one of the matrices within the layers"),
        ("lm_head", "lm_head is not one of the matrices within the layers"),
    ],
)
def test_adapters_that_could_not_be_merged_are_refused(world, uptrain, tmp_path, targets, said):
    message = uptrain(arguments(world, tmp_path / "o", mode="lora", lora_targets=targets))
    assert message.startswith(f"uptrain: --lora-targets {targets}: ")
    assert said in message
    assert "\n" not in message


def test_ctrl_c_while_loading_is_no_traceback(world, uptrain, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_attn_patch.training.run.load_tokenizer", interrupted)
    assert uptrain(arguments(world, tmp_path / "o")) == "130"


def test_an_error_of_another_kind_is_not_taken_for_the_disks(tmp_path):
    from hf_attn_patch.training import claimed_output, parse_options

    options = parse_options(["--model", "m", "--dataset", "d", "--tokens", "1M", "--output", str(tmp_path / "o")])
    with pytest.raises(RuntimeError, match="shapes"), claimed_output(options):
        raise RuntimeError("shapes differ")
    with pytest.raises(FileNotFoundError), claimed_output(options):  # something that is read, elsewhere
        (tmp_path / "nowhere").read_text()
    with pytest.raises(TrainingError, match="can't be written: No space left"), claimed_output(options):
        raise OSError(28, "No space left on device")
