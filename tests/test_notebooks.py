"""What a notebook shows of an answer says the same as its text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_llama

import hf_attn_patch
from hf_attn_patch.conversion import evaluate, inspect_source, plan

ROOT = Path(__file__).parents[1]


class Shown(HTMLParser):
    """The texts of a page; every tag that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook") / "a<b>&c"
    save_tiny(folder, tiny_llama(kv_heads=4))
    return folder


@pytest.mark.parametrize("answer", ["explain", "plan", "inspect_source", "evaluate"])
def test_the_same_in_text_and_in_a_notebook(answer: str, folder: Path) -> None:
    found: Any = {
        "explain": lambda: hf_attn_patch.explain(tiny_llama(), batch=2, q_len=8, kv_len=8, training=True),
        "plan": lambda: plan(folder, 2),
        "inspect_source": lambda: inspect_source(folder, context=100),
        "evaluate": lambda: evaluate([str(folder)], ROOT / "README.md", source=str(folder), tokens=40, speed=False),
    }[answer]()
    shown = Shown(found._repr_html_()).texts
    assert len(shown) > 10
    text = "".join(str(found).replace("-", "").split())
    for part in shown:
        assert "".join(part.replace("-", "").split()) in text
    assert sum(len("".join(part.replace("-", "").split())) for part in shown) >= len(text) - 10
