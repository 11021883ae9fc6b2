"""The pure parts of ``benchmarks/engines``: what is expected of an engine, and the verdict on what it said."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import python_sources, tiny_llama

from benchmarks.engines import cases, run
from benchmarks.engines.compare import Row, difference, fault, read_steps, table

WANT: dict[str, Any] = {
    "tokens": [[7, 8], [9, 7]],
    "logprobs": [[{7: -0.1, 3: -2.0}, {8: -0.2, 7: -1.0}], [{9: -0.3}, {7: -0.4}]],
    "margin": 0.5,
    "exchanged": 5.0,
}


def said(**changes: Any) -> dict[str, Any]:
    """An engine that says what is wanted, as JSON has it, and of more tokens."""
    steps = [[{str(i): v for i, v in step.items()} | {"400": -9.0} for step in row] for row in WANT["logprobs"]]
    return {"tokens": WANT["tokens"], "logprobs": read_steps(steps)} | changes


def test_the_same_is_the_same() -> None:
    assert fault(WANT, said(), 1e-3) == (0.0, "")


def test_what_is_wrong_is_told() -> None:
    other = [[7, 8], [9, 6]]
    assert fault(WANT, said(tokens=other), 1e-3)[1] == "other tokens than transformers from prompt 1, step 1 on"
    assert fault(WANT, said(tokens=[[7, 8]]), 1e-3)[1] == "other tokens than transformers from prompt 1, step 0 on"
    assert fault(WANT, said(tokens=[[7], [9, 7]]), 1e-3)[1] == "other tokens than transformers from prompt 0, step 1 on"
    near = said()
    near["logprobs"][1][0][9] += 0.02
    apart, sentence = fault(WANT, near, 0.01)
    assert math.isclose(apart, 0.02) and sentence == "log probabilities differ by 0.02, more than 0.01"
    assert fault(WANT, near, 0.03)[1] == ""


@pytest.mark.parametrize("silent", ["a token", "a step", "not a number"])
def test_silence_is_no_agreement(silent: str) -> None:
    got = said()
    if silent == "a token":
        del got["logprobs"][0][1][7]
    elif silent == "a step":
        got["logprobs"][0].pop()
    else:
        got["logprobs"][0][0][7] = math.nan
    assert not difference(WANT["logprobs"], got["logprobs"]) <= 1e9
    assert fault(WANT, got, 1e-3)[1]


def test_a_check_that_cannot_fail_is_a_fault() -> None:
    """An engine that mixes the KV heads would be within ten tolerances of the right answer."""
    assert "the check is blind" in fault(WANT | {"exchanged": 0.5}, said(), 0.06)[1]
    assert fault(WANT | {"exchanged": 0.5}, said(), 0.04)[1] == ""


def test_q8_0_is_that_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf")
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    x[0, :32] = 0
    kind = gguf.GGMLQuantizationType.Q8_0
    want = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    torch.testing.assert_close(cases.as_q8_0(x), torch.from_numpy(want), rtol=0, atol=0)


def test_exchanged_heads_are_those_of_exchanged_weights() -> None:
    """The attention that pairs heads wrongly, and the right one with K and V of the two heads exchanged."""
    model = tiny_llama(kv_heads=2).eval()
    ids = torch.arange(18).view(2, 9)
    model.set_attn_implementation("exchanged_heads")
    wrong = cases.scores(model, ids, 4)
    model.set_attn_implementation("eager")
    right = cases.scores(model, ids, 4)
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data = torch.cat(projection.weight.data.chunk(2)[::-1])
    torch.testing.assert_close(cases.scores(model, ids, 4), wrong)
    assert not torch.allclose(right, wrong)


def test_greedy_is_generate() -> None:
    model = tiny_llama(eos_token_id=None).eval()
    prompts = torch.arange(4, 16).view(2, 6)
    tokens, logprobs = cases.greedy(model, prompts, 5)
    found = model.generate(prompts, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert tokens.tolist() == found.sequences[:, 6:].tolist()
    want = torch.stack(found.logits, 1).double().log_softmax(-1)
    torch.testing.assert_close(logprobs, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_case_says_something(family: str, tmp_path: Path) -> None:
    """Converted to few KV heads, one token stands out at every step, and exchanged heads would be seen."""
    text = python_sources()[0].read_text(encoding="utf-8")
    folder = cases.make(family, tmp_path, text * 3)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == cases.KV_HEADS
    want = cases.expected(folder)
    assert want.margin > 0.05 and want.exchanged > 1
    for prompt, tokens, steps in zip(want.prompts, want.tokens, want.logprobs, strict=True):
        assert len(prompt) == cases.LENGTH and len(set(tokens)) >= 6
        assert [max(step, key=step.__getitem__) for step in steps] == tokens


WORKER = """
import json, sys
jobs = [json.loads(line) for line in open(sys.argv[1])]
with open(sys.argv[2], "w") as out:
    for job in jobs:
        if job["folder"].endswith("dies"):
            raise ValueError("no such architecture: Grouped")
        if job["folder"].endswith("refused"):
            answer = {"error": "TypeError: cannot take it"}
        else:
            answer = json.load(open(job["folder"]))
        print(json.dumps({"version": "engine 1"} | answer), file=out, flush=True)
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``engine(names, refuses)``: the rows of an engine that is asked about these, one after another."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "good").write_text(json.dumps(said()))
    want = cases.Expected([[4], [5]], **WANT)

    def rows(*names: str, refuses: dict[str, tuple[str, str]] | None = None) -> dict[str, Row]:
        made = run.Engine(str(tmp_path / "worker.py"), str(tmp_path), names, {"way": 1e-3}, refuses or {})
        monkeypatch.setitem(run.ENGINES, "engine", made)
        questions = [run.Question("engine", name, "way", tmp_path / name, want) for name in names]
        return {row.family: row for row in run.asked("engine", questions, tmp_path)}

    return rows


def test_a_dead_worker_is_one_fault(engine: Any) -> None:
    (found := engine("dies", "good"))["good"]
    assert found["dies"].fault == "ValueError: no such architecture: Grouped" and not found["dies"].refused
    assert found["good"].fault == "" and found["good"].version == "engine 1" and found["good"].tokens == 4


def test_refusals_are_known_or_faults(engine: Any) -> None:
    assert engine("refused")["refused"].fault == "TypeError: cannot take it"
    known = engine("refused", refuses={"refused": ("cannot take", "it has no such layer")})["refused"]
    assert (known.fault, known.refused) == ("", "it has no such layer")
    assert "| engine 1 | refused | way | not taken: it has no such layer |" in table([known])
    changed = engine("refused", refuses={"refused": ("another message", "it has no such layer")})["refused"]
    assert changed.fault == "TypeError: cannot take it" and not changed.refused


def test_what_runs_against_the_table_is_a_fault(engine: Any) -> None:
    row = engine("good", refuses={"good": ("cannot", "it has no such layer")})["good"]
    assert row.fault == "it runs, although it is said that it does not: it has no such layer"


def test_rows_take_the_place_of_older_ones() -> None:
    row = Row("llama.cpp", "qwen2", "f16", "1", "2026-01-01", 0.1, 5.0, 36, "wrong")
    old = [row._asdict(), row._replace(family="llama")._asdict()]
    found = run.merged(old, [row._replace(version="2", fault="")])
    assert [(r["family"], r["version"]) for r in found] == [("llama", "1"), ("qwen2", "2")]
