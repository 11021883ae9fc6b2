"""What a layer's attention call costs in Python: ours against transformers' ``sdpa_attention_forward``.

    python benchmarks/glue.py [--device cuda] [--json FILE]

B = 1 and a short context, so that the kernels themselves take almost no time; the median of many calls, in
microseconds, both implementations in turns. On the GPU the time until the call returns (launches are asynchronous).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_attn_patch
from hf_attn_patch.hf.attention_function import attention_forward

SHAPES = {  # name: (HQ, HKV, Sq, Sk)
    "decode MHA": (8, 8, 1, 64),
    "decode GQA": (8, 2, 1, 64),
    "decode GQA, masked": (8, 2, 1, 64),
    "prefill GQA": (8, 2, 32, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows = []
    for name, (HQ, HKV, Sq, Sk) in SHAPES.items():
        q = torch.randn(1, HQ, Sq, 64, device=args.device, dtype=dtype)
        k, v = (torch.randn(1, HKV, Sk, 64, device=args.device, dtype=dtype) for _ in range(2))
        module: Any = torch.nn.Module().eval()  # as a model is that generates
        module.is_causal, module.num_key_value_groups, module.layer_idx = True, HQ // HKV, 0
        mask = torch.ones(1, 1, Sq, Sk, dtype=torch.bool, device=args.device) if "masked" in name else None
        functions = {"sdpa": sdpa_attention_forward, "ours": attention_forward}
        with torch.no_grad():
            outs = [f(module, q, k, v, mask, scaling=0.125)[0] for f in functions.values()]
            torch.testing.assert_close(*outs, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
            times: dict[str, list[float]] = {n: [] for n in functions}
            for call in range(args.calls):
                for label, function in functions.items():
                    start = time.perf_counter()
                    function(module, q, k, v, mask, scaling=0.125)
                    times[label].append(time.perf_counter() - start)
                if call % 50 == 0 and args.device == "cuda":
                    torch.cuda.synchronize()
        medians = {label: statistics.median(t) * 1e6 for label, t in times.items()}
        rows.append({"case": name, **medians})
        print(f"{name:<20} sdpa {medians['sdpa']:6.1f} us   ours {medians['ours']:6.1f} us")
    if args.json:
        with open(args.json, "w") as file:
            versions = {m.__name__: m.__version__ for m in (torch, transformers, hf_attn_patch)}
            json.dump({"device": args.device, "versions": versions, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
