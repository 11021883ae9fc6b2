"""Progress in a log: lines by the clock, whatever a step takes; in a terminal a bar; nothing where none is wanted."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hf_attn_patch.documents import bars
from hf_attn_patch.documents.bars import no_progress, progress_bar


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "FIRST", 0.1)
    monkeypatch.setattr(bars, "EVERY", 0.1)


def slow(steps: int, seconds: float) -> Iterator[int]:
    for step in range(steps):
        yield step
        time.sleep(seconds)


def test_one_long_step_is_not_silent(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(desc="calibrating", unit="layer", total=3) as bar:
        bar.update()
        time.sleep(0.5)  # within the second
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all(re.fullmatch(r"calibrating: 1 of 3 layer \(33%\), 00:0\d, about 00:0\d left", line) for line in lines)


def test_steps_are_counted_as_they_end(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(slow(4, 0.08), desc="reading", unit="row")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"reading: [12] row, 00:00", lines[0])
    assert re.fullmatch(r"reading: 4 row, 00:0\d", lines[-1])


def test_what_has_no_steps_shows_the_time(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(desc="loading x"):
        time.sleep(0.15)
    assert set(capsys.readouterr().err.splitlines()) == {"loading x, 00:00"}


def test_other_lines_stay_whole(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(desc="uptraining", unit="tok", unit_scale=True, total=4_000_000, initial=1_000_000) as bar:
        bar.update(1_000_000)
        bar.set_postfix({"loss": "1.5"}, refresh=False)
        bar.write("step 1: held-out loss 2.0", file=sys.stderr)
        time.sleep(0.15)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "step 1: held-out loss 2.0"
    assert re.fullmatch(r"uptraining: 2.00M of 4.00M tok \(50%\), 00:00, about 00:0\d left, loss=1.5", lines[-1])


def test_short_work_and_hidden_bars_leave_no_line(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), desc="short", unit="x")) == [0, 1, 2]
    assert list(progress_bar(slow(2, 0.2), desc="of another process", unit="x", shown=False)) == [0, 1]
    with no_progress():
        list(progress_bar(slow(2, 0.2), desc="quiet", unit="x"))
        with no_progress(False):
            list(progress_bar(slow(2, 0.2), desc="still quiet", unit="x"))
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_lines(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        [1 // step for step in progress_bar(slow(3, 0.0), desc="failing", unit="x")]
    time.sleep(0.25)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            """Nothing to flush."""

        def isatty(self) -> bool:
            return True

    terminal: Any = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(progress_bar(range(3), desc="merging", unit="layer", ncols=60))
    assert "\r" in terminal.text and re.search(r"merging: 100%\|\S+\| 3/3 ", terminal.text)
