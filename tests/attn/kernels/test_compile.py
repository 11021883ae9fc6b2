"""The decode kernels pass Triton's compiler for a Hopper GPU. The interpreter is less strict: it knows no types."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "helpers" / "compile_kernels.py"
SHARED = 227 * 1024  # bytes that a thread block can have on a Hopper GPU
CASES = [
    "plain", "one worker a head", "padded", "queries", "mask", "bias", "head_dim 80", "head_dim 256", "fp32",
    "pages of 16", "pages of 256", "pages and a window", "int8", "fp8", "int8 keys, fp8 values",
]  # fmt: skip

#: on GPUs from Ampere on
BIASED = ["a bias, 64", "a bias, 128", "a bias in fp32 and a mask, 64", "a bias in fp32 and a mask, 128"]
SHARED_CASES = ["shared prompt", "shared prompts, unevenly"]
#: what other cases have between them
MORE = ["padded", "int8", "a bias, 128", "a bias in fp32 and a mask, 64"]
Kernels = dict[tuple[str, str], dict[str, int]]


def marked(cases: list[str]) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow) if case in MORE else case for case in cases]


def compiled(cases: list[str], cache: Path, capability: int = 90) -> Kernels:
    """By (case, kernel), in one process."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "COMPILE_FOR": str(capability)}
    done = subprocess.run([sys.executable, str(SCRIPT), *cases], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {f["case"] for f in found} == set(cases)
    return {(f["case"], f["kernel"]): f for f in found}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    every = [case for case in (*CASES, *SHARED_CASES, *BIASED) if case not in MORE]
    return compiled(every, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def more_kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compiled(MORE, tmp_path_factory.mktemp("triton"))


@pytest.fixture
def of_case(case: str, request: pytest.FixtureRequest) -> Kernels:
    found: Kernels = request.getfixturevalue("more_kernels" if case in MORE else "kernels")
    return found


@pytest.mark.parametrize("case", marked(CASES))
def test_it_compiles_for_hopper(case: str, of_case: Kernels) -> None:
    decode = of_case[case, "decode_kernel"]
    assert 0 < decode["shared"] <= SHARED
    assert decode["copies"]  # keys arrive while others are worked on
    assert bool(decode["products"]) == (case != "fp32")  # whose products are exact, so not by tensor cores
    assert decode["waits"] == 1
    assert ((case, "combine_kernel") in of_case) == (case != "one worker a head")
    if case != "one worker a head":
        assert of_case[case, "combine_kernel"]["waits"] == 1


@pytest.mark.parametrize("case", SHARED_CASES)
def test_shared_prompts_compile_for_hopper(case: str, kernels: Kernels) -> None:
    assert kernels[case, "decode_kernel"]["products"]
    assert kernels[case, "merge_kernel"]["loads"]


@pytest.mark.parametrize("case", marked(BIASED))
@pytest.mark.parametrize("name", ["forward", "queries", "keys", "bias"])
def test_training_with_a_bias_compiles_for_hopper(case: str, name: str, of_case: Kernels) -> None:
    found = of_case[case, f"{name}_kernel"]
    assert 0 < found["shared"] <= SHARED
    assert found["products"]
    assert found["copies"]  # 16 bytes at a time, the bias too, while others are worked on
    if "mask" not in case:
        assert (
            found["loads"] <= 40
        )  # what is loaded once a program; a bias that is read number by number makes hundreds


def test_a_tile_within_one_page_asks_for_one_number(kernels: Kernels) -> None:
    small, large = (kernels[case, "decode_kernel"]["loads"] for case in ("pages of 16", "pages of 256"))
    assert large < small


OLDER = [
    "fp16", "fp16, one worker a head", "fp16, padded", "fp16, mask", "fp16, head_dim 256", "fp32", "fp16, int8",
    "fp16, fp8",
]  # fmt: skip
#: compute capability -> KiB of shared memory that a block can have there
SMALL = {70: 96, 75: 64, 80: 163, 89: 99}


@pytest.mark.parametrize("capability", [75, *(pytest.param(c, marks=pytest.mark.slow) for c in (70, 80, 89))])
def test_its_tiles_fit_into_smaller_gpus(capability: int, tmp_path: Path) -> None:
    found = compiled(OLDER + BIASED * (capability >= 80), tmp_path, capability).values()
    assert all(f["shared"] <= SMALL[capability] * 1024 and f["waits"] == 0 for f in found), found
