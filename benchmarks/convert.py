"""Speed and memory of `hf-attn convert`, beside `cp -r` and beside the usual way, on a generated checkpoint.

    python benchmarks/convert.py --layers 4            # 1.6 GB
    python benchmarks/convert.py                       # Llama-2-7B's shapes, 13 GB in bf16 (needs 40 GB of disk)

Each way runs as a process of its own, on source files that were dropped from the page cache; its time, the time until
its output is on the disk, and its peak memory are measured from outside. No speed is reported before `hf-attn verify`
has found the output right.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

USUAL_WAY = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
src, dst, kv_heads = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(src, dtype="auto")
config = model.config
state = model.state_dict()
for name, tensor in state.items():
    if "k_proj" in name or "v_proj" in name:
        heads = tensor.float().view(kv_heads, -1, config.head_dim, tensor.shape[-1])
        state[name] = heads.mean(1).flatten(0, 1).to(tensor.dtype)
config.num_key_value_heads = kv_heads
torch.set_default_dtype(model.dtype)
with torch.device("meta"):
    new = AutoModelForCausalLM.from_config(config)
new.load_state_dict(state, assign=True)
new.save_pretrained(dst, max_shard_size="5GB")
"""


def generate(folder: Path, *, layers: int, hidden: int, intermediate: int, heads: int, shard_bytes: int) -> int:
    """Write a Llama checkpoint of random bf16 weights, a few megabytes at a time; returns its bytes."""
    import torch

    from hf_attn_patch.conversion.checkpoints.safetensors_header import build_header, tensor_nbytes

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, hidden)}
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (32000, hidden)}
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size and size + tensor_nbytes("BF16", shape) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = ("BF16", shape)
        size += tensor_nbytes("BF16", shape)
    # one block of random numbers, cut at another place each time, so that no two tensors are alike
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(24 << 20, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()
    folder.mkdir(parents=True)
    weight_map, total, number = {}, 0, 0
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        head, _ = build_header(shard, {"format": "pt"})
        with open(folder / file_name, "wb") as file:
            file.write(head)
            for name, (dtype, shape) in shard.items():
                weight_map[name] = file_name
                left = tensor_nbytes(dtype, shape)
                total += left
                while left:
                    number += 1
                    start = number * 514229 % (block.size // 4) * 2
                    part = block[start : start + min(left, block.size // 2)]
                    file.write(part.data)
                    left -= part.size
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "dtype": "bfloat16",
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "vocab_size": 32000,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def drop_from_cache(folder: Path) -> None:
    """Write a folder's files to the disk and forget their pages."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(command: list[str], src: Path, dst: Path) -> dict[str, float]:
    """Seconds of a command, seconds more until its output is on the disk, and its peak memory in GB."""
    shutil.rmtree(dst, ignore_errors=True)
    drop_from_cache(src)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}")
    drop_from_cache(dst)
    return {
        "seconds": seconds,
        "on_disk": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-usual", action="store_true", help="leave out the way that holds the whole model")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    best = {name: min(found, key=lambda run: run["seconds"]) for name, found in runs.items()}
    base = best["cp -r"]
    base_disk = min(found["on_disk"] for found in runs["cp -r"])
    print("| way | s | of cp | s until on disk | of cp | CPU s | peak GB |\n|---|---|---|---|---|---|---|")
    for name, run in best.items():
        disk = min(found["on_disk"] for found in runs[name])
        print(
            f"| {name} | {run['seconds']:.1f} | {run['seconds'] / base['seconds']:.2f} | {disk:.1f} "
            f"| {disk / base_disk:.2f} | {run['cpu_seconds']:.1f} | {max(r['peak_gb'] for r in runs[name]):.2f} |"
        )


def main() -> None:
    options = parsed()
    root = Path(tempfile.mkdtemp(prefix="hf-attn-bench-", dir=options.folder))
    try:
        src, dst = root / "src", root / "dst"
        shapes = {name: getattr(options, name) for name in ("layers", "hidden", "intermediate", "heads")}
        # in a process of its own: a child's peak memory as the system counts it starts at its parent's
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            total = pool.submit(generate, src, **shapes, shard_bytes=int(options.shard_gb * 1e9)).result()
        hf_attn = [sys.executable, "-c", "from hf_attn_patch.cli import main; main()"]
        convert = [
            *hf_attn,
            "convert",
            str(src),
            str(dst),
            "--kv-heads",
            str(options.kv_heads),
            "--method",
            "mean",
            "--quiet",
        ]
        ways = {
            "cp -r": ["cp", "-r", str(src), str(dst)],
            "hf-attn convert": convert,
            f"hf-attn convert --workers {options.workers}": [*convert, "--workers", str(options.workers)],
        }
        if not options.skip_usual:
            usual = [sys.executable, "-c", USUAL_WAY, str(src), str(dst), str(options.kv_heads)]
            ways["load, pool, save_pretrained"] = usual
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(options.repeats):
            for name, command in ways.items():
                runs[name].append(measure(command, src, dst))
                if number == 0 and name != "cp -r" and name.startswith("hf-attn"):
                    subprocess.run([*hf_attn, "verify", str(src), str(dst)], check=True, stdout=subprocess.DEVNULL)
        print(f"{total / 1e9:.1f} GB, {options.heads} -> {options.kv_heads} KV heads, best of {options.repeats}\n")
        show(runs)
        if options.json:
            options.json.write_text(json.dumps({"bytes": total, "runs": runs}, indent=2))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
