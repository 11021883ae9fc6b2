"""Documents in, packed sequences out: nothing lost, nothing seen twice, the same from any position on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import trained_tokenizer

from hf_attn_patch.documents.sources import open_documents
from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE
from hf_attn_patch.training.data import packing, stream
from hf_attn_patch.training.data.packing import collate, pack
from hf_attn_patch.training.data.steps import ahead, steps
from hf_attn_patch.training.data.stream import Position, TokenStream
from hf_attn_patch.training.data.training_data import TrainingData, framing_for
from hf_attn_patch.training.options import parse_options


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 0

    def __call__(self, texts, verbose=True):
        return {"input_ids": [[ord(c) for c in t] for t in texts]}


class Records:
    """A stand-in for datasets.IterableDataset: its state is the index of the next record."""

    def __init__(self, texts):
        self.texts, self.at = texts, 0

    def __iter__(self):
        while self.at < len(self.texts):
            self.at += 1
            yield {"text": self.texts[self.at - 1]}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def make_stream(texts, **options):
    return TokenStream(lambda: Records(texts), Letters(), **{"seed": None, **options})


# the first document alone fills the longest sequence that is tried
texts = st.lists(st.text("abcdefgh", min_size=1, max_size=30), max_size=12).map(lambda t: ["abcdefgh" * 2, *t])


@settings(max_examples=60, deadline=None)
@given(texts=texts, S=st.integers(2, 16))
def test_every_token_but_a_documents_first_is_predicted_once(texts, S):
    total = sum(len(t) + 1 for t in texts)
    first_epoch = itertools.takewhile(lambda p: p.position.epoch == 0, pack(make_stream(texts), S))
    whole = []
    for packed in itertools.islice(first_epoch, total // S + len(texts)):
        assert len(packed.ids) == len(packed.labels) == S == sum(packed.lengths)
        start = 0
        for n in packed.lengths:
            ids, labels = packed.ids[start : start + n], packed.labels[start : start + n]
            assert labels[:-1] == ids[1:]  # within a document the label is the next token, never another document's
            text = "".join(map(chr, ids + labels[-1:] if labels[-1] != IGNORE else ids))
            assert any(text in t + "\0" for t in texts)
            start += n
        whole += [label for label in packed.labels if label != IGNORE]
    # all labels in order are the documents without their first characters
    expected = [ord(c) for t in texts for c in (t + "\0")[1:]]
    assert whole == expected[: len(whole)]
    assert len(expected) - len(whole) < S


@settings(max_examples=40, deadline=None)
@given(texts=texts, S=st.integers(2, 9), cut=st.integers(0, 6), block=st.integers(1, 5), seed=st.integers(0, 5))
def test_resuming_at_any_sequence_gives_the_same_ones(texts, S, cut, block, seed):
    before, stream.BLOCK = stream.BLOCK, block
    try:
        make = lambda: make_stream([t + "xyzxyzxyz" for t in texts], seed=seed)  # noqa: E731
        through = list(itertools.islice(pack(make(), S), 14))
        position = through[cut].position
        position = Position(**json.loads(json.dumps(position.as_dict())))  # as a checkpoint keeps it
        again = list(itertools.islice(pack(make(), S, position), 14 - cut - 1))
        assert [(p.ids, p.labels, p.position) for p in again] == [
            (p.ids, p.labels, p.position) for p in through[cut + 1 :]
        ]
    finally:
        stream.BLOCK = before


def test_epochs_differ_in_order_and_hold_the_same_documents():
    texts = [f"document {i} " for i in range(20)]
    documents = list(itertools.islice(make_stream(texts, seed=3).documents(), 40))
    epochs = [[d.number for d in documents if d.position.epoch == e] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_held_out_documents_are_never_trained_on():
    texts = [f"document {i} " for i in range(20)]
    trained = {d.number for d in itertools.islice(make_stream(texts, held_out_every=5).documents(), 60)}
    held_out = [d.number for d in make_stream(texts, held_out_every=5, held_out=True).documents()]
    assert held_out == [4, 9, 14, 19]
    assert trained == set(range(20)) - set(held_out)


def test_collate_restarts_positions_at_every_border():
    sequences = list(itertools.islice(pack(make_stream(["abcd", "ef", "ghijkl"]), 8), 2))
    batch = collate(sequences)
    assert batch.ids.shape == batch.labels.shape == batch.positions.shape == (1, 16)
    lengths = [n for s in sequences for n in s.lengths]
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert batch.longest == max(lengths)
    assert batch.positions[0].tolist() == [i for n in lengths for i in range(n)]
    assert batch.positions[0, 8] == 0  # sequences of a batch don't see each other either


@settings(max_examples=20, deadline=None)
@given(processes=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2]))
def test_a_step_is_the_same_whatever_the_number_of_processes(processes, micro):
    texts = ["some words of text", "more", "and again more of it"]

    def cut(process, of, size):
        examples = pack(make_stream(texts), 6)
        found = steps(examples, batch_size=8, micro_batch_size=size, process=process, processes=of)
        return list(itertools.islice(found, 3))

    alone = cut(0, 1, 8)
    for index, whole in enumerate(alone):
        parts = [cut(p, processes, micro)[index] for p in range(processes)]
        together = sorted(tuple(e.ids) for part in parts for m in part.micro for e in m)
        assert together == sorted(tuple(e.ids) for e in whole.micro[0])
        assert {part.targets for part in parts} == {whole.targets}
        assert {part.position for part in parts} == {whole.position}
        assert len({len(part.micro) for part in parts}) == 1


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(TrainingError, match="--batch-size 6 is not a multiple of --micro-batch-size 2 times 2"):
        next(steps(pack(make_stream(["abcdef"]), 3), batch_size=6, micro_batch_size=2, processes=2))


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_no_text_is_refused(texts):
    with pytest.raises(TrainingError, match="the news holds no text"):
        next(pack(make_stream(texts, name="the news"), 4))


def test_too_little_text_for_one_sequence_is_refused():
    stream = make_stream(["a"], add_eos=False, name="the note")
    with pytest.raises(TrainingError, match="the note is shorter than one sequence of 4 tokens"):
        next(packing.pack(stream, 4))


def test_ahead_passes_items_and_errors_on():
    def fails():
        yield 1
        raise TrainingError("gone")

    items = ahead(fails)
    assert next(items) == 1
    with pytest.raises(TrainingError, match="gone"):
        next(items)
    assert list(ahead(lambda: iter(range(5)))) == [0, 1, 2, 3, 4]


def _texts(data, field="text"):
    return [record[field] for record in data]


def test_local_files_of_every_kind(tmp_path):
    import pandas

    (tmp_path / "one.txt").write_text("first\nline\n\nsecond\n")
    assert _texts(open_documents(str(tmp_path / "one.txt"))) == ["first\nline", "second\n"]
    assert [t.strip() for t in _texts(open_documents(str(tmp_path / "one.txt"), unit="line"))] == [
        "first", "line", "", "second",
    ]  # fmt: skip
    (tmp_path / "two.txt").write_text("other")
    assert _texts(open_documents(str(tmp_path))) == ["first\nline\n\nsecond\n", "other"]
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert _texts(open_documents(str(tmp_path / "a.jsonl"), fields=("body",)), "body") == ["x", "y"]
    pandas.DataFrame({"text": ["p", "q"]}).to_parquet(tmp_path / "a.parquet")
    assert _texts(open_documents(str(tmp_path / "a.parquet"))) == ["p", "q"]


def test_hidden_files_are_left_out_and_a_hidden_folder_that_was_named_is_read(tmp_path):
    folder = tmp_path / ".cache" / "texts"  # where downloads lie, for one
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        (folder / name).write_text(name)
    assert _texts(open_documents(str(folder))) == ["a.txt"]


def _store(kind: str, folder, documents: list[str]):
    """The documents as ``kind``, and what to give to --dataset."""
    import datasets

    table = datasets.Dataset.from_dict({"text": documents})
    if kind == "text files":
        for index, text in enumerate(documents):
            (folder / f"{index:03}.txt").write_text(text)
        return folder
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return folder / "a.jsonl"
    if kind == "parquet":
        table.to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    if kind == "saved to disk":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    other = datasets.Dataset.from_dict({"text": ["another split, not to be trained on"] * 5})
    if kind == "saved splits":
        datasets.DatasetDict({"train": table, "test": other}).save_to_disk(folder / "saved")
        return folder / "saved"
    clone = folder / "clone"  # of a repository of the hub
    table.to_parquet(clone / "data" / "train-00000-of-00001.parquet")
    other.to_parquet(clone / "data" / "test-00000-of-00001.parquet")
    (clone / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n---\n# Some texts\n"
    )
    return clone


KINDS = ["text files", "jsonl", "parquet", "saved to disk", "saved splits", "clone"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_gives_the_same_tokens_and_resumes(tmp_path, kind):
    documents = [f"document {i}\n\nof {i % 7} parts, with a tab\t, ünïcode and a last line" for i in range(40)]
    data = str(_store(kind, tmp_path, documents))
    before, stream.BLOCK = stream.BLOCK, 8
    try:
        make = lambda: TokenStream(lambda: open_documents(data), Letters(), seed=None)  # noqa: E731
        through = list(itertools.islice(pack(make(), 32), 70))
        tokens = [token for p in through for token in p.ids]
        wanted = _packed_by_hand(documents, 32)
        shared = min(len(tokens), len(wanted))
        assert shared > 2000
        assert tokens[:shared] == wanted[:shared]
        position = Position(**json.loads(json.dumps(through[25].position.as_dict())))
        again = list(itertools.islice(pack(make(), 32, position), 44))
        assert [p.ids for p in again] == [p.ids for p in through[26:]]
    finally:
        stream.BLOCK = before


def _packed_by_hand(documents: list[str], S: int) -> list[int]:
    """Tokens as sequences hold them: a single token that is left of a document at a cut predicts nothing and goes."""
    out: list[int] = []
    for text in documents:
        rest = [*map(ord, text), 0]
        while len(rest) > 1:
            room = S - len(out) % S
            out, rest = out + rest[:room], rest[room:]
    return out


def test_the_datasets_library_resumes_a_stream_exactly(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text number {i} "}) + "\n" for i in range(50)))
    before, stream.BLOCK = stream.BLOCK, 8
    try:
        make = lambda: TokenStream(lambda: open_documents(str(tmp_path / "a.jsonl")), Letters(), seed=1)  # noqa: E731
        through = list(itertools.islice(pack(make(), 32), 60))
        assert through[-1].position.epoch >= 1
        for cut in (0, 17, 40):
            position = Position(**json.loads(json.dumps(through[cut].position.as_dict())))
            again = list(itertools.islice(pack(make(), 32, position), 59 - cut))
            assert [p.ids for p in again] == [p.ids for p in through[cut + 1 :]]
    finally:
        stream.BLOCK = before


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"no file or folder \./nowhere"):
        open_documents("./nowhere")
    with pytest.raises(TrainingError, match="holds no text, JSONL or Parquet file"):
        open_documents(str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(TrainingError, match="no text in field 'text'; their text fields: body"):
        next(pack(TokenStream(lambda: open_documents(str(tmp_path / "a.jsonl")), Letters(), name="a.jsonl"), 4))
    (tmp_path / "a.jsonl").write_text('{"talk": [{"role": "user", "content": "x"}], "id": 3}\n')
    with pytest.raises(TrainingError, match=r"text fields: none; 'talk' looks like a chat.*apply_chat_template"):
        next(pack(TokenStream(lambda: open_documents(str(tmp_path / "a.jsonl")), Letters(), name="a.jsonl"), 4))


def test_what_is_wrong_with_the_documents_is_said_before_there_are_too_few_to_hold_out(tmp_path):
    def held_out(text: str) -> list[Any]:
        (tmp_path / "a.jsonl").write_text(text)
        arguments = ["--model", "m", "--dataset", str(tmp_path / "a.jsonl"), "--tokens", "8", "--batch-size", "1"]
        options = parse_options([*arguments, "--sequence-length", "8"])
        return TrainingData(options, Letters(), framing_for("causal", options, Letters())).held_out()

    with pytest.raises(TrainingError, match="no text in field 'text'; their text fields: body"):
        held_out('{"body": "x"}\n' * 5)
    with pytest.raises(TrainingError, match="shorter than one sequence"):
        held_out('{"text": "x"}\n')
    with pytest.raises(TrainingError, match="less held-out text"):
        held_out('{"text": "abcdefghijkl"}\n' * 5)


def texts_of(path, **options) -> list[str]:
    return [record["text"] for record in open_documents(str(path), **options)]


def test_packed_files_are_read_as_what_is_in_them(tmp_path):
    """JSON Lines that were packed had been trained on as text, names of fields and all."""
    import gzip

    for name, text in {"a.jsonl.gz": '{"text": "one"}\n', "b.txt.gz": "two"}.items():
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(text)
    assert texts_of(tmp_path / "a.jsonl.gz") == ["one"]
    assert texts_of(tmp_path / "b.txt.gz") == ["two"]
    assert texts_of(tmp_path) == ["one"]  # of a folder, tables come first
    with pytest.raises(TrainingError, match=r"there is no file or folder none\.jsonl\.gz"):
        open_documents("none.jsonl.gz")


def test_a_null_is_an_empty_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a b"}\n{"text": null}\n')
    stream = TokenStream(lambda: open_documents(str(tmp_path / "a.jsonl")), trained_tokenizer(), seed=None)
    assert [d.number for d in itertools.islice(stream.documents(), 2)] == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a b"}\n{"text": \n', "can't be read to its end"),
        ("b.jsonl", b'{"text": "\xfc\xfc"}\n', "can't be read to its end .*utf-8"),
        ("c.parquet", b"PAR1 and no more", "can't be read as parquet"),
        ("d.txt", b"", "is empty"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    stream = TokenStream(lambda: open_documents(str(tmp_path / name)), trained_tokenizer(), name=name)
    with pytest.raises(TrainingError, match=said) as refused:
        list(itertools.islice(stream.documents(), 9))
    assert "\n" not in str(refused.value)


def test_another_encoding_is_said_once(tmp_path, caplog):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_bytes("Prüfung".encode("latin-1"))
    stream = TokenStream(lambda: open_documents(str(tmp_path)), trained_tokenizer(), name="notes", seed=None)
    list(itertools.islice(stream.documents(), 5))
    assert [r.getMessage().split("; ")[0] for r in caplog.records] == [
        "document 0 of notes has U+FFFD in it, which stands for bytes that are not UTF-8"
    ]
