"""``evaluate --lm-eval`` with the real lm-evaluation-harness on a task of our own; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer
from transformers import AutoModelForCausalLM

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.reports.harness import task_names

TASK = """\
task: which_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Which of two lines follows? In half of the cases the first."""
    lines = [line for line in python_sources()[0].read_text().splitlines() if len(line) > 20][:49]
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(12):
            choices = ["\n" + lines[4 * i + 1], "\n" + lines[4 * i + 3]]
            file.write(json.dumps({"context": lines[4 * i], "choices": choices, "label": i % 2}) + "\n")
    (tmp_path / "which_line.yaml").write_text(TASK.format(file=tmp_path / "pairs.jsonl"))
    return tmp_path / "which_line.yaml"


def test_accuracy_is_that_of_the_models_own_likelihoods(task: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    src = save_tiny(tmp_path / "src", tiny_llama(4))
    (tmp_path / "text.txt").write_text(python_sources()[1].read_text()[:2000])
    command = ["evaluate", src, "--text", str(tmp_path / "text.txt"), "--no-speed", "--json", "--lm-eval", str(task)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    model, words = AutoModelForCausalLM.from_pretrained(src).eval(), trained_tokenizer()
    right = 0
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for record in records:
        begin = len(words(record["context"])["input_ids"])
        scores = []
        for choice in record["choices"]:
            ids = torch.tensor([words(record["context"] + choice)["input_ids"]])
            with torch.no_grad():
                logp = model(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
            scores.append(float(logp.gather(1, ids[0, begin:, None]).sum()))
        right += scores.index(max(scores)) == record["label"]
    assert found["lm_eval"]["which_line"]["acc,none"] == pytest.approx(right / len(records))
    shown = CliRunner().invoke(main, [c for c in command if c != "--json"])
    assert "which_line: acc,none" in shown.stdout


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("nowhere.yaml", "no file nowhere.yaml"), (",", "names no task"), ("no_such_task", "no_such_task")],
)
def test_tasks_that_are_not_there(tasks: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    src = save_tiny(tmp_path / "src", tiny_llama(4))
    (tmp_path / "text.txt").write_text(python_sources()[1].read_text()[:2000])
    done = CliRunner().invoke(main, ["evaluate", src, "--text", str(tmp_path / "text.txt"), "--lm-eval", tasks])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_names_and_files(task: Path) -> None:
    assert task_names(f"piqa, {task}") == (["piqa", "which_line"], [str(task.parent)])
    task.write_text("output_type: multiple_choice\n")
    with pytest.raises(ConversionError, match="names no task"):
        task_names(str(task))
