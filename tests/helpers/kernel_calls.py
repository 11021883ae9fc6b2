"""Calls of our decoding kernels at sizes that fit no tile, each against its plain truth: what a memory checker runs.

compute-sanitizer --tool memcheck python tests/helpers/kernel_calls.py   # PYTORCH_NO_CUDA_MEMORY_CACHING=1
"""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_attn_patch.attn.codes import KINDS, as_codes, pack_both
from hf_attn_patch.attn.kernels import few_rows, matvec, small
from hf_attn_patch.attn.kernels.decode import grouped_decode, grouped_decode_paged
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_paged_reference, grouped_decode_reference
from hf_attn_patch.attn.kernels.shared_decode import shared_decode
from hf_attn_patch.attn.shared import Parted, Rows, SharedPart

DEVICE = interpreter.DEVICE
LONG = 2311 if DEVICE == "cuda" else 331


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE, torch.float16)


def near(found: Any, exact: Any) -> None:
    assert isinstance(found, Tensor)
    far = (found.double() - exact.double()).abs().max()
    assert far <= 0.02 * max(1.0, float(exact.double().abs().max())), float(far)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def decode(B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int) -> None:
    q, k, v = randn(B, HQ, Sq, D), randn(B, HKV, Sk, D), randn(B, HKV, Sk, D)
    mask = (torch.rand(B, 1, Sq, Sk) < 0.7).to(DEVICE)
    ends = {"first": numbers(*(7 * i for i in range(B))), "end": numbers(*(Sk - 3 * i for i in range(B)))}
    every: list[dict[str, Any]] = [{}, ends, {"mask": mask, "causal": False}]
    every += [{"window": 50, "softcap": 20.0, "sinks": randn(HQ)}]
    for seen in every:
        options = {"scale": D**-0.5, **seen}
        exact = grouped_decode_reference(q.double(), k.double(), v.double(), **options)[0]
        near(grouped_decode(q, k, v, **options), exact)


def paged() -> None:
    q, k, v = randn(3, 8, 1, 64), randn(20, 16, 2, 64), randn(20, 16, 2, 64)
    table, lengths = numbers(*torch.randperm(20)[:18].tolist()).view(3, 6), numbers(5, 96, 33)
    exact = grouped_decode_paged_reference(q.double(), k.double(), v.double(), table, lengths, scale=0.1)[0]
    near(grouped_decode_paged(q, k, v, table, lengths, scale=0.1), exact)


def codes(name: str) -> None:
    kind, q = KINDS[name], randn(2, 8, 1, 64)
    k, v = randn(2, 2, 300, 64), randn(2, 2, 300, 64)
    (keys, k_scale), (values, v_scale) = pack_both(k, v, kind)
    scales: dict[str, Any] = {"k_scale": k_scale.squeeze(-1), "v_scale": v_scale.squeeze(-1)}
    keys, values = as_codes(keys, kind.keys), as_codes(values, kind.values)
    k, v = keys.double() * k_scale, values.double() * v_scale
    found = grouped_decode(q, keys, values, scale=0.1, **scales)
    near(found, grouped_decode_reference(q.double(), k, v, scale=0.1)[0])


def shared(rows: list[int]) -> None:
    q, parts, own = randn(len(rows), 8, 1, 64), [randn(2, 2, 401, 64) for _ in "kv"], randn(2, len(rows), 2, 33, 64)
    parted = Parted((SharedPart(parts[0], parts[1], Rows(rows, 2)),), own[0], own[1])
    k, v = (torch.cat([part[rows], mine], 2).double() for part, mine in zip(parts, own, strict=True))
    padding = torch.arange(434) >= torch.tensor(rows)[:, None] * 100
    for mask in (None, padding[:, None, None].to(DEVICE)):
        options: dict[str, Any] = {"scale": 0.1, "causal": mask is None, "mask": mask}
        near(shared_decode(q, parted, **options), grouped_decode_reference(q.double(), k, v, **options)[0])


def norms(N: int) -> None:
    x, added, weight = randn(3, 1, N), randn(3, 1, N), randn(N)
    total = (x + added).double()
    plain = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
    factors: dict[int, Any] = {
        small.CAST: weight,
        small.ONE_MORE: 1 + weight.double(),
        small.WIDE: weight,
        small.BARE: 1,
    }
    for form, factor in factors.items():
        near(small.norm(x, added, None if form == small.BARE else weight, 1e-5, form, x)[0], plain * factor)
    near(small.gated(x, added, small.SILU, x)[0], silu(x.double()) * added.double())


def rotary() -> None:
    q, k, v, cos, sin = (randn(3, n, 1, D) for n, D in ((6, 40), (2, 40), (2, 48), (1, 40), (1, 40)))
    keys, values = (torch.zeros(3, 2, 50, D, device=DEVICE, dtype=torch.float16) for D in (40, 48))
    low, high = k.double().chunk(2, -1)
    turned = k.double() * cos.double() + torch.cat([-high, low], -1) * sin.double()
    near(small.rotate(q, k, cos, sin, q, k)[1], turned)
    small.rotate_and_append(q, k, v, cos, sin, keys, values, torch.tensor([49], device=DEVICE), q)
    near(keys[:, :, 49:], turned)
    small.append(keys, values, torch.tensor([0], device=DEVICE), k, v)
    near(values[:, :, :1], v)


def products(K: int, sizes: list[int]) -> None:
    weights = [randn(N, K) / K**0.5 for N in sizes]
    gate, up = randn(57, K) / K**0.5, randn(57, K) / K**0.5
    for x, multiply in ((randn(1, K), matvec.matvec), (randn(13, K), few_rows.few_rows)):
        for found, weight in zip(multiply(x, weights, [None] * len(sizes)), weights, strict=True):
            near(found, x.double() @ weight.double().T)
        exact = silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        near(multiply(x, [gate, up], [None, None], small.SILU)[0], exact)


def all_calls() -> None:
    torch.manual_seed(0)
    for shape in ((1, 8, 2, 1, 339, 64), (3, 8, 2, 1, LONG, 128), (2, 6, 2, 3, 799, 40), (1, 8, 8, 17, LONG, 64)):
        decode(*shape)
    paged()
    for name in KINDS if DEVICE == "cuda" else ("int8",):
        codes(name)
    for rows in ([0, 0, 1, 1], [0, 1, 1, 1, 0]):
        shared(rows)
    for N in (100, 257, 4096):
        norms(N)
    rotary()
    products(130, [1, 7, 40])
    if DEVICE == "cuda":
        for K, sizes in ((4096, [6144, 1024, 1024]), (33, [16]), (14336, [129])):
            products(K, sizes)
        torch.cuda.synchronize()


if __name__ == "__main__":
    all_calls()
    print("all calls are right")
