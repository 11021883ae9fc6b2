"""The method ``calibrated`` for models that see: heads are merged by what layers read on pictures.

Pictures go through the checkpoint's own image processor and the original model, a few at a time, and the moments of
what each attention reads are summed; or layers are fitted on them one after the other (:mod:`.calibrated`).

Shapes: N pictures, C channels, H x W pixels, S tokens of a caption.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.methods.aligned import Aligned
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.pictures import Picture, pictures
from hf_attn_patch.errors import ConversionError, TrainingError, one_line

from .gather import parse_sources
from .layers import load, readers
from .meaningless import noise, send
from .moments import Sum
from .samples import Samples
from .text import tokenizer_of

#: pictures at most, and how many go through the model at a time
COUNT, BATCH = 256, 16


def seen(plan: Plan, calibrate: str, count: int | None, *, group: str | None, device: torch.device) -> Aligned:
    """A merge of whole layers by what they read on pictures. ``record`` tells which, and what was left out.

    Args:
        calibrate: image files, folders and data sets by shares, see :func:`~.gather.parse_sources`.
        count: pictures at most.

    Raises:
        ConversionError: there are none, they cannot be read, or the model cannot run on them.
    """
    merge = Aligned(plan, group or "adjacent")
    found, parts = _found(plan, calibrate, count)
    model = load(plan).to(device)
    reads = [(unit, Sum()) for unit in plan.units]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for unit, total in reads:
            hook = readers(model, plan, unit.layer)[0].register_forward_pre_hook(total.add)
            stack.callback(hook.remove)
        body = getattr(model, model.base_model_prefix, model)
        for batch in progress_bar(_batches(plan, model, found), desc="calibrating", unit="batch"):
            send(body, batch, "the pictures")
    for unit, total in reads:
        moment, note = total.result()
        if note:
            merge.record["notes"].append(f"{unit.layer.prefix.rstrip('.')}: {note}")
        if moment is not None:
            merge.moments[unit.layer.prefix] = moment.cpu()
    captions = sum(picture.text is not None for picture in found)
    merge.record["calibration"] = {
        "source": calibrate, "seed": plan.seed, "parts": parts, "samples": len(found), "captions": captions,
    }  # fmt: skip
    merge.record["notes"].append("heads were merged by what layers read on pictures; nothing was fitted after that")
    if plan.family.reads == "pictures and text" and not captions:
        merge.record["notes"].append(
            "no picture has a caption beside it, so the text tower's heads were merged by what it reads of random ids"
        )
    merge.record["notes"] += _few(len(found), count)
    return merge


def pictured(plan: Plan, model: Any, calibrate: str, count: int | None) -> Samples:
    """Pictures as a model's layers are fitted on them.

    Args:
        model: the original.
        calibrate, count: see :func:`seen`.
    """
    found, parts = _found(plan, calibrate, count)
    batches = [given["pixel_values"] for given in _batches(plan, model, found)]
    try:
        pixels = torch.cat(batches)
    except RuntimeError:
        raise ConversionError(
            "layers are fitted on pictures of one size, and the image processor leaves theirs as they are; give"
            " pictures of one size, or --no-refit"
        ) from None
    about = {"source": calibrate, "seed": plan.seed, "parts": parts, "samples": len(found), "captions": 0}
    return Samples([pixels], about, _few(len(found), count))


def _found(plan: Plan, calibrate: str, count: int | None) -> tuple[list[Picture], dict[str, int]]:
    """The pictures of all sources, and how many are of each."""
    wanted = COUNT if count is None else count
    found, parts = [], {}
    for name, share in parse_sources(calibrate):
        some = list(_taken(name, plan.seed, max(1, round(share * wanted))))
        parts[name] = len(some)
        found += some
    return found, parts


def _few(found: int, count: int | None) -> list[str]:
    wanted = min(COUNT if count is None else count, 64)
    return [f"only {found} pictures to calibrate on; more give a better model"] if found < 0.9 * wanted else []


def _taken(name: str, seed: int, count: int) -> list[Picture]:
    found = []
    try:
        for picture in pictures(name, seed):
            found.append(picture)
            if len(found) == count:
                break
    except TrainingError as error:
        raise ConversionError(f"--calibrate: {error}") from None
    if not found:
        raise ConversionError(f"--calibrate {name} holds no picture")
    return found


def _batches(plan: Plan, model: Any, found: list[Picture]) -> Iterator[dict[str, Tensor]]:
    """What the model is called with, some pictures at a time; captions, or random ids, where it reads text too."""
    processor = processor_of(plan)
    dtype, both = next(model.parameters()).dtype, plan.family.reads == "pictures and text"
    for start in range(0, len(found), BATCH):
        some = found[start : start + BATCH]
        pixels = processor([picture.image for picture in some], return_tensors="pt")["pixel_values"]
        given = {"pixel_values": pixels.to(model.device, dtype)}
        if both:
            ids = _captions(plan, [picture.text for picture in some if picture.text is not None])
            given["input_ids"] = (noise(plan, model)["input_ids"] if ids is None else ids).to(model.device)
        yield given


def processor_of(plan: Plan) -> Any:
    """The checkpoint's own image processor."""
    import transformers

    folder = str(plan.source.folder)
    try:
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except ImportError:  # up to transformers 5.23 that door asks for torchvision, which the classes do not need
            config, _ = transformers.BaseImageProcessor.get_image_processor_dict(folder)
            name = str(config.get("image_processor_type")).removesuffix("Fast")
            found = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
            return found.from_pretrained(folder)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConversionError(
            f"--calibrate: {plan.source.name} has no image processor that can be loaded ({one_line(error)}); put"
            " preprocessor_config.json beside the weights"
        ) from None


def _captions(plan: Plan, texts: list[str]) -> Tensor | None:
    """Captions [N, S], each cut to the shortest's length: a causal tower reads the beginning as it reads the whole."""
    if not texts:
        return None
    tokenizer, most = tokenizer_of(plan), int(plan.config.get_text_config().max_position_embeddings)
    rows = [tokenizer(text, truncation=True, max_length=most)["input_ids"] for text in texts]
    length = min(map(len, rows))
    return torch.tensor([row[:length] for row in rows])
