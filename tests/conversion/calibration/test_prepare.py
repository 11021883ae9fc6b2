"""Calibration is made, prepared and run: three steps, and each does its own work alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer

from hf_attn_patch.conversion import ConversionError, plan
from hf_attn_patch.conversion.calibration import calibrated
from hf_attn_patch.conversion.calibration.calibrated import Calibrated
from hf_attn_patch.conversion.calibration.collect import text_samples
from hf_attn_patch.conversion.calibration.layers import LayerStack, load
from hf_attn_patch.conversion.methods.method import ended

CPU = torch.device("cpu")


class Recorded:
    """What was looked at, and which bars were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self.bars: list[Any] = []
        look, bar = LayerStack.look, calibrated.progress_bar

        def looking(*args: Any) -> Any:
            self.looks += 1
            return look(*args)

        def begun(*args: Any, **kwargs: Any) -> Any:
            self.bars.append(bar(*args, **kwargs))
            return self.bars[-1]

        monkeypatch.setattr(LayerStack, "look", looking)
        monkeypatch.setattr(calibrated, "progress_bar", begun)


def made(folder: Path, broken: bool = False) -> Calibrated:
    torch.manual_seed(0)
    model = tiny_llama(4)
    if broken:
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(torch.inf)
    source = save_tiny(folder / ("broken" if broken else "src"), model)
    trained_tokenizer().save_pretrained(source)
    text = folder / "text.txt"
    text.write_text(python_sources()[0].read_text()[:9000])
    planned = plan(source, 2)
    original = load(planned)
    samples = text_samples(planned, original, str(text), tokens=600, length=16, device=CPU)
    return Calibrated(planned, original, samples, device=CPU)


def test_it_runs_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    steps = made(tmp_path)
    assert (recorded.looks, recorded.bars) == (0, [])
    steps.prepare()
    steps.prepare()
    assert (recorded.looks, recorded.bars) == (1, [])
    assert not steps.done
    merged = steps.all()
    (bar,) = recorded.bars
    assert bar.n == bar.total == len(steps.sides[0].blocks) == len(merged)
    assert recorded.looks == 1

    unprepared = made(tmp_path).all()  # whoever runs it at once gets the same
    assert set(unprepared) == set(merged)
    for prefix, weights in merged.items():
        for name in ("q", "k", "v", "o"):
            assert torch.equal(getattr(weights, name), getattr(unprepared[prefix], name))


def test_what_cannot_be_calibrated_is_known_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    steps = made(tmp_path, broken=True)
    with pytest.raises(ConversionError, match="not finite"):
        steps.prepare()
    assert recorded.bars == []


def test_an_error_ends_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its thread would write lines for as long as the process lives."""
    recorded = Recorded(monkeypatch)
    steps = made(tmp_path)

    def full() -> None:
        with ended(steps):
            steps.step()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        full()
    steps = made(tmp_path)
    steps.step()
    monkeypatch.setattr(Calibrated, "_pass", full)  # of the next layer
    with pytest.raises(TypeError):
        steps.step()
    assert [(bar._over.is_set(), bar.n, bar.total) for bar in recorded.bars] == [(True, 1, 2)] * 2
