"""The numbers behind the ladder: files that are read, files that are refused, and what a tuning finds."""

from __future__ import annotations

import json
import math
import pwd
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_attn_patch import AttentionError, attention
from hf_attn_patch.attn import crossovers
from hf_attn_patch.attn.backends.registry import BACKENDS
from hf_attn_patch.attn.crossovers import SHIPPED, Crossovers, read, tuning_file, using, write
from hf_attn_patch.attn.ladder import order
from hf_attn_patch.attn.request import request_for
from hf_attn_patch.attn.tuning import tuned
from hf_attn_patch.cli import main

GPU = "NVIDIA H200"


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "numbers.json"
    numbers = Crossovers(33, 16, 200)
    write(path, GPU, numbers)
    assert read(path, GPU) == numbers
    assert [p.name for p in path.parent.iterdir()] == ["numbers.json"]


def broken(**changes: Any) -> str:
    return json.dumps({"format": 1, "gpu": GPU, "torch": "2.13", "crossovers": vars(SHIPPED), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[1, 2]", "is not a tuning file of format 1"),
        ("{}", "is not a tuning file of format 1"),
        (broken(format=2), "is not a tuning file of format 1"),
        (broken(gpu="NVIDIA A100"), "was measured on 'NVIDIA A100', not on 'NVIDIA H200'"),
        (broken(crossovers={"decode_rows": 1}), "wrong are filling_streams, small_work_bits"),
        (broken(crossovers={**vars(SHIPPED), "more": 1}), "wrong are more"),
        (broken(crossovers={**vars(SHIPPED), "decode_rows": "64"}), "wrong are decode_rows"),
        (broken(crossovers={**vars(SHIPPED), "decode_rows": -1}), "wrong are decode_rows"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(AttentionError, match="hf-attn bench --tune") as caught:
        read(path, GPU)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_each_gpu_has_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_ATTN_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_file(GPU) == tmp_path / "hf_attn_patch" / "crossovers-NVIDIA-H200.json"
    monkeypatch.setenv("HF_ATTN_TUNING", "/elsewhere.json")
    assert tuning_file(GPU) == Path("/elsewhere.json")


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's user whom /etc/passwd does not know: attention asks for the file at each new kind of call."""
    for name in ("HF_ATTN_TUNING", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", dict[int, Any]().__getitem__)
    monkeypatch.chdir(tmp_path)
    assert not tuning_file(GPU).exists()


def test_the_file_of_this_gpu_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ATTN_TUNING", str(tmp_path / "numbers.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    crossovers._of_this_machine.cache_clear()
    try:
        assert crossovers.crossovers() == SHIPPED
        write(tmp_path / "numbers.json", GPU, Crossovers(1, 2, 3))
        assert crossovers.crossovers() == Crossovers(1, 2, 3)
    finally:
        crossovers._of_this_machine.cache_clear()


def crossing(small: int, rows: int, streams: int) -> Any:
    """Times by which FlashAttention-4 wins from these crossovers on, and not before."""

    def measure(backend: str, B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int) -> float:
        if backend == "flash4":
            return 1.0
        if backend == "torch_sdpa":
            return 0.5 if (B * HQ * Sq * Sk * D).bit_length() <= small else 2.0
        return 2.0 if HQ // HKV * Sq > rows and B * HKV >= streams else 0.5

    return measure


@pytest.mark.parametrize(("small", "rows", "streams"), [(31, 32, 128), (33, 16, 32), (27, 48, 256)])
def test_tuning_finds_where_the_backends_cross(small: int, rows: int, streams: int) -> None:
    assert tuned(crossing(small, rows, streams)) == Crossovers(small, rows, streams)


@pytest.mark.parametrize(("rows", "streams"), [(32, 128), (16, 32), (48, 256)])
def test_without_flash_attention_4_torchs_kernel_is_the_rival(
    rows: int, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(backend: str, B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int) -> float:
        assert backend in ("triton_decode", "torch_sdpa")
        if backend == "torch_sdpa":
            return 1.0
        return 2.0 if HQ // HKV * Sq > rows and B * HKV >= streams else 0.5

    found = tuned(measure, "torch_sdpa")
    assert found == Crossovers(SHIPPED.small_work_bits, rows, streams)
    many = request_for(32, 32, 8, 16, 8192, 128)._replace(device="cuda", capability=80, dtype=torch.bfloat16)
    monkeypatch.setattr("hf_attn_patch.attn.backends.flash4.missing", lambda: "not installed")
    assert order(many)[:2] == ("flash4", "triton_decode")  # never tuned: what was measured on another GPU
    with using(found):
        assert order(many)[0] == "torch_sdpa"
        assert order(many._replace(visibility="dense"))[:2] == ("flash4", "triton_decode")
        assert order(many._replace(rows=4))[0] == "triton_decode"


def test_it_is_said_when_this_gpu_was_never_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert torch.cuda.is_available() or crossovers.never_tuned() is None
    monkeypatch.setenv("HF_ATTN_TUNING", str(tmp_path / "numbers.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    said = crossovers.never_tuned() or ""
    assert "never tuned for Tesla T4: the order of the backends is that of an NVIDIA H200" in said
    write(tmp_path / "numbers.json", "Tesla T4", Crossovers(1, 2, 3))
    assert crossovers.never_tuned() is None
    (tmp_path / "numbers.json").unlink()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    assert crossovers.never_tuned() is None


def test_tuning_where_one_always_wins() -> None:
    never = tuned(crossing(0, 10**9, 0))
    assert never.small_work_bits == 0
    assert never.decode_rows == 64
    assert never.filling_streams > 10**6


def test_tuning_leaves_nothing_behind() -> None:
    q = torch.randn(1, 2, 3, 8)
    attention(q, q, q)
    with pytest.raises(ZeroDivisionError):
        tuned(lambda *_: 1 / 0)
    assert crossovers._forced.get() is None
    assert torch.isfinite(attention(q, q, q)).all()


def test_the_ladder_follows_the_numbers() -> None:
    def first(Sq: int, Sk: int, B: int = 16) -> str:
        request = request_for(B, 32, 8, Sq, Sk, 128)._replace(
            device="cuda", capability=90, dtype=torch.bfloat16, causal=True
        )
        return order(request)[0]

    with using(Crossovers(small_work_bits=31, decode_rows=32, filling_streams=96)):
        assert first(4, 8192) == first(8, 8192) == "triton_decode"
        assert first(16, 8192) == "flash4"  # 64 rows over 128 KV heads
        assert first(16, 8192, B=4) == "triton_decode"  # over 32
        assert first(64, 64, B=1) == "torch_sdpa"
        assert first(4096, 4096) == "flash4"
    with using(Crossovers(small_work_bits=0, decode_rows=64, filling_streams=96)):
        assert first(16, 8192) == "triton_decode"
        assert first(64, 64, B=1) == "flash4"


def test_inside_a_compiled_graph_nothing_is_asked_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> Crossovers:
        raise AssertionError("torch.compile cannot trace this")

    monkeypatch.setattr(crossovers, "_of_this_machine", never)
    for q_len in (1, 9, 40):
        request = request_for(16, 32, 8, q_len, 8192, 128)._replace(device="cuda", capability=90, dtype=torch.bfloat16)
        assert order(request._replace(tracing=True, rows=0, work_bits=-1))


def test_bench_lists_every_backend_and_its_time() -> None:
    result = CliRunner().invoke(main, ["bench", "--json"])
    assert result.exit_code == 0, result.output
    lines = json.loads(result.output)
    assert {line["backend"] for line in lines} == set(BACKENDS)
    for line in lines:
        assert (line["reason"] is None) == ("us" in line)
        assert "us" not in line or (math.isfinite(line["us"]) and line["us"] > 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    result = CliRunner().invoke(main, ["bench", "--tune"])
    assert result.exit_code == 2
    assert "nothing to tune without a GPU" in result.output
