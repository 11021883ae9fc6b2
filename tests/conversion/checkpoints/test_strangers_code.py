"""Code that a stranger put beside a checkpoint is never run, and nobody is asked whether it may."""

from __future__ import annotations

import builtins
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import run
from tiny import python_sources, save_tiny, tiny_llama

from hf_attn_patch.documents.tokenizers import load_tokenizer
from hf_attn_patch.errors import HFAttnError
from hf_attn_patch.training.models import load_config, load_model, objective_kind

THEIRS = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model", "AutoModelForCausalLM": "theirs.Model"}
ELSEWHERE = {name: f"somebody/repo--{place}" for name, place in THEIRS.items()}
PROCESSORS = dict.fromkeys(("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"), "theirs.Processor")
#: a template that would leave the sandbox, one without end, and one that is none
TEMPLATES = {
    "reaching out": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{{ ''.__class__.__mro__ }}",
    "without end": "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "no template": "{% if %}{{",
}


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}), encoding="utf-8")


def nested(folder: Path) -> None:
    theirs = {"model_type": "theirs", "auto_map": THEIRS}
    change(folder, "config.json", model_type="llava", text_config=theirs, vision_config=theirs)


def adapter(folder: Path) -> None:
    change(
        folder, "adapter_config.json", peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(folder),
        auto_mapping={"base_model_class": "Model", "parent_library": "theirs"},
    )  # fmt: skip


def lone_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    adapter(folder)


def templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name, text in TEMPLATES.items():
        (folder / "additional_chat_templates" / f"{name.split()[0]}.jinja").write_text(text)


def processors(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        change(folder, name, auto_map=PROCESSORS)


def own_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "theirs.py").read_text())
    change(folder, "generation_config.json", custom_generate=str(folder))


def template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


Prepare = Callable[[Path], None]
CASES: dict[str, Prepare] = {
    "config": lambda f: change(f, "config.json", auto_map=THEIRS),
    "config of a new type": lambda f: change(f, "config.json", auto_map=THEIRS, model_type="theirs"),
    "another repository": lambda f: change(f, "config.json", auto_map=ELSEWHERE),
    "parts of a config": nested,
    "odd parts": lambda f: change(f, "config.json", backbone_config={"model_type": "theirs", "auto_map": THEIRS}),
    "tokenizer": lambda f: change(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.T", "theirs.T"]}),
    "tokenizer of a new class": lambda f: change(
        f, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["theirs.T", None]}
    ),
    "processors": processors,
    "generation": own_generate,
    "adapter": adapter,
    "adapter alone": lone_adapter,
    "templates": templates,
    **{f"template {name}": template(text) for name, text in TEMPLATES.items()},
}

#: what transformers knows by itself, and their code would only take the place of
HARMLESS = {"config", "another repository", "tokenizer", "processors", "generation"}


@pytest.mark.parametrize("name", CASES)
def test_is_not_run_and_nobody_is_asked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(*words: Any) -> str:
        asked.append(words)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.chdir(tmp_path)
    source, canary, text = tmp_path / "source", tmp_path / "CANARY", tmp_path / "text.txt"
    save_tiny(source, tiny_llama(4))
    body = "\n".join(f"class {c}:\n    pass" for c in ("Config", "Model", "T", "Processor"))
    (source / "theirs.py").write_text(f"open({str(canary)!r}, 'w').close()\n{body}\n")
    CASES[name](source)
    text.write_text(python_sources(1)[0].read_text(encoding="utf-8")[:9000], encoding="utf-8")
    merged = ("--kv-heads", 2, "--method", "calibrated", "--calibration-tokens", 256, "-q")
    for done in (
        run("inspect", source),
        run("convert", source, tmp_path / "own", *merged),
        run("convert", source, tmp_path / "read", *merged, "--calibrate", text),
        run("evaluate", source, "--text", text, "--tokens", 100, "--context", 32, "--no-speed"),
    ):
        assert done.exit_code in ((0,) if name in HARMLESS or name.startswith("template") else (0, 2)), done.output
        assert done.exit_code == 0 or done.output.strip().splitlines()[-1].startswith("Error: "), done.output
    with contextlib.suppress(HFAttnError):  # uptraining reads it by these
        load_tokenizer(str(source))
        config = load_config(str(source))
        load_model(str(source), config, objective_kind(config), attention="hf_attn_patch", dtype=torch.float32)
    assert not asked
    assert not canary.exists()


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_no_model_for_anybody(alone: bool, tmp_path: Path) -> None:
    """transformers would load what the adapter names, and put the adapter on top."""
    save_tiny(tmp_path / "source", tiny_llama(4))
    (lone_adapter if alone else adapter)(tmp_path / "source")
    said = "holds an adapter, not a model" if alone else "holds weights and an adapter"
    (tmp_path / "text.txt").write_text("some words " * 50)
    for arguments in (("inspect",), ("evaluate", "--text", tmp_path / "text.txt")):
        done = run(arguments[0], tmp_path / "source", *arguments[1:])
        assert done.exit_code == 2 and said in done.output
    with pytest.raises(HFAttnError, match=said):
        load_config(str(tmp_path / "source"))
