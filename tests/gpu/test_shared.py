"""N answers to one prompt on a GPU: the kernel by the rule, and the tokens of generate, recorded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import assert_conforms
from decoding import FAMILIES

from hf_attn_patch import enable
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference
from hf_attn_patch.attn.kernels.shared_decode import shared_decode
from hf_attn_patch.attn.shared import Parted, Rows, SharedPart
from hf_attn_patch.cache import beginnings
from hf_attn_patch.decoding import fusing, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("rows", [[0] * 16, [0, 1, 2] * 5, [0] * 40 + [1] * 3], ids=["even", "mixed", "uneven"])
def test_the_kernel_conforms(rows: list[int], padded: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B, count = len(rows), max(rows) + 1
    q = torch.randn(B, 32, 1, 128, device="cuda").to(dtype)
    shared, own = (
        [torch.randn(n, 8, S, 128, device="cuda").to(dtype) for _ in "kv"] for n, S in ((count, 3001), (B, 77))
    )
    parted = Parted((SharedPart(shared[0], shared[1], Rows(rows, count)),), own[0], own[1])
    k, v = (torch.cat([s[rows], o], 2) for s, o in zip(shared, own, strict=True))
    mask = None
    if padded:
        first = torch.tensor(rows, device="cuda")[:, None] * 900
        mask = (torch.arange(3078, device="cuda") >= first)[:, None, None]
    options: dict[str, Any] = {"scale": 0.1, "causal": mask is None, "mask": mask, "softcap": 20.0}
    out = shared_decode(q, parted, **options)
    low = grouped_decode_reference(q, k, v, **options)[0]
    assert_conforms(out, low, grouped_decode_reference(q.double(), k.double(), v.double(), **options)[0])
    assert torch.equal(out, shared_decode(q, parted, **options))


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "recorded"])
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 4}], ids=["sampled", "beams"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_same_tokens(
    family: str, options: dict[str, Any], padding: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
    monkeypatch.setattr(step, "FUSED_SHORT", 0)
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().cuda()
    ids = torch.randint(3, 128, (2, 50), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 60, "num_return_sequences": 4, **options}
    torch.manual_seed(1)
    expected = model.generate(**call)
    enable(model, cache="growing", cuda_graphs=graphs)
    for _ in range(2):
        torch.manual_seed(1)
        assert torch.equal(model.generate(**call), expected)
    if graphs:
        told = fusing.told[model]
        assert not isinstance(told, str), told
        assert told["norms"] > 8
