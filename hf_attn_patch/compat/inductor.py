"""What torch's inductor keeps of its tuning from one process to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .ground import known


@known("torch", "how inductor finds what it tuned before (CachingAutotuner.recheck_autotune_cache)")
def find_tuned_kernels() -> None:
    """Let kernels of inductor's cache run as coordinate descent tuned them in an earlier process; for all of this one.

    torch 2.11 does not look for what was tuned where a kernel had one configuration to begin with, and tunes it anew in
    each process (https://github.com/pytorch/pytorch/issues/172819). 2.12 looks, but times a second configuration beside
    what it finds, and where that one happens to be faster tunes anew. 2.13 does neither, and is left as it is.
    """
    if torch.__version__ >= "2.13":
        return
    from torch._inductor.runtime import triton_heuristics

    autotuner: Any = triton_heuristics.CachingAutotuner
    stock = autotuner.recheck_autotune_cache
    if not hasattr(stock, "__wrapped__"):
        autotuner.recheck_autotune_cache = as_tuned(stock)


def as_tuned(stock: Callable[..., None]) -> Callable[..., None]:
    """``CachingAutotuner.recheck_autotune_cache`` for :func:`find_tuned_kernels` (torch 2.11 to 2.13).

    Args:
        stock: what is called for kernels that nobody has tuned by coordinate descent.
    """
    from torch._inductor.runtime import triton_heuristics

    @functools.wraps(stock)
    def recheck(self: Any, reload_kernel_from_src: Callable[[], Any]) -> None:
        configs = [result.config for result in self.compile_results]
        found, _, told = triton_heuristics.check_autotune_cache(configs, self.filename, self.inductor_meta)
        best: Any = found[0]
        if not getattr(best, "found_by_coordesc", False):
            stock(self, reload_kernel_from_src)
            return
        self.autotune_cache_info = told
        self.inductor_meta["dynamic_scale_rblock"] = False  # what it adds does not know that it was tuned
        known_as = triton_heuristics.triton_config_to_hashable
        same = [result for result in self.compile_results if known_as(result.config) == known_as(best)]
        if same:
            same[0].config.found_by_coordesc = True
        else:
            if self.fn.fn is None:
                self.fn = reload_kernel_from_src().fn
            same = [self._precompile_config(best)]
        self.compile_results = same[:1]

    return recheck
