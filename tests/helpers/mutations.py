"""Seeded damage to files: bytes, JSON and text, as bad luck and bad will do it."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

#: fields of config.json that somebody reads, here or in transformers
CONFIG_KEYS = (
    "model_type", "architectures", "auto_map", "quantization_config", "compression_config", "text_config",
    "vision_config", "audio_config", "encoder", "decoder", "layer_types", "layers_block_type", "attention_types",
    "attention_layers", "num_labels", "id2label", "label2id", "num_hidden_layers", "num_layers", "n_layer",
    "num_decoder_layers", "decoder_layers", "num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads",
    "num_kv_shared_layers", "head_dim", "hidden_size", "n_embd", "intermediate_size", "vocab_size", "multi_query",
    "new_decoder_architecture", "parallel_attn", "alibi", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "rotary_dim", "no_rope_layers", "no_rope_layer_interval", "sliding_window",
    "attention_chunk_size", "max_position_embeddings", "n_positions", "tie_word_embeddings", "dtype", "torch_dtype",
    "hidden_act", "hidden_activation", "pad_token_id", "bos_token_id", "eos_token_id", "num_local_experts",
    "num_experts", "num_experts_per_tok", "moe_layer_freq", "mlp_only_layers", "attn_implementation",
    "_attn_implementation", "attention_bias", "is_decoder", "is_encoder_decoder", "pruned_heads", "cross_kv_heads",
    "initializer_range", "transformers_version", "_name_or_path", "use_cache", "return_dict", "torchscript",
    "sub_configs", "base_model_tp_plan", "problem_type", "task_specific_params", "chunk_size_feed_forward",
)  # fmt: skip

_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 900, 2**15, 2**24, 2**27, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
_REALS = (0.0, -0.5, 0.3, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"))
_TEXTS = (
    "", " ", "x", "0", "32", "llama", "float16", "torch.float16", "full_attention", "sliding_attention", "../../x",
    "/etc/passwd", "LlamaForCausalLM", "__class__", "\0", "\u2028", "\u0085", "\ufeff", "ﬁ", "𝄞", "é" * 300, "\n\n",
    "a\rb", "'", '"', "\\", "{}", "%s%n", "None", "nan", "modeling_evil.Evil", "owner/name--modeling.Evil",
)  # fmt: skip


def odd_value(draw: random.Random, like: Any = None, depth: int = 0) -> Any:
    """A value that a careful reader must look at twice; sometimes near ``like``."""
    kind = draw.randrange(12)
    if kind < 3 and like is not None:
        if isinstance(like, bool):
            return not like
        if isinstance(like, (int, float)):
            return draw.choice(
                (like + 1, like - 1, like * 2, -like, like // 2 if like == like else 0, str(like), [like])
            )
        if isinstance(like, str):
            return draw.choice((like[:-1], like.upper(), like + "\0", [like], {like: like}, like * 3))
        if isinstance(like, list):
            return draw.choice((like[:-1], like * 2, like[::-1], [like], dict(enumerate(like)), like[:1] * 300))
        if isinstance(like, dict):
            return draw.choice(({}, [like], list(like.items()), {**like, "": like}, dict.fromkeys(like)))
    if kind < 5:
        return draw.choice(_NUMBERS)
    if kind < 6:
        return draw.choice(_REALS)
    if kind < 8:
        return draw.choice(_TEXTS)
    if kind < 9:
        return draw.choice((None, True, False, [], {}, [None], [[]], [{}], {"": None}))
    if depth > 2:
        return None
    if kind < 10:
        return [odd_value(draw, depth=depth + 1) for _ in range(draw.randrange(4))]
    if kind < 11:
        names = (draw.choice((*_TEXTS, *CONFIG_KEYS)) for _ in range(draw.randrange(4)))
        return {name: odd_value(draw, depth=depth + 1) for name in names}
    return _bomb(draw)


def _bomb(draw: random.Random) -> Any:
    """Small to write, large to believe."""
    deep: Any = 1
    for _ in range(draw.choice((8, 30, 49, 60))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice((
        deep, ["full_attention"] * 5000, list(range(20_000)), {str(i): i for i in range(5000)}, "x" * 200_000,
        [[["global"], 10**9]], [10**9] * 3, {"a": 10**9, "num_hidden_layers": 10**9}, [4000] * 4,
    ))  # fmt: skip


def mutate_json(draw: random.Random, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """A copy of parsed JSON with one to three fields changed, dropped, swapped, renamed or added, at any depth."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = _container(draw, value)
        if isinstance(place, dict):
            _change_dict(draw, place, keys)
        elif isinstance(place, list) and place:
            index = draw.randrange(len(place))
            place[index] = odd_value(draw, place[index])
        else:
            return odd_value(draw, value)
    return value


def _container(draw: random.Random, value: Any) -> Any:
    """The top in most cases, or an object or list inside."""
    place = value
    while draw.random() < 0.4:
        inner = list(place.values()) if isinstance(place, dict) else place if isinstance(place, list) else []
        inner = [x for x in inner if isinstance(x, (dict, list)) and x]
        if not inner:
            break
        place = draw.choice(inner)
    return place


def _change_dict(draw: random.Random, place: dict[str, Any], keys: tuple[str, ...]) -> None:
    there = list(place)
    kind = draw.randrange(10)
    if there and kind == 0:
        del place[draw.choice(there)]
    elif there and kind == 1:
        a, b = draw.choice(there), draw.choice(there)
        place[a], place[b] = place[b], place[a]
    elif there and kind == 2:
        place[draw.choice((*_TEXTS, *keys))] = place.pop(draw.choice(there))
    elif keys and kind < 6:
        name = draw.choice(keys)
        place[name] = odd_value(draw, place.get(name))
    elif there:
        name = draw.choice(there)
        place[name] = odd_value(draw, place[name])


def dumped(draw: random.Random, value: Any) -> bytes:
    """JSON as bytes, now and then with what JSON is not."""
    raw = json.dumps(value, ensure_ascii=draw.random() < 0.7).encode("utf-8", "surrogatepass")
    return mutate_bytes(draw, raw, 3) if draw.random() < 0.15 else raw


def mutate_bytes(draw: random.Random, raw: bytes, most: int = 8, within: int | None = None) -> bytes:
    """Bytes flipped, cut, doubled, moved or put in, at up to ``most`` places of the first ``within`` bytes."""
    out = bytearray(raw)
    for _ in range(draw.randint(1, most)):
        size = min(len(out), within or len(out))
        at = draw.randrange(size) if size else 0
        kind = draw.randrange(8)
        if kind < 3 and size:
            out[at] = draw.randrange(256)
        elif kind < 4 and size:
            out[at] ^= 1 << draw.randrange(8)
        elif kind < 5:
            out[at:at] = draw.choice((
                b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"\xed\xa0\x80", b"\\ud800", b"{",
                b"]", b'"', b",", b"9" * 5000, b"[" * 3000, b"1e999", b"\r\n", b"\x1b[31m", b"NaN",
            ))  # fmt: skip
        elif kind < 6:
            del out[at : at + draw.choice((1, 2, 8, 100, len(out)))]
        elif kind < 7:
            out[at:at] = out[at : at + draw.randrange(64)]
        elif size > 16:
            other = draw.randrange(size - 8)
            out[at : at + 8], out[other : other + 8] = out[other : other + 8], out[at : at + 8]
    return bytes(out)


def mutate_safetensors(draw: random.Random, raw: bytes) -> bytes:
    """Another header in front of the same data: by meaning, by bytes, or another length."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    kind = draw.randrange(10)
    if kind < 5:
        header = json.loads(text)
        for _ in range(draw.choice((1, 1, 2))):
            name = draw.choice(list(header))
            field = draw.choice(("dtype", "shape", "data_offsets", None))
            if field is None or not isinstance(header[name], dict):
                header = mutate_json(draw, header)
                if not isinstance(header, dict) or not header:
                    break
            elif field == "dtype":
                header[name][field] = draw.choice(("F32", "F16", "BF16", "I8", "U64", "F4", "F8_E4M3", "f32", 3, None))
            else:
                header[name][field] = odd_value(draw, header[name].get(field))
        text = dumped(draw, header)
    elif kind < 8:
        text = mutate_bytes(draw, text)
    elif kind < 9:
        return mutate_bytes(draw, raw, 4)
    declared = len(text) if draw.random() < 0.9 else draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(text) + len(data)))
    return struct.pack("<Q", declared % 2**64) + text + data


def odd_text(draw: random.Random, raw: bytes) -> bytes:
    """A text file with what text files get: other encodings, other line ends, nothing, one line of everything."""
    kind = draw.randrange(9)
    if kind < 4:
        return mutate_bytes(draw, raw)
    return draw.choice((
        b"", b"\n\n\n", b" ", b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), raw.replace(b"\n", b"\r"),
        raw.replace(b"\n", b"\xe2\x80\xa8"), raw.replace(b"\n", b"\0"), raw.replace(b" ", b""), b"a" * 300_000,
        b"\xff" * 999, "é̂𝄞\u202e".encode() * 500, b"<eos><pad>" * 200, b"[" * 50_000, b'{"text": "' + b"x" * 100_000,
    ))  # fmt: skip


def odd_jsonl(draw: random.Random, texts: list[str]) -> bytes:
    """Lines of JSON, of which some are not what they should be."""
    lines = []
    for text in texts:
        record: Any = {"text": text}
        if draw.random() < 0.3:
            record = mutate_json(draw, {"text": text, "id": 1}, ("text", "content", "body"))
        lines.append(dumped(draw, record))
    ends = draw.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"", b"\xe2\x80\xa8"))
    raw = ends.join(lines)
    return mutate_bytes(draw, raw, 3) if draw.random() < 0.2 else raw
