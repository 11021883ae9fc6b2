"""Compile the decode kernels for a GPU as a call would, on a machine without one: JSON, a line a kernel.

A process of its own, because Triton decides at import whether kernels are interpreted. Arguments: names of
CASES; $COMPILE_FOR is the compute capability, 90 (Hopper) unless given.
"""

import json
import os
import sys
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_attn_patch.attn.devices import Device
from hf_attn_patch.attn.kernels import biased, decode, decode_launch
from hf_attn_patch.attn.kernels.launcher import Launch
from hf_attn_patch.attn.kernels.shared_decode import shared_decode
from hf_attn_patch.attn.shared import Parted, Rows, SharedPart

CAPABILITY = int(os.environ.get("COMPILE_FOR", "90"))
TARGET, SMS = GPUTarget("cuda", CAPABILITY, 32), 132
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1",
         torch.int8: "i8", torch.int64: "i64", torch.uint8: "u8"}  # fmt: skip


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(
    B: int = 12, HQ: int = 32, HKV: int = 8, Sq: int = 1, Sk: int = 8192, D: int = 128, page: int = 0,
    dtype: torch.dtype = torch.bfloat16, causal: bool = True, window: int | None = None, softcap: float | None = None,
    lse: bool = False, codes: torch.dtype | None = None, v_codes: torch.dtype | None = None, **others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """What :func:`launch` takes. ``others``: the shapes of first, end, mask, bias, sinks that are there."""
    kinds = {"mask": torch.bool, "bias": torch.float32, "sinks": torch.float32}
    given = {name: on_meta(*shape, dtype=kinds.get(name, torch.int32)) for name, shape in others.items()}
    kv = on_meta(B * Sk // page, page, HKV, D, dtype=dtype) if page else on_meta(B, HKV, Sk, D, dtype=dtype)
    v, table = kv, on_meta(B, Sk // page, dtype=torch.int32) if page else None
    if codes is not None:
        kv, v = on_meta(B, HKV, Sk, D, dtype=codes), on_meta(B, HKV, Sk, D, dtype=v_codes or codes)
        given |= dict.fromkeys(("k_scale", "v_scale"), on_meta(B, HKV, Sk, dtype=torch.float32))
    rest = (given.get(name) for name in ("first", "end", "mask", "bias", "sinks", "k_scale", "v_scale"))
    return on_meta(B, HQ, Sq, D, dtype=dtype), kv, v, table, *rest, D**-0.5, causal, window, softcap, lse


CASES: dict[str, dict[str, Any]] = {
    "plain": {"B": 1},
    "one worker a head": {"HKV": 32, "B": 64},
    "padded": {"first": (12,), "end": (12,)},
    "queries": {"Sq": 4, "first": (12,), "window": 4096, "softcap": 30.0, "sinks": (32,), "lse": True},
    "mask": {"Sq": 4, "mask": (12, 1, 4, 8192), "causal": False, "end": (12,)},
    "bias": {"bias": (1, 32, 1, 8192)},
    "head_dim 80": {"D": 80},
    "head_dim 256": {"D": 256, "B": 4},
    "fp32": {"dtype": torch.float32},
    "fp16": {"B": 1, "dtype": torch.float16},
    "fp16, one worker a head": {"HKV": 33, "HQ": 33, "B": 64, "dtype": torch.float16},
    "fp16, padded": {"first": (12,), "end": (12,), "dtype": torch.float16},
    "fp16, mask": {"Sq": 4, "mask": (12, 1, 4, 8192), "causal": False, "end": (12,), "dtype": torch.float16},
    "fp16, head_dim 256": {"D": 256, "B": 4, "dtype": torch.float16},
    "pages of 16": {"page": 16, "end": (12,)},
    "pages of 256": {"page": 256, "end": (12,)},
    "int8": {"B": 1, "codes": torch.int8},
    "fp8": {"B": 1, "codes": torch.float8_e4m3fn},
    "int8 keys, fp8 values": {"B": 1, "codes": torch.int8, "v_codes": torch.float8_e4m3fn},
    "fp16, int8": {"B": 1, "codes": torch.int8, "dtype": torch.float16},
    "fp16, fp8": {"B": 1, "codes": torch.float8_e4m3fn, "dtype": torch.float16},
    "pages and a window": {"page": 256, "end": (12,), "window": 300},
}


#: rows of a batch -> the row of the shared part that each begins with
SHARED = {"shared prompt": ([0] * 16, 1), "shared prompts, unevenly": ([0, 0, 1, 0, 1, 1, 1], 2)}


def shared_arguments(of: list[int], count: int) -> tuple[torch.Tensor, Parted]:
    """What :func:`shared_decode` takes."""
    q, shared, own = on_meta(len(of), 32, 1, 128), on_meta(count, 8, 8192, 128), on_meta(len(of), 8, 128, 128)
    return q, Parted((SharedPart(shared, shared, Rows(of, count)),), own, own)


#: T5's training, a bias that rows share and its gradient; and what takes most room: a bias in fp32 with a mask
BIASED: dict[str, dict[str, Any]] = {
    "a bias, 64": {"D": 64},
    "a bias, 128": {"D": 128},
    "a bias in fp32 and a mask, 64": {"D": 64, "bias_dtype": torch.float32, "mask": True},
    "a bias in fp32 and a mask, 128": {"D": 128, "bias_dtype": torch.float32, "mask": True},
}


def start_biased(D: int, bias_dtype: torch.dtype = torch.bfloat16, mask: bool = False) -> None:
    """Forward and backward."""
    q, k, v, grad = (on_meta(8, 1024, 12, D).transpose(1, 2).requires_grad_() for _ in range(4))
    bias = on_meta(1, 12, 1024, 1024, dtype=bias_dtype).requires_grad_()
    call = biased.Biased(D**-0.5, mask=on_meta(8, 12, 1024, 1024, dtype=torch.bool) if mask else None)
    here = mock.patch.object(biased, "device_of", return_value=Device("cuda", CAPABILITY))
    with here, mock.patch.object(torch.Tensor, "data_ptr", return_value=0):  # tensors on meta have no memory
        out = biased.biased_attention(q, k, v, bias, call)
        torch.autograd.grad(out, (q, k, v, bias), grad)


def compiled(launch: Launch, tensors: Any) -> Any:
    """As Triton would: it specialises on types, on what is None or 1, and on multiples of 16."""
    kernel = launch.kernel
    left_alone = set(kernel.do_not_specialize)
    values = dict(zip(kernel.arg_names, (*tensors, *launch.scalars), strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        special = isinstance(value, int) and name not in left_alone
        if name in launch.constants or value is None or (special and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), TARGET, launch.options)


def main() -> None:
    started: list[tuple[Launch, Any]] = []

    def first(self: Launch, _strides: Any, tensors: Any, _pointers: Any, _stream: int) -> None:
        started.append((self, tensors))

    with (
        mock.patch.object(Launch, "first", first),
        mock.patch.object(decode_launch, "sm_count", return_value=SMS),
        mock.patch.object(decode_launch, "overlaps", return_value=CAPABILITY >= 90),
        mock.patch.object(decode_launch, "device_of", return_value=Device("cuda", CAPABILITY)),
    ):
        for case in sys.argv[1:]:
            started.clear()
            if case in SHARED:
                shared_decode(*shared_arguments(*SHARED[case]), scale=0.1)
            elif case in BIASED:
                start_biased(**BIASED[case])
            else:
                decode_launch.launch(decode.DecodeOperands(*arguments(**CASES[case])))
            for launch, tensors in started:
                made = compiled(launch, tensors)
                ptx = made.asm["ptx"]
                found = {
                    "case": case,
                    "kernel": launch.kernel.__name__,
                    "shared": made.metadata.shared,
                    "waits": ptx.count("griddepcontrol.wait"),
                    "copies": ptx.count("cp.async.c"),
                    "products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
                    "loads": ptx.count("ld.global"),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
