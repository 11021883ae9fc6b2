"""A bound on the memory that a conversion takes beside the programs: what is allocated, not what files are mapped."""

from __future__ import annotations

import math
import re

from hf_attn_patch.conversion.checkpoints.safetensors_header import DTYPE_BITS
from hf_attn_patch.conversion.plan_data import Plan

#: what is freed is not given back at once, and blocks are larger than what is in them
SLACK = 1.25


def memory_needed(plan: Plan, workers: int = 1) -> int:
    """Bytes at most: the largest units, read, in fp32 and as they are written; what calibration takes, too.

    Args:
        workers: units that are computed at the same time.
    """
    from hf_attn_patch.conversion.checkpoints.writer import CHUNK

    largest = 0
    for unit in plan.units:
        read = plan.unit_inputs(unit)
        widths = [_itemsize(plan, name) for name in unit.reads]
        largest = max(largest, read + 3 * read * max(4, *widths) // min(widths))
    units = max(largest, CHUNK) * workers
    if plan.method.runs and plan.units:
        return units + _of_one_pass(plan)
    return units + (calibration_memory(plan) if plan.method.name == "calibrated" and plan.units else 0)


def calibration_memory(plan: Plan) -> int:
    """Bytes that the method ``calibrated`` takes at most, on whatever device layers run.

    The model itself is mapped, but for experts, which transformers puts together while it loads them. Beside it stand
    a layer of the original and one of the result in fp32, and while its attention is fitted a copy, gradients and
    Adam's moments (while heads are merged, matrices in fp64); hidden states of both models; the activations of a batch.
    """
    if plan.family.reads == "sound":
        return _of_sound(plan)
    from .choice import TOKENS
    from .collect import ENCODER_LENGTH, LENGTH, PAIR_LENGTH
    from .polish import CPU_CHUNK
    from .refit import RefitRecipe

    layer, attention, side = map(max, zip(*(_sizes(plan, name) for name in _layers(plan)), strict=True))
    experts = getattr(plan.text_config, "num_experts_per_tok", None) or 0
    # a product with several experts' matrices copies them
    weights = 4 * ((3 if experts else 2) * layer + 8 * attention)

    first = plan.units[0].layer
    tokens = int(plan.options["calibration_tokens"] or TOKENS)
    both = bool(plan.config.is_encoder_decoder)
    pairs = both and not plan.answers
    longest = PAIR_LENGTH if pairs else LENGTH if first.stack.causal and not both else ENCODER_LENGTH
    batch = max(plan.options["calibration_length"] or longest, min(RefitRecipe.batch_tokens, tokens // 16))
    if pairs:  # the larger side's share of a sequence (see pairs.py)
        share = 0.9 if "t5" in plan.model_type else 0.5
        tokens, batch = round(share * tokens), round(share * batch)
    # an encoder's are still there while the decoder's are made
    streams = (6 if both else 2) * tokens * first.width * max(_itemsize(plan, name) for name in plan.units[0].reads)

    # numbers a token, measured: Llama up to 34 times the width and 5.6 times the MLP's; GPT-2, whose GELU is several
    # operations, 18 times the MLP's; experts read copies of their rows
    width, mlp = max(first.width, first.heads * first.head_dim), _mlp(plan, side)
    activations = 4 * batch * (40 * width + (experts * (mlp + 12 * width) if experts else mlp))
    loaded = _put_together(plan)
    # on held-out text: chunks of logits in fp32, of both models, and what is made of them
    logits = 8 * 4 * CPU_CHUNK if plan.speaks else 0
    return int(SLACK * (loaded + weights + streams + max(activations, logits)))


def _of_one_pass(plan: Plan) -> int:
    """As :func:`calibration_memory`, of the method ``aligned``: what attentions read on random inputs, kept, and the
    activations of that one pass."""
    from .meaningless import KEPT, LENGTH, ROWS

    size = max(_itemsize(plan, name) for name in plan.units[0].reads)
    first, side = plan.units[0].layer, max(_sizes(plan, name)[2] for name in _layers(plan))
    read = sum((2 if unit.layer.stack.cross else 1) * unit.layer.width for unit in plan.units)
    rows = ROWS * LENGTH
    if plan.family.reads == "sound":
        rows = 2 * int(plan.config.max_source_positions)
    return int(SLACK * (_put_together(plan) + size * KEPT * read + 4 * rows * (12 * first.width + 3 * side)))


def _put_together(plan: Plan) -> int:
    """Bytes of experts, of which transformers makes larger tensors while it loads them."""
    return sum(t.nbytes for name, t in plan.source.tensors.items() if re.search(r"\.experts\.\d+\.", name))


def _of_sound(plan: Plan) -> int:
    """As :func:`calibration_memory`: recordings as features and as the encoder's output, both models in fp32, and the
    activations of a batch, most of which are keys and values of the encoder's output."""
    from .refit import RefitRecipe
    from .sound import COUNT, LENGTH

    config, size = plan.config, _itemsize(plan, plan.units[0].reads[0])
    count = int(plan.options["calibration_samples"] or COUNT)
    text = int(plan.options["calibration_length"] or LENGTH)
    frames, width = int(config.max_source_positions), int(config.d_model)
    numbers = sum(math.prod(tensor.shape) for tensor in plan.source.tensors.values())
    heard = count * frames * (2 * 4 * config.num_mel_bins + 2 * size * width)
    batch = max(1, min(RefitRecipe.batch_tokens // frames, count // 16), 8)
    activations = 4 * batch * (14 * frames * width + text * (40 * width + 4 * config.vocab_size))
    return int(SLACK * (3 * 4 * numbers + heard + 4 * size * count * text * width + activations))


def _mlp(plan: Plan, side: int) -> int:
    """Numbers that an MLP keeps of a token for the backward pass, and that this takes beside them."""
    names = ("hidden_act", "activation_function", "dense_act_fn")
    written_out = {getattr(plan.text_config, name, None) for name in names} & {"gelu_new", "gelu_fast", "quick_gelu"}
    return (20 if written_out else 7) * side


def _layers(plan: Plan) -> set[str]:
    """Names of the layers in which something is computed."""
    from .layers import layer_name

    return {layer_name(unit.layer.prefix) for unit in plan.units}


def _sizes(plan: Plan, layer: str) -> tuple[int, int, int]:
    """Of a layer: how many numbers it has, how many of them in its attention, the longer side of its largest matrix."""
    shapes = [t.shape for name, t in plan.source.tensors.items() if name.startswith(layer + ".")]
    inside = {name for unit in plan.units if unit.layer.prefix.startswith(layer + ".") for name in unit.reads}
    return (
        sum(math.prod(shape) for shape in shapes),
        sum(math.prod(plan.source.tensors[name].shape) for name in inside),
        max(max(shape[-2:]) for shape in shapes if len(shape) > 1),
    )


def _itemsize(plan: Plan, name: str) -> int:
    return DTYPE_BITS[plan.source.tensors[name].dtype] // 8
