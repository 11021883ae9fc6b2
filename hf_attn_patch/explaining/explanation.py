"""Which backend runs what, and why the others don't: asked of the model itself, by a forward without numbers."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_attn_patch.attn.crossovers import MEASURED_ON, never_tuned
from hf_attn_patch.attn.devices import Device, device_of
from hf_attn_patch.attn.plan import reasons
from hf_attn_patch.attn.request import AttentionRequest
from hf_attn_patch.errors import AttentionError
from hf_attn_patch.hf.attention_function import BACKEND_ATTRIBUTE


@dataclass(frozen=True)
class LayerKind:
    """Layers of a model that ask for the same.

    ``paths`` are their modules; ``queries`` and ``keys`` are Sq and Sk; ``reasons`` has for every backend, in the order
    in which they are tried, the reason against it (None: it can run). ``insisted`` is a backend that was asked for by
    name (``enable(model, backend=...)``, ``use_backend``).
    """

    role: str
    paths: tuple[str, ...]
    calls: int
    request: AttentionRequest
    queries: int
    keys: int
    insisted: str | None
    reasons: tuple[tuple[str, str | None], ...]

    @property
    def chosen(self) -> str:
        """The backend that runs these layers."""
        if self.insisted is not None:
            return self.insisted
        return next(name for name, reason in self.reasons if reason is None)

    @property
    def title(self) -> str:
        """Which layers these are."""
        calls = f"{self.calls} calls of " if self.calls != len(self.paths) else ""
        layers = f"{len(self.paths)} layers" if len(self.paths) > 1 else "1 layer"
        return f"{self.role}: {calls}{layers}, {any_layer(self.paths[0]) if len(self.paths) > 1 else self.paths[0]}"

    def describe(self) -> str:
        """What they ask for, in one line."""
        return f"{self.request.describe()}; {self.queries} x {self.keys} queries x keys"

    def rows(self) -> list[tuple[str, str]]:
        """(backend, what about it), in the order in which they are tried."""
        return [(name, self._verdict(name, reason)) for name, reason in self.reasons]

    def _verdict(self, name: str, reason: str | None) -> str:
        if name == self.chosen:
            insisted = ", as was insisted on" if self.insisted else ""
            return f"runs this{insisted}" if reason is None else f"was insisted on, and raises: {reason}"
        return reason or ("could run it" if self.insisted else "could run it, but was measured slower")


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: the ``kinds`` of layer, and parts that could not be asked, with the reason.

    ``note`` says where the order of the backends was measured on another GPU; ``decoding`` what becomes of decoding
    steps (None: nobody asked for recordings); ``codes`` as which codes ``generate`` caches keys and values (None: as
    they are).

    ``request``, ``reasons``, ``chosen`` and :meth:`rows` are those of the kind that has the most layers.
    """

    kinds: tuple[LayerKind, ...]
    unasked: tuple[tuple[str, str], ...] = ()
    note: str | None = None
    decoding: str | None = None
    codes: str | None = None

    @property
    def main(self) -> LayerKind:
        """The kind with the most layers; of several, a decoder's."""
        return max(self.kinds, key=lambda kind: (len(kind.paths), kind.role.startswith("decoder")))

    @property
    def request(self) -> AttentionRequest:
        """What the most layers ask for."""
        return self.main.request

    @property
    def reasons(self) -> tuple[tuple[str, str | None], ...]:
        """(backend, reason against it), for the most layers."""
        return self.main.reasons

    @property
    def chosen(self) -> str:
        """The backend that runs the most layers."""
        return self.main.chosen

    def rows(self) -> list[tuple[str, str]]:
        """(backend, what about it), for the most layers."""
        return self.main.rows()

    def _tables(self) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """(lines, rows): kinds for which all backends have the same verdict share a table."""
        tables: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for kind in self.kinds:
            tables.setdefault(tuple(kind.rows()), []).append(f"{kind.title}: {kind.chosen} ({kind.describe()})")
        return [(lines, list(rows)) for rows, lines in tables.items()]

    def _notes(self) -> list[str]:
        notes = [f"{path} was not asked: {reason}" for path, reason in self.unasked]
        if self.decoding:
            notes.append(f"Decoding steps are {self.decoding}.")
        if self.codes:
            notes.append(
                f"generate caches keys and values as {self.codes} codes: not exact. On an NVIDIA GPU triton_decode "
                "reads them as they are, for up to 64 queries; all else is given numbers made of them."
            )
        return [*notes, f"The ladder is {self.note}."] if self.note else notes

    def __str__(self) -> str:
        width = max((len(name) for kind in self.kinds for name, _ in kind.reasons), default=0)
        lines: list[str] = []
        for heads, rows in self._tables():
            lines += heads + [f"  {name:<{width}}  {text}" for name, text in rows]
        return "\n".join(lines + self._notes())

    def _repr_html_(self) -> str:
        parts = []
        for heads, rows in self._tables():
            cells = "".join(f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in rows)
            parts.append("".join(f"<p>{html.escape(line)}</p>" for line in heads) + f"<table>{cells}</table>")
        return "".join(parts) + "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())


def explain(
    model: Any,
    *,
    batch: int = 1,
    q_len: int | None = None,
    kv_len: int | None = None,
    padded: bool = False,
    packed: bool = False,
    training: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    capability: int | tuple[int, int] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Which backend every kind of layer of a model takes in a situation, and why not the others.

    The model's own code is run on tensors that have shapes but no numbers: no weight is read or changed, no memory
    taken, no random number drawn, and the accelerator need not be there.

    Args:
        model: a transformers model (on any device, meta included) or a config.
        batch: B.
        kv_len: Sk, of which an encoder sees all at once; unless given 1024, or the positions that the model knows.
        q_len: Sq, after a cache of ``kv_len - q_len`` keys. Unless given 1 (decoding), or ``kv_len`` where
            ``training`` or ``packed``.
        padded: a quarter of each row but the first (of the only row) is padding. Without it no mask is given.
        packed: two documents lie packed in each row, told by ``position_ids``.
        training: the model is in training, with gradients; else in evaluation, without.
        device, dtype: default to the model's; for a config (or a model on meta) to this machine's first accelerator.
        capability: of another CUDA GPU than this machine's: 75 or (7, 5) for a T4, 90 for an H100.
            ``device="hip"`` asks for an AMD GPU.
        inputs: what the model is called with, in place of the lengths, for models that take more than text.

    Raises:
        AttentionError: the model computes attention outside transformers' interface (as :func:`enable` says), the
            lengths do not go together, no GPU has that capability, or none of its layers could be asked.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8)
    >>> explain(config, batch=8, q_len=1, kv_len=8192, device="cpu").chosen
    'torch_sdpa'
    """
    from hf_attn_patch.cache.growing_cache import codes_cached_by
    from hf_attn_patch.compat.torch import uncompiled
    from hf_attn_patch.decoding.cuda_graphs import recording_of

    from .rehearsal import Rehearsed, built, rehearse, shadow
    from .situations import Situation

    model = uncompiled(model)
    kv_len = max(_usual_length(model), q_len or 0) if kv_len is None else kv_len
    if q_len is None:
        q_len = kv_len if training or packed else 1
    _check(batch, q_len, kv_len, packed)
    gpu = _capability(capability, device)
    device = "cuda" if gpu is not None else device
    place = _device(model, device)
    kind = _kind(place, device, gpu)
    copied = shadow(model, place, dtype) if isinstance(model, nn.Module) else built(model, place, dtype)
    _switch(copied)
    heard = rehearse(copied, Rehearsed(place, kind), Situation(batch, q_len, kv_len, padded, packed, training), inputs)
    if not heard.calls:
        whys = "".join(f" ({path}: {reason})" for path, reason in heard.unasked)
        raise AttentionError(
            f"no layer of {type(copied).__name__} asked for attention{whys}; ask with inputs= as you call it"
        )
    decoding = recording_of(model) if isinstance(model, nn.Module) else None
    codes = codes_cached_by(model) if isinstance(model, nn.Module) else None
    return Explanation(tuple(_kinds(heard)), tuple(heard.unasked), _note(kind, gpu), decoding, codes)


def _check(batch: int, q_len: int, kv_len: int, packed: bool) -> None:
    if min(batch, q_len, kv_len) < 1 or q_len > kv_len:
        raise AttentionError(f"batch {batch}, q_len {q_len} and kv_len {kv_len}: each from 1, and q_len up to kv_len")
    if packed and q_len != kv_len:
        raise AttentionError(f"packed documents have no cache before them: q_len ({q_len}) must be kv_len ({kv_len})")


def _usual_length(model: Any) -> int:
    """1024 keys, or what fits into a model that knows fewer positions (two of which RoBERTa keeps for padding)."""
    from .situations import text_of

    config = getattr(model, "config", model)
    text = text_of(config) if hasattr(config, "get_text_config") else config
    known = getattr(text, "max_position_embeddings", None)
    return max(1, known - 2) if isinstance(known, int) and 0 < known <= 1024 else 1024


def _capability(given: Any, device: str | torch.device | None) -> int | None:
    """Ten times the major number and the minor one."""
    if given is None:
        return None
    found = given[0] * 10 + given[1] if isinstance(given, tuple) and [type(n) for n in given] == [int, int] else given
    if type(found) is not int or not 10 <= found < 1000:
        raise AttentionError(f"capability={given!r} is none: 75 or (7, 5) for a T4, 80 for an A100, 90 for an H100")
    if device is not None and not str(device).startswith(("cuda", "meta")):
        raise AttentionError(f"capability={given!r} is that of a CUDA GPU, and device={str(device)!r} is none")
    return found


def _device(model: Any, device: str | torch.device | None) -> torch.device:
    if device is None:
        device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    place = torch.device("meta" if device is None else device)
    if place.type == "meta":
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cpu":
        return place
    return torch.device("cuda" if place.type == "hip" else place.type, place.index or 0)


def _note(kind: Device, capability: int | None) -> str | None:
    if kind.device == "cuda" and capability is None:
        return never_tuned()
    if kind.device in ("cpu", "cuda") and capability in (None, 90):
        return None
    where = f"a GPU of compute capability {kind.capability / 10:.1f}" if kind.device == "cuda" else kind.device
    return f"never tuned for {where}: the order of the backends is that of an {MEASURED_ON}, by what it can run"


def _kind(place: torch.device, named: Any, capability: int | None) -> Device:
    if str(named).startswith("hip"):
        return Device("hip", 0)
    if place.type != "cuda":
        return Device(place.type, 0)
    if capability is not None:
        return Device("cuda", capability)
    if not torch.cuda.is_available():
        raise AttentionError(
            "this machine has no CUDA device: say by its capability which GPU is meant, capability=75 for a T4, "
            "80 for an A100, 89 for an L4, 90 for an H100"
        )
    return device_of(place)


def _switch(model: nn.Module) -> None:
    """What ``enable`` does to each transformers model inside, but for the backend that was insisted on."""
    from transformers import PreTrainedModel

    from hf_attn_patch.enabling import enable

    insisted = {m: m.__dict__[BACKEND_ATTRIBUTE] for m in model.modules() if BACKEND_ATTRIBUTE in m.__dict__}
    inside: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not any(module in set(outer.modules()) for outer in inside):
            inside.append(module)
            enable(module, cache=None, cuda_graphs=False)
            module.set_experts_implementation("eager")  # the others ask the device what it can do
    if not inside:
        raise AttentionError(f"{type(model).__name__} is neither a transformers model nor a config")
    for module, name in insisted.items():
        module.__dict__[BACKEND_ATTRIBUTE] = name


def _kinds(heard: Any) -> list[LayerKind]:
    groups: dict[Any, list[Any]] = {}
    for call in heard.all_calls():
        key = (role_of(call), any_layer(call.path), call.request, call.queries, call.keys, call.insisted)
        groups.setdefault(key, []).append(call)
    return [
        LayerKind(role, tuple(dict.fromkeys(c.path for c in calls)), len(calls), request, queries, keys, insisted,
                  tuple(reasons(request)))
        for (role, _, request, queries, keys, insisted), calls in groups.items()
    ]  # fmt: skip


def any_layer(path: str) -> str:
    """A module's path for all layers of its kind.

    >>> any_layer("model.layers.3.self_attn")
    'model.layers.*.self_attn'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def role_of(call: Any) -> str:
    """What a layer is to its model: encoder, decoder, cross-attention, vision, audio; and its window.

    >>> from types import SimpleNamespace as N
    >>> role_of(N(path="model.decoder.layers.0.encoder_attn", module=N(), owner=N(), window=(None, None)))
    'cross-attention'
    """
    path = call.path.lower()
    name = path.rsplit("decoder.", 1)[-1]
    signal = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}
    main = signal.get(getattr(call.owner, "main_input_name", ""))
    if any(word in name for word in ("cross", "encdec", "encoder_attn")):
        role = "cross-attention"
    elif main is not None and "decoder" not in path:
        role = main
    elif "decoder" in path or getattr(call.module, "is_causal", False):
        role = "decoder"
    else:
        role = "encoder"
    return role + _window(call)


def _window(call: Any) -> str:
    left, right = call.window
    if left is not None:
        return f", window of {left + 1} keys" if not right else f", window of {left} keys on each side"
    config = getattr(call.module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(call.module, "layer_idx", None)
    if isinstance(kinds, (list, tuple)) and isinstance(index, int) and index < len(kinds):
        return ", " + str(kinds[index]).replace("_", " ") if len(set(kinds)) > 1 else ""
    return ""
