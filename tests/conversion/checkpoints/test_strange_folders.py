"""What a stranger prepared (folders, links, what lies in them) costs a sentence, not anybody's files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from refusals import convert, refused, run


def victim(folder: Path) -> Path:
    (folder / "victim" / "out").mkdir(parents=True)
    (folder / "victim" / "out" / "mine.txt").write_text("mine")
    (folder / "victim" / "old").mkdir()
    (folder / "victim" / "old" / "mine.txt").write_text("mine")
    return folder / "victim"


def test_a_work_folder_that_is_a_link_is_refused(src: Path) -> None:
    (src.parent / ".dst.hf-attn").symlink_to(victim(src.parent))
    convert(src, words="is a link")


@pytest.mark.parametrize("name", ["out", "old", "journal.jsonl", "lock"])
def test_links_inside_a_work_folder_are_refused(name: str, src: Path) -> None:
    work = src.parent / ".dst.hf-attn"
    work.mkdir()
    (work / name).symlink_to(victim(src.parent) / ("out" if "." not in name and name != "lock" else "out/mine.txt"))
    for more in ((), ("--resume",)):
        convert(src, *more, words="was not made by a conversion")


def test_hard_links_and_strange_files_in_a_work_folder_are_refused(src: Path) -> None:
    work = src.parent / ".dst.hf-attn"
    work.mkdir()
    os.link(victim(src.parent) / "out" / "mine.txt", work / "journal.jsonl")
    convert(src, words="was not made by a conversion")
    (work / "journal.jsonl").unlink()
    (work / "thesis.tex").write_text("mine")
    convert(src, words=r"thesis.tex was not made by a conversion")


def test_overwriting_keeps_what_no_conversion_wrote(src: Path) -> None:
    dst = src.parent / "dst"
    assert run("convert", src, dst, "--kv-heads", 2, "-q").exit_code == 0
    (dst / "notes").mkdir()
    (dst / "notes" / "mine.txt").write_text("mine")
    (dst / "results.csv").write_text("mine")
    (dst / "old_tokenizer.model").write_text("mine")
    assert run("convert", src, dst, "--kv-heads", 4, "-q", "--overwrite").exit_code == 0
    for name in ("notes/mine.txt", "results.csv", "old_tokenizer.model"):
        assert (dst / name).read_text() == "mine"
    assert json.loads((dst / "config.json").read_text())["num_key_value_heads"] == 4
    assert not list(src.parent.glob(".*hf-attn"))


def test_overwriting_a_checkpoint_of_several_files_leaves_none_of_them(sharded: Path) -> None:
    dst = sharded.parent / "dst"
    assert run("convert", sharded, dst, "--kv-heads", 2, "-q").exit_code == 0
    record = json.loads((dst / "conversion.json").read_text())
    assert set(record["files"]) == {p.name for p in dst.iterdir()}
    for forget in (False, True):  # and by their names where the record is from before files were recorded
        if forget:
            (dst / "conversion.json").write_text(json.dumps({k: v for k, v in record.items() if k != "files"}))
        more = ["--overwrite", "--max-shard-size", "1GB" if not forget else "30KB"]
        assert run("convert", sharded, dst, "--kv-heads", 2, "-q", *more).exit_code == 0
        assert set(json.loads((dst / "conversion.json").read_text())["files"]) == {p.name for p in dst.iterdir()}


def test_a_kill_between_the_last_renames_loses_nothing(src: Path) -> None:
    """As it stands after the second rename: the new folder is there, the old one holds the user's file still."""
    dst, work = src.parent / "dst", src.parent / ".dst.hf-attn"
    assert run("convert", src, dst, "--kv-heads", 2, "-q").exit_code == 0
    (work / "old").mkdir(parents=True)
    (work / "old" / "config.json").write_text("{}")
    (work / "old" / "mine.txt").write_text("mine")
    assert run("convert", src, dst, "--kv-heads", 2, "-q", "--overwrite").exit_code == 0
    assert (dst / "mine.txt").read_text() == "mine"


def test_a_mount_point_is_refused_before_any_work(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (src.parent / "dst").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path).endswith("dst"))
    convert(src, words="is a mount point: give a folder inside it")


def test_what_can_be_known_at_the_start_is_said_at_the_start(src: Path) -> None:
    convert(src, "--push-to-hub", "a/b/c", words="--push-to-hub a/b/c")
    convert(src, "--private", words="--private")
    convert(src, "--kv-budget", "0.5", words="give one of them")
    refused(src.parent, "inspect", src, "--plot", src.parent / "nowhere" / "a.png", words="there is no folder")
    refused(src.parent, "convert", src, "", "--kv-heads", 2, words="DST is empty")
    plan = json.loads(run("convert", src, "--kv-heads", 2, "--dry-run", "--json").stdout)
    assert plan["disk_needed"] == plan["bytes"]["after"] + (32 << 20)


def test_an_adapter_beside_weights_is_refused(src: Path) -> None:
    (src / "adapter_config.json").write_text("{}")
    convert(src, words="weights and an adapter")


def test_git_lfs_pointers_are_named(src: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    (src / "model.safetensors").write_text(pointer)
    convert(src, words="git-LFS pointer")
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="git-LFS pointer")


def test_other_variants_indices_do_not_come_along(src: Path) -> None:
    (src / "model.safetensors.index.fp32.json").write_text("{}")
    assert run("convert", src, src.parent / "dst", "--kv-heads", 2, "-q").exit_code == 0
    assert not (src.parent / "dst" / "model.safetensors.index.fp32.json").exists()


@pytest.mark.parametrize(
    "lines",
    [
        "[]", "{}", '{"fingerprint": 3}', '{"fingerprint": "F"}\n{"job": 3}', '{"fingerprint": "F"}\n{"job": "unit 0"}',
        '{"fingerprint": "F"}\n{"job": "unit 0", "note": {"a": 1}}', '{"fingerprint": "F"}\n{"note": null}',
        '{"fingerprint": "F"}\n{"job": "details", "note": 3}', '{"fingerprint": "F"}\n' + "[" * 5000,
    ],
)  # fmt: skip
def test_damaged_journals(lines: str, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_patch.conversion import execute

    monkeypatch.setattr(execute, "fingerprint", lambda plan: "F")
    work = src.parent / ".dst.hf-attn"
    (work / "out").mkdir(parents=True)
    (work / "journal.jsonl").write_text(lines + "\n")
    done = run("convert", src, src.parent / "dst", "--kv-heads", 2, "--resume", "-q")
    assert done.exit_code in (0, 2) and "Traceback" not in done.output and isinstance(done.exception, SystemExit | None)
    if done.exit_code == 0:
        assert run("verify", src, src.parent / "dst").exit_code == 0
