"""safetensors' names of dtypes and torch's, and the check for NaN and Inf on raw bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_attn_patch.errors import ConversionError

if TYPE_CHECKING:
    import torch

#: dtypes that weights of heads may have
FLOATS = ("F64", "F32", "F16", "BF16")

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

#: dtype -> (numpy's unsigned and signed integers of that width, the bits of +Inf)
_INFINITY = {
    "F64": ("u8", "i8", 0x7FF0 << 48),
    "F32": ("u4", "i4", 0x7F80 << 16),
    "F16": ("u2", "i2", 0x7C00),
    "BF16": ("u2", "i2", 0x7F80),
}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors name."""
    import torch

    if name not in _TORCH:
        raise ConversionError(f"torch has no dtype for {name}")
    dtype: torch.dtype = getattr(torch, _TORCH[name])
    return dtype


def format_name(dtype: torch.dtype, tensor: str) -> str:
    """safetensors' name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    for name, known in _TORCH.items():
        if known == short:
            return name
    raise ConversionError(f"tensor {tensor!r} has dtype {dtype}, which safetensors cannot hold")


def has_nonfinite(raw: Any, dtype: str) -> bool:
    """Whether NaN or Inf is among the floats in a buffer.

    On the bits, because that is ten times as fast as ``isfinite`` for bf16: as signed integers the positive
    non-finite values are the largest, as unsigned integers the negative ones are.
    """
    import numpy as np

    if dtype not in _INFINITY or len(raw) == 0:
        return False
    unsigned, signed, infinity = _INFINITY[dtype]
    bits = np.frombuffer(raw, dtype=f"<{signed}")
    sign = 1 << (bits.dtype.itemsize * 8 - 1)
    return int(bits.max()) >= infinity or int(bits.view(f"<{unsigned}").max()) >= infinity + sign
