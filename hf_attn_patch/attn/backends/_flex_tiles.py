"""Tiles for flex_attention where torch's own take more shared memory than the GPU has ("no valid triton configs").

torch chooses by head dimension and capability: GPUs with 99 KiB a block get the tiles of an A100, and those with 64 KiB
none of their own (``torch/_inductor/template_heuristics/triton.py``, alike in 2.11 and 2.13). What a kernel takes was
found by compiling its loads and products with Triton 3.7 for these GPUs; on none of them was it run.
"""

from __future__ import annotations

from hf_attn_patch.attn.devices import shared_memory
from hf_attn_patch.attn.kernels.decode_plan import power_of_two

#: queries and keys a tile, stages, warps
_FORWARD = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_stages", "fwd_num_warps")
_BACKWARD = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_stages", "bwd_num_warps")


def tiles(capability: int, head_dim: int, value_dim: int, scored: bool) -> dict[str, int]:
    """flex_attention's ``kernel_options`` for a GPU; none where torch's own choice fits.

    Args:
        capability: 0 if the GPU is none of NVIDIA's.
        scored: a number for each score is read, of a bias or a dense mask; it is fetched ahead as keys are.

    >>> tiles(90, 256, 256, True)
    {}
    >>> tiles(75, 128, 128, False)["fwd_BLOCK_N"]
    32
    """
    width, room = power_of_two(max(head_dim, value_dim)), shared_memory(capability) if capability else 1 << 20
    forward: tuple[int, ...] = ()
    backward: tuple[int, ...] = ()
    if room >= 227 << 10:
        pass
    elif room >= 163 << 10:
        if width > 128 and (scored or not head_dim == value_dim == 256):
            forward = (32, 64, 2, 4)
    elif room >= 99 << 10:
        if width > 128:
            forward, backward = (32, 64, 2, 4), (32, 32, 32, 32, 1, 4)
        elif scored:
            forward = (64, 64, 2, 4)
            backward = (64, 64, 64, 64, 2, 4) if width > 64 else ()
    elif width > 64:
        forward = (32, 16, 1, 4) if width > 128 else (64, 32, 1, 4)
    return dict(zip(_FORWARD, forward, strict=False)) | dict(zip(_BACKWARD, backward, strict=False))
