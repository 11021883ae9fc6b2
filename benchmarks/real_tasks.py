"""Tasks for lm-evaluation-harness out of the held-out texts of ``real_models.py``; nothing is fetched.

``last_word``: a passage of two or three sentences, whose last word was said before in it, is to be ended (the task of
LAMBADA, Paperno et al. 2016, arXiv 1606.06031). ``next_sentence``: which of four sentences of the same text follows
two others (in the manner of HellaSwag, Zellers et al. 2019, arXiv 1905.07830, with the text's own sentences for wrong
ones).
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from benchmarks.real_sources import UNSEEN

#: texts that nothing is calibrated on, and WikiText-2's test
DOMAINS = ("wikitext", *UNSEEN)
#: records of a domain in a task
COUNT = 200
METRICS = {
    "last_word": ("loglikelihood", "acc"),
    "next_sentence": ("multiple_choice", "acc_norm"),
}
YAML = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{context}}}}"
{more}
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
MORE = {
    "last_word": 'doc_to_target: "{{target}}"',
    "next_sentence": 'doc_to_choice: "{{choices}}"\ndoc_to_target: label',
}


def sentences(text: str) -> list[list[str]]:
    """Runs of sentences of prose: of 6 to 40 words, with a capital at the beginning and a full stop, without marks for
    words that are not there.

    >>> sentences("One two three four five six. Seven eight\\nnine ten eleven twelve. X.\\n\\n  if (x) return;")
    [['One two three four five six.', 'Seven eight nine ten eleven twelve.']]
    """
    found: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", text):
        run: list[str] = []
        for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.strip()):
            sentence = " ".join(part.split())
            if (
                re.fullmatch(r"[A-Z].*[a-z][.!?]", sentence)
                and 6 <= len(sentence.split()) <= 40
                and "<" not in sentence
            ):
                run.append(sentence)
            else:
                found, run = [*found, run], []
        found.append(run)
    return [run for run in found if run]


def last_words(runs: list[list[str]]) -> list[dict[str, Any]]:
    """Passages of two or three sentences, whose last word of four letters or more was said before in them.

    >>> last_words([["The engine was very hot today.", "So nobody could touch the engine."]])
    [{'context': 'The engine was very hot today. So nobody could touch the', 'target': ' engine'}]
    """
    found = []
    for run in runs:
        begin = 0
        for end in range(2, len(run) + 1):
            match = re.fullmatch(r"(.*)( [A-Za-z]{4,})[.!?]", " ".join(run[max(begin, end - 3) : end]))
            if end - begin >= 2 and match and re.search(rf"\b{match[2].strip()}\b", match[1]):
                found.append({"context": match[1], "target": match[2]})
                begin = end
    return found


def next_sentences(runs: list[list[str]], seed: int = 0) -> list[dict[str, Any]]:
    """Two sentences, the one that follows, and three from elsewhere, in an order drawn by ``seed``."""
    draw, every = random.Random(seed), [s for run in runs for s in run]
    found = []
    for run in runs:
        for i in range(0, len(run) - 2, 3):
            wrong = draw.sample([s for s in every if s not in run], 3)
            label = draw.randrange(4)
            choices = [" " + s for s in (*wrong[:label], run[i + 2], *wrong[label:])]
            found.append({"context": " ".join(run[i : i + 2]), "choices": choices, "label": label})
    return found


def tasks(data: Path, folder: Path) -> str:
    """Write the tasks into ``folder``; their YAML files with commas, as ``--lm-eval`` takes them."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {"last_word": [], "next_sentence": []}
    for domain in DOMAINS:
        parts = [f"{domain}.test.txt", *([f"{domain}.txt"] if domain in UNSEEN else [])]
        text = "\n\n".join((data / "texts" / part).read_text() for part in parts)
        runs = sentences(text.replace("\n", "\n\n") if domain == "wikitext" else text)  # there lines are paragraphs
        for task, found in (("last_word", last_words(runs)), ("next_sentence", next_sentences(runs))):
            random.Random(0).shuffle(found)
            records[task] += found[:COUNT]
    for task, (output, metric) in METRICS.items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in records[task]))
        text = YAML.format(task=task, file=file, output=output, more=MORE[task], metric=metric)
        (folder / f"{task}.yaml").write_text(text)
    return ",".join(str(folder / f"{task}.yaml") for task in METRICS)


def accuracies(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of each task its one number, out of what the harness gives."""
    return {name: values[f"{METRICS[name][1]},none"] for name, values in found.items()}
