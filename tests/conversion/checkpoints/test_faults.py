"""Killed at any moment, resumed, run twice: the destination appears whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import python_sources, save_tiny, tiny_llama
from tiny_families import tiny_model

from hf_attn_patch.conversion import ConversionError, convert, plan, verify


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "src"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def whole(src: Path) -> dict[str, bytes]:
    convert(src, src.parent / "whole", kv_heads=2)
    return contents(src.parent / "whole")


#: what changes the disk, in the order of a run
CALLS = ("pwrite", "write", "ftruncate", "rename", "mkdir")


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a child that is killed (as by kill -9) before its ``number``-th change of the disk."""
    child = os.fork()
    if child == 0:
        try:
            left = number

            def dying(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return real(*args, **kwargs)

                return call

            for name in CALLS:
                setattr(os, name, dying(getattr(os, name)))
            work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def loads(folder: Path) -> bool:
    """Whether transformers would take a folder for a checkpoint."""
    return (folder / "config.json").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_killed_at_every_moment(src: Path, whole: dict[str, bytes], tmp_path: Path, resume: bool) -> None:
    made = plan(src, 2, check_load=False)
    dst, work = tmp_path / "dst", tmp_path / ".dst.hf-attn"
    number, kills = 0, 0
    while killed_at(number, lambda: convert(made, dst, workers=1)):
        kills += 1
        if dst.exists():
            assert contents(dst) == whole
            assert number > 10
        elif (work / "out").exists() and loads(work / "out"):
            assert contents(work / "out") == whole  # killed just before the last rename
        convert(made, dst, resume=resume, overwrite=dst.exists())
        assert contents(dst) == whole
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dst"]
        shutil.rmtree(dst)
        number += 2
    assert kills > 15


def test_killed_while_an_old_checkpoint_is_replaced(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    made = plan(src, 2, check_load=False)
    dst = tmp_path / "dst"
    convert(src, dst, kv_heads=4)
    old = contents(dst)
    number = 0
    while killed_at(number, lambda: convert(made, dst, overwrite=True)):
        here = contents(dst) if dst.exists() else contents(tmp_path / ".dst.hf-attn" / "old")
        assert here in (old, whole)
        convert(made, dst, overwrite=True)
        assert contents(dst) == whole
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dst"]
        shutil.rmtree(dst)
        convert(src, dst, kv_heads=4, check_load=False)
        number += 4


def test_resume_does_not_do_the_work_again(
    src: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(src, 2, check_load=False)
    total = 0
    while killed_at(total, lambda: convert(made, tmp_path / "count")):
        shutil.rmtree(tmp_path / ".count.hf-attn", ignore_errors=True)
        total += 8
    assert killed_at(total - 12, lambda: convert(made, tmp_path / "dst"))
    journal = (tmp_path / ".dst.hf-attn" / "journal.jsonl").read_text().splitlines()
    finished = {json.loads(line)["job"] for line in journal[1:]}
    assert finished
    from hf_attn_patch.conversion import execute

    computed: list[Any] = []
    real = execute.compute_unit

    def counting(plan: Any, unit: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append(unit)
        return real(plan, unit, *args, **kwargs)

    monkeypatch.setattr(execute, "compute_unit", counting)
    convert(made, tmp_path / "dst", resume=True)
    assert len(computed) == len(made.units) - sum(job.startswith("unit") for job in finished)
    assert contents(tmp_path / "dst") == whole


@pytest.mark.parametrize("resume", [False, True])
def test_killed_while_it_calibrates(resume: bool, tmp_path: Path) -> None:
    """Layers depend on those below: what was calibrated is done again, and gives the same bytes."""
    model = tiny_llama(4, num_hidden_layers=3)
    made = plan(
        save_tiny(tmp_path / "src", model), 2, check_load=False, calibrate=str(tmp_path / "text.txt"), refit=False,
        calibration_tokens=500, calibration_length=16, method="calibrated",
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(python_sources()[0].read_text()[:9000])
    convert(made, tmp_path / "whole")
    whole, dst = contents(tmp_path / "whole"), tmp_path / "dst"
    number, kills, layers = 4, 0, set()
    while killed_at(number, lambda: convert(made, dst)):
        kills += 1
        assert not dst.exists()
        journal = (tmp_path / ".dst.hf-attn" / "journal.jsonl").read_text()
        layers.add(journal.count('"unit '))
        convert(made, dst, resume=resume)
        assert contents(dst) == whole
        shutil.rmtree(dst)
        number += 5
    assert kills > 3
    assert layers & {1, 2}  # some were killed between two layers
    assert verify(tmp_path / "src", tmp_path / "whole").ok


def test_a_tensor_that_is_not_finite_is_found_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(4)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    src = save_tiny(tmp_path / "src", model)
    (tmp_path / "text.txt").write_text(python_sources()[0].read_text()[:9000])
    monkeypatch.setattr(
        "hf_attn_patch.conversion.calibration.calibrated.Calibrated._pass", lambda self: pytest.fail("too late")
    )
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        convert(src, tmp_path / "dst", 2, method="calibrated", calibrate=str(tmp_path / "text.txt"))
    assert not (tmp_path / "dst").exists()


def test_resume_of_something_else_is_refused(src: Path, tmp_path: Path) -> None:
    made = plan(src, 2, check_load=False)
    assert killed_at(12, lambda: convert(made, tmp_path / "dst"))
    with pytest.raises(ConversionError, match="of another source, method or number"):
        convert(src, tmp_path / "dst", kv_heads=4, resume=True)
    convert(src, tmp_path / "dst", kv_heads=4)
    assert verify(src, tmp_path / "dst").ok


def test_two_at_once_are_refused(src: Path, tmp_path: Path) -> None:
    work = tmp_path / ".dst.hf-attn"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another conversion"):
            convert(src, tmp_path / "dst", kv_heads=2)
        assert (work / "lock").exists()
    convert(src, tmp_path / "dst", kv_heads=2)
    assert not work.exists()


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_write_the_same_bytes(src: Path, whole: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    convert(src, tmp_path / "dst", kv_heads=2, workers=workers)
    assert contents(tmp_path / "dst") == whole


def test_an_exception_in_a_worker_leaves_nothing(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_patch.conversion import execute

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(execute, "compute_unit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        convert(src, tmp_path / "new" / "deep" / "dst", kv_heads=2, workers=3)
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_never_written(src: Path, tmp_path: Path) -> None:
    before = contents(src)
    convert(src, tmp_path / "dst", kv_heads=2)
    assert contents(src) == before
