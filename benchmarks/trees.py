"""Queries of a tree (speculative decoding): all in one call, in a loop of calls of one query, and by torch.

    python benchmarks/trees.py [--quick] [--out FOLDER]       # on a GPU

Each query of a tree sees the cache and its own ancestors, so that it takes a mask. Ours goes over the keys once for up
to 64 of them. Beside it: one call for each query with its row of the mask, and torch's scaled_dot_product_attention
with the whole mask, by cuDNN and by what torch chooses itself. Everything is held against fp64 first. Times are
those of CUDA graph replays, with cold L2. Ends with a table and JSON to $OUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks import assert_conforms
from benchmarks.gpu_timing import replayed
from benchmarks.measure import DEVICE, environment, headline, limits, table, write_json
from hf_attn_patch.attn.kernels.decode import grouped_decode
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference

D = 128
#: (batch, query heads, KV heads, keys, queries)
ROWS = [
    (B, HQ, HKV, keys, queries)
    for HQ, HKV in ((32, 8), (32, 32))
    for B, keys in ((1, 8192), (1, 32768), (8, 8192))
    for queries in (17, 64)
]
QUICK = [row for row in ROWS if row[3] == 32768]


def tree(queries: int, keys: int) -> Tensor:
    """Who sees whom, bool [1, 1, queries, keys]: all of the cache, and in the tree each its ancestors.

    Query i hangs below query (i - 1) // 3; the first is the root.
    """
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    cached = keys - queries
    mask[:, :cached] = True
    for i in range(queries):
        if i:
            mask[i, cached:] = mask[(i - 1) // 3, cached:]
        mask[i, cached + i] = True
    return mask[None, None].to(DEVICE)


def ways(mask: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    options: dict[str, Any] = {"scale": D**-0.5, "causal": False}

    def decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = grouped_decode(q, k, v, mask=mask, **options)
        assert isinstance(out, Tensor)
        return out

    def one_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode(q, k, v, mask)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls = [decode(q[:, :, i : i + 1], k, v, mask[:, :, i : i + 1]) for i in range(q.shape[2])]
        return torch.cat(calls, 2)

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return chosen(q, k, v)

    return {"one call": one_call, "a loop of calls": loop, "cuDNN": cudnn, "sdpa": chosen}


def measure(row: tuple[int, int, int, int, int]) -> dict[str, Any]:
    B, HQ, HKV, keys, queries = row
    found: dict[str, Any] = dict(zip(("B", "HQ", "HKV", "keys", "queries"), row, strict=True))
    found["bytes"] = B * HKV * keys * D * 4
    sets = max(2, min(8, -(-(256 << 20) // found["bytes"])))

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(B, heads, length, D, dtype=torch.bfloat16, device=DEVICE)

    inputs = [(randn(HQ, queries), randn(HKV, keys), randn(HKV, keys)) for _ in range(sets)]
    mask = tree(queries, keys)
    q, k, v = inputs[0]
    options: dict[str, Any] = {"scale": D**-0.5, "causal": False, "mask": mask}
    low = grouped_decode_reference(q[:1], k[:1], v[:1], **options)[0]
    exact = grouped_decode_reference(q[:1].double(), k[:1].double(), v[:1].double(), **options)[0]
    for name, way in ways(mask).items():
        try:
            assert_conforms(way(q, k, v)[:1], low, exact)
            found[name] = replayed(lambda i, way=way: way(*inputs[i]), sets)  # type: ignore[misc]
        except RuntimeError as error:  # a kernel of torch's that does not take it
            found[name] = str(error).split("\n")[0][:80]
    return found


def report(result: dict[str, Any]) -> str:
    header = ["query / KV heads", "B", "keys", "queries", "one call, us", "a loop of calls", "cuDNN", "sdpa", "of copy"]
    lines = []
    for r in result["rows"]:
        times = [
            f"{r[w]:.0f}" if isinstance(r[w], float) else r[w] for w in ("one call", "a loop of calls", "cuDNN", "sdpa")
        ]
        share = r["bytes"] / r["one call"] * 1e6 / result["limits"]["copy_bytes"]
        lines.append(
            [f"{r['HQ']}/{r['HKV']}", f"{r['B']}", f"{r['keys']:,}", f"{r['queries']}", *times, f"{share:.2f}"]
        )
    return headline(result["limits"], result) + "\n\n" + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only over 32,768 keys")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {**environment(), "limits": limits(), "rows": []}
    with torch.no_grad():
        for row in QUICK if args.quick else ROWS:
            result["rows"].append(measure(row))
            print(result["rows"][-1], flush=True)
            write_json(result, args.out, "trees")
    print(report(result))


if __name__ == "__main__":
    main()
