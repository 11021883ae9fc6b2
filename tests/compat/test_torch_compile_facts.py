"""What torch.compile says of its own work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_attn_patch.compat.inductor import as_tuned, find_tuned_kernels
from hf_attn_patch.compat.torch import compile_facts


def test_what_a_compilation_adds() -> None:
    torch._dynamo.reset()
    before = compile_facts()
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    compiled(torch.ones(3))
    once = compile_facts()
    assert once["tracing_seconds"] > before["tracing_seconds"]
    assert once["all_seconds"] - before["all_seconds"] >= once["tracing_seconds"] - before["tracing_seconds"]
    assert once["not_found"] == before["not_found"]  # inductor was not asked
    compiled(torch.ones(3))
    assert compile_facts() == once


def config(XBLOCK: int) -> Any:
    from torch._inductor.runtime.triton_compat import Config

    return Config({"XBLOCK": XBLOCK}, num_warps=4, num_stages=1)


def a_kernel(file: Path, *blocks: int) -> Any:
    """As inductor's cache holds one: compiled for these configurations."""

    def compiled(one: Any) -> Any:
        return SimpleNamespace(config=one)

    return SimpleNamespace(
        compile_results=[compiled(config(block)) for block in blocks],
        filename=str(file),
        inductor_meta={"coordinate_descent_tuning": True},
        fn=SimpleNamespace(fn=None),
        _precompile_config=compiled,
    )


@pytest.mark.parametrize("blocks", [(1,), (1, 2)], ids=["one", "two"])
@pytest.mark.parametrize("best", [1, 8])
def test_kernels_of_the_cache_run_as_they_were_tuned(
    blocks: tuple[int, ...], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 tunes what had one configuration again in each process."""
    pytest.importorskip("triton")
    from torch._inductor.runtime.autotune_cache import AutotuneCache
    from torch._inductor.runtime.triton_heuristics import hash_configs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    stock: list[Any] = []
    recheck = as_tuned(lambda *args: stock.append(args))

    def reload() -> Any:
        return SimpleNamespace(fn=SimpleNamespace(fn="its source"))

    kernel = a_kernel(tmp_path / "kernel.py", *blocks)
    recheck(kernel, reload)  # nobody has tuned it
    assert stock == [(kernel, reload)]
    assert [result.config.kwargs["XBLOCK"] for result in kernel.compile_results] == list(blocks)

    cache = AutotuneCache.create(kernel.inductor_meta, kernel.filename, hash_configs([config(b) for b in blocks]))
    assert cache is not None
    cache.save(config(best), 0, found_by_coordesc=True)
    recheck(kernel, reload)
    assert len(stock) == 1
    (result,) = kernel.compile_results
    assert result.config.kwargs == {"XBLOCK": best}
    assert result.config.found_by_coordesc  # else it would be tuned when it runs
    assert kernel.fn.fn == ("its source" if best == 8 else None)  # what was compiled already needs no source
    assert kernel.inductor_meta["dynamic_scale_rblock"] is False


def test_what_torch_does_by_itself_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch.torch_version import TorchVersion

    stock = CachingAutotuner.recheck_autotune_cache
    for version, replaced in (("2.13.0+cpu", False), ("2.11.0+cu130", True)):
        with monkeypatch.context() as patch:
            patch.setattr(CachingAutotuner, "recheck_autotune_cache", stock)
            patch.setattr(torch, "__version__", TorchVersion(version))
            for _ in range(2):  # once is enough
                find_tuned_kernels()
                found = CachingAutotuner.recheck_autotune_cache
                assert getattr(found, "__wrapped__", None) is (stock if replaced else None)
