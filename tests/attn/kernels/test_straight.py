"""From ``attend`` to the decoding kernel: its short way for plain calls computes what the long one does."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch

pytest.importorskip("triton")

from hf_attn_patch.attn.backends import triton_decode
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.plan import forget
from hf_attn_patch.attn.visibility import full

DEVICE = interpreter.DEVICE


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: int, cap: float | None, sinks: Any) -> torch.Tensor:
    """fp64, the last ``seen`` keys of each query's past."""
    G, Sq, Sk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    q, k, v = (t.double().cpu() for t in (q, k, v))
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scores = q @ k.mT * 0.2
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    i, j = torch.arange(Sq)[:, None] + Sk - Sq, torch.arange(Sk)[None, :]
    scores = scores.masked_fill((j > i) | (j <= i - seen), -torch.inf)
    if sinks is not None:
        extra = sinks.double().cpu()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("Sq", [1, 5])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(None, None, False), (7, None, False), (None, 3.0, True)])
def test_the_short_way(
    Sq: int, window: int | None, cap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, S, 16, device=DEVICE) for H, S in ((6, Sq), (2, 29), (2, 29)))
    layout = full(Sq, 29, True, (None if window is None else window - 1, None), 2)
    sink = torch.randn(6, device=DEVICE) if sinks else None
    options: dict[str, Any] = {
        "visibility": layout,
        "scale": 0.2,
        "softcap": cap,
        "sinks": sink,
        "name": "triton_decode",
    }
    wanted = truth(q, k, v, window or 29, cap, sink)
    if layout.whole:  # a window before one query is a cut, which goes the long way
        monkeypatch.setattr(triton_decode, "run", None)
    out = attend(q, k, v, **options)[0]
    torch.testing.assert_close(out.double().cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_what_only_looks_like_a_tensor_goes_through_the_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout = full(1, 9, True, (None, None), 2)
    q, k = torch.randn(2, 4, 1, 16, device=DEVICE), torch.randn(2, 2, 9, 16, device=DEVICE)
    real = attend(q, k, k, visibility=layout, name="triton_decode")[0]  # the short way is known now
    with FakeTensorMode() as mode:
        fake_q, fake_k = mode.from_tensor(q), mode.from_tensor(k)
        fake = attend(fake_q, fake_k, fake_k, layout, name="triton_decode")[0]
    assert fake.shape == real.shape
    assert isinstance(fake, torch._subclasses.FakeTensor)
