"""Calibration on pictures: what files and data sets give, and what a tiny ViT and CLIP lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import trained_tokenizer
from zoo_cases import BY_NAME, output

from hf_attn_patch.conversion import ConversionError, convert, plan
from hf_attn_patch.conversion.calibration.sight import processor_of, seen
from hf_attn_patch.conversion.methods.align import merge_aligned
from hf_attn_patch.conversion.methods.apply import to_heads
from hf_attn_patch.documents.pictures import pictures
from hf_attn_patch.errors import TrainingError

Image = pytest.importorskip("PIL.Image")


def drawn(seed: int, size: int = 16) -> Any:
    """Coloured stripes: few directions of what pixels can be, as in real pictures."""
    draw = torch.Generator().manual_seed(seed)
    wave = torch.sin(torch.arange(size) * (0.2 + torch.rand(1, generator=draw)) + 6 * torch.rand(1, generator=draw))
    colour = torch.rand(3, generator=draw)
    pixels = (127 + 120 * wave[None, :, None] * colour).expand(size, size, 3)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def write(folder: Path, seeds: range, captions: bool = False) -> Path:
    folder.mkdir()
    for seed in seeds:
        drawn(seed).save(folder / f"{seed:03d}.png")
        if captions:
            (folder / f"{seed:03d}.txt").write_text(f"def stripes number {seed} import colour\n")
    return folder


def made(stock: str, folder: Path) -> Path:
    more: dict[str, Any] = {}
    if stock == "clip":
        known = BY_NAME["clip"].config["text_config"]
        more = {"text_config": {**known, "vocab_size": 512}}
    BY_NAME[stock].make(None, **more).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def test_files_and_data_sets_with_captions(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", range(3), captions=True)
    found = {Path(p.name).name: p for p in pictures(str(folder))}
    assert found["001.png"].text == "def stripes number 1 import colour" and found["001.png"].image.size == (16, 16)
    datasets = pytest.importorskip("datasets")
    files = [str(f) for f in sorted(folder.glob("*.png"))]
    table = datasets.Dataset.from_dict({"image": files, "caption": ["one", "", "three"]})
    table.cast_column("image", datasets.Image(decode=False)).save_to_disk(str(tmp_path / "set"))
    again = list(pictures(str(tmp_path / "set")))
    assert [p.text for p in again] == ["one", None, "three"]
    assert list(again[2].image.getdata()) == list(found["002.png"].image.getdata())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(TrainingError, match="cannot be read as a picture"):
        list(pictures(str(tmp_path / "broken.png")))
    with pytest.raises(TrainingError, match="is no picture"):
        list(pictures(str(folder / "000.txt")))


def test_heads_are_merged_by_what_transformers_gives_the_layers(tmp_path: Path) -> None:
    """The moments of a plain forward's hidden states on what the processor makes of the pictures."""
    src = made("vit", tmp_path / "src")
    folder = write(tmp_path / "pictures", range(20))
    ready = plan(src, 2, method="calibrated", calibrate=str(folder))
    merge = seen(ready, str(folder), None, group=None, device=torch.device("cpu"))
    assert merge.record["calibration"]["samples"] == 20
    model = transformers.AutoModelForImageClassification.from_pretrained(src)
    pixels = processor_of(ready)([drawn(i) for i in range(20)], return_tensors="pt")
    with torch.no_grad():
        states = model(**pixels, output_hidden_states=True).hidden_states
    layers = [module for name, module in model.named_modules() if name.endswith("layernorm_before")]
    for unit, norm, state in zip(ready.units, layers, states, strict=False):
        with torch.no_grad():
            x = norm(state).flatten(0, 1).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        weights = to_heads(unit, {n: ready.source.read(n) for n in unit.reads})
        got, want = merge(weights), merge_aligned(weights, moment=merge.moments[unit.layer.prefix])
        assert got.k is not None and want.k is not None
        torch.testing.assert_close(got.k, want.k)
        plain = x.T @ x / len(x)
        mixed = merge.moments[unit.layer.prefix]
        share = 1 - float(mixed[0, 1] / plain[0, 1])  # a moment that lacks rank is mixed with the identity
        torch.testing.assert_close(mixed[0, 1:-1], (1 - share) * plain[0, 1:-1], atol=1e-5, rtol=1e-3)
        assert -1e-6 < share < 32 / (32 + len(x)) + 1e-3


@pytest.mark.parametrize("stock", ["vit", "clip"])
def test_less_is_lost_than_without_pictures(stock: str, tmp_path: Path) -> None:
    case, src = BY_NAME[stock], made(stock, tmp_path / "src")
    folder = write(tmp_path / "pictures", range(48), captions=True)
    heads = {"vision": 1} if stock == "clip" else 1
    record = convert(src, tmp_path / "calibrated", heads, calibrate=str(folder))["details"]
    assert record["calibration"]["captions"] == 48
    for method in ("aligned", "mean"):
        convert(src, tmp_path / method, heads, method=method)
    processor = processor_of(plan(src, 1, method="mean"))
    feed = dict(processor([drawn(900 + i) for i in range(16)], return_tensors="pt"))
    if stock == "clip":
        words = trained_tokenizer()(["def stripes number 5 import colour"] * 16)["input_ids"]
        feed["input_ids"] = torch.tensor(words)
    kind = getattr(transformers, case.auto)
    with torch.no_grad():
        folders = ("src", "calibrated", "aligned", "mean")
        said = {f: output(kind.from_pretrained(tmp_path / f).eval(), feed) for f in folders}
    lost = {f: float((x - said["src"]).square().mean()) for f, x in said.items()}
    assert lost["calibrated"] < 0.7 * min(lost["aligned"], lost["mean"])


def made_tower(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stock", ["vit", "clip_vision_model"])
def test_layers_are_fitted_on_pictures(stock: str, tmp_path: Path) -> None:
    """On other pictures far less is lost than by the merge."""
    src = made("vit", tmp_path / "src") if stock == "vit" else made_tower(tmp_path / "src")
    folder = write(tmp_path / "pictures", range(96))
    record = convert(src, tmp_path / "fitted", 1, calibrate=str(folder), refit=True)["details"]
    assert record["refit"] and record["calibration"]["samples"] == 96
    assert record["layers"] and all(found["refitted"] <= found["error"] for found in record["layers"].values())
    convert(src, tmp_path / "merged", 1, calibrate=str(folder), refit=False)
    pixels = processor_of(plan(src, 1, method="mean"))([drawn(900 + i) for i in range(16)], return_tensors="pt")
    said = {}
    for name in ("src", "fitted", "merged"):
        model = transformers.AutoModel.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            said[name] = model(**pixels).last_hidden_state
    lost = {name: float((x - said["src"]).square().mean()) for name, x in said.items()}
    assert lost["fitted"] < 0.9 * lost["merged"]


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    src, folder = made("vit", tmp_path / "src"), write(tmp_path / "pictures", range(2))
    (tmp_path / "empty").mkdir()
    for match, calibrate, more in (
        ("no text, JSONL or Parquet", tmp_path / "empty", {}),
        ("at least 1", folder, {"calibration_samples": 0}),
        ("merged alone", folder, {"polish": 1000}),
    ):
        with pytest.raises(ConversionError, match=match):
            convert(src, tmp_path / "dst", 2, calibrate=str(calibrate), **dict[str, Any](more))
    (src / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match=r"preprocessor_config\.json"):
        convert(src, tmp_path / "dst", 2, calibrate=str(folder))
    made("clip", tmp_path / "clip")
    with pytest.raises(ConversionError, match="vision tower converted by itself"):
        convert(tmp_path / "clip", tmp_path / "dst", 2, calibrate=str(folder), refit=True)
    record = convert(tmp_path / "clip", tmp_path / "dst", 2, calibrate=str(folder))
    assert any("random ids" in note for note in record["details"]["notes"])
