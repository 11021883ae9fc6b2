"""The rule that every kernel and backend is held to (FlashAttention's own test criterion, with an absolute term)."""

from __future__ import annotations

import torch


def assert_conforms(
    out: torch.Tensor, low: torch.Tensor, ref: torch.Tensor, *, factor: float = 2.0, where: torch.Tensor | None = None
) -> None:
    """``max|out - ref| <= factor * max(max|low - ref|, u * max|ref|) + atol``, all finite.

    u is the unit roundoff of the tested dtype: of a few numbers PyTorch's own may all be right by luck, and still
    nobody can be asked for less than one rounding of the largest.

    Args:
        out: what is tested, any dtype.
        low: the same function by plain PyTorch in the tested dtype.
        ref: the same function in fp32 or fp64.
        factor: 2 for outputs, 2 to 3 for gradients.
        where: bool mask, broadcastable, of the elements that count.
    """
    low_dtype = low.dtype
    out, low, ref = (t.detach().double() for t in (out, low, ref))
    assert out.shape == ref.shape, (out.shape, ref.shape)
    if where is not None:
        where = where.expand_as(ref)
        out, low, ref = out[where], low[where], ref[where]
    if ref.numel() == 0:
        return
    assert torch.isfinite(out).all(), "not finite"
    small = ref.to(low_dtype)
    # the rule's own absolute term is nothing where ref is 0: a floor of a few rounding errors of values around 1
    floor = 2e-5 if low_dtype.itemsize == 2 else 5e-6
    atol = 2 * float(((small + 0.3 - 0.3) - small).abs().max()) + floor
    rounding = torch.finfo(low_dtype).eps / 2 * float(ref.abs().max())
    error, allowed = float((out - ref).abs().max()), factor * max(float((low - ref).abs().max()), rounding) + atol
    assert error <= allowed, f"error {error:.3g} is over {allowed:.3g}"
