"""Tasks for lm-evaluation-harness out of texts: what stands in them is what stood in the text."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import real_tasks

WORDS = ["river", "stone", "winter", "garden", "letter", "window", "market", "bridge", "summer", "forest"]
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=6, max_size=12).map(lambda w: f"The {' '.join(w)}.")


@given(st.lists(st.lists(SENTENCES, min_size=3, max_size=9), min_size=4, max_size=6))
def test_the_right_answer_is_what_stood_there(paragraphs: list[list[str]]) -> None:
    text = "\n\n".join(" ".join(sentences) for sentences in paragraphs)
    runs = real_tasks.sentences(text)
    assert runs == paragraphs
    for record in real_tasks.last_words(runs):
        assert record["context"] + record["target"] + "." in text
        assert record["target"].strip() in record["context"].replace(".", "").split()
    if len({s for run in runs for s in run}) > 12:  # enough that are not of the same paragraph
        for record in real_tasks.next_sentences(runs):
            assert record["context"] + record["choices"][record["label"]] in text and len(record["choices"]) == 4


def test_what_is_no_prose_ends_a_run() -> None:
    first, second = "The river was cold and very deep.", "Nobody went to the other side again."
    text = f"{first} A b. {second}\n\nThe <unk> river was cold and very deep.\n\nint main(void) {{}}"
    assert real_tasks.sentences(text) == [[first], [second]]


def test_the_files_are_what_the_harness_reads(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    draw = [f"The {WORDS[i % 10]} and the {WORDS[(i * 3) % 10]} came to the {WORDS[i % 10]}." for i in range(60)]
    for domain in real_tasks.DOMAINS:
        for end in (".txt", ".test.txt"):
            (tmp_path / "texts" / f"{domain}{end}").write_text(
                "\n\n".join(" ".join(draw[i : i + 6]) for i in range(54))
            )
    files = real_tasks.tasks(tmp_path, tmp_path / "tasks").split(",")
    assert [Path(f).stem for f in files] == list(real_tasks.METRICS)
    for file in files:
        task = yaml.safe_load(Path(file).read_text())
        records = [json.loads(s) for s in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
        assert 0 < len(records) <= real_tasks.COUNT * len(real_tasks.DOMAINS) and task["task"] == Path(file).stem
    found = real_tasks.accuracies(
        {"last_word": {"acc,none": 0.5}, "next_sentence": {"acc,none": 0, "acc_norm,none": 1}}
    )
    assert found == {"last_word": 0.5, "next_sentence": 1}
