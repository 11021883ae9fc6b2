"""The figures show what the tables say: read back from the axes, and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_families import tiny_model
from zoo_cases import BY_NAME

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.reports import plots
from hf_attn_patch.conversion.reports.evaluation import Evaluation

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were closed."""
    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    return kept


def test_the_cache_over_the_context(drawn: list[Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "src")  # 2 layers, 4 KV heads of 8, fp32
    picture = tmp_path / "cache.png"
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "src"), "--context", "1000", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    config = tiny_model("llama").config
    ends = {line.get_label(): line.get_ydata()[-1] for line in axis.lines}
    per_head = 2 * config.num_hidden_layers * config.head_dim * 4 * 1000
    heads = config.num_key_value_heads
    assert ends == {
        f"{n} KV head{'s' if n > 1 else ''}{', now' if n == heads else ''}: {n * per_head / 1000:.1f} kB": n * per_head
        for n in range(1, heads + 1)
        if heads % n == 0
    }
    assert axis.get_xlabel() == "context, tokens"


def test_an_encoder_has_no_cache_to_draw(tmp_path: Path) -> None:
    BY_NAME["bert"].make(None).save_pretrained(tmp_path / "src")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "src"), "--plot", str(tmp_path / "cache.png")])
    assert done.exit_code == 2
    assert "no KV cache" in done.output
    assert not (tmp_path / "cache.png").exists()


def test_loss_over_bytes(drawn: list[Any], tmp_path: Path) -> None:
    found = [Evaluation(f"some/{n}", loss, 0.0, 9, 8, size) for n, loss, size in (("a", 2.0, 4000), ("b", 3.0, 1000))]
    plots.plot_quality(found, tmp_path / "out.png")
    (axis,) = drawn[0].axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines}
    assert points == {"a": (4000, 2.0), "b": (1000, 3.0)}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1.0 kB", "4.0 kB"]


@pytest.mark.parametrize("name", ["out.nonsense", "no/such/folder/out.png"])
def test_a_file_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--plot"):
        plots.plot_quality([Evaluation("a", 2.0, 0.0, 9, 8, 4000)], tmp_path / name)
