"""Trees of guesses: 17 to 64 queries over many keys, each with a mask of its own, on the decoding kernel."""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_attn_patch
from hf_attn_patch.attn import ladder
from hf_attn_patch.attn.backends import triton_decode
from hf_attn_patch.attn.request import AttentionRequest, kind_of, request_of
from hf_attn_patch.attn.visibility import Dense, full

DEVICE = interpreter.DEVICE


def tree_mask(Sq: int, Sk: int, seed: int) -> torch.Tensor:
    """Bool [Sq, Sk]: all that is past, and of the guesses a node's ancestors and itself, each a parent at random."""
    draw = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(-1, i, (), generator=draw)) for i in range(1, Sq)]
    mask = torch.ones(Sq, Sk, dtype=torch.bool)
    mask[:, Sk - Sq :] = False
    for node in range(Sq):
        at = node
        while at >= 0:
            mask[node, Sk - Sq + at] = True
            at = parents[at]
    return mask


@settings(max_examples=4, deadline=None)
@given(
    Sq=st.sampled_from([17, 20, 33, 64]),
    heads=st.sampled_from([(4, 1), (4, 2), (2, 2)]),
    rows=st.integers(1, 2),
    added=st.booleans(),
    seed=st.integers(0, 9),
)
def test_against_fp64(Sq: int, heads: tuple[int, int], rows: int, added: bool, seed: int) -> None:
    (HQ, HKV), Sk, D = heads, 8 * Sq + 5, 16
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, H, S, D, generator=draw) for H, S in ((HQ, Sq), (HKV, Sk), (HKV, Sk)))
    seen = torch.stack([tree_mask(Sq, Sk, seed + row) for row in range(rows)])[:, None]
    seen[0, 0, :, :3] = False  # padding
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if added else seen
    found = hf_attn_patch.attention(*(t.to(DEVICE) for t in (q, k, v)), mask=mask.to(DEVICE), backend="triton_decode")
    wide = [t.double().repeat_interleave(HQ // t.shape[1], 1) for t in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(-1, -2) * D**-0.5
    truth = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[2]
    assert (found.cpu().double() - truth).abs().max() < 2e-6


def asked(
    Sq: int, Sk: int, heads: tuple[int, int] = (32, 8), masked: bool = True, grad: bool = False
) -> AttentionRequest:
    """The request of such a call, as of a Hopper GPU."""
    q = torch.empty(1, heads[0], Sq, 128, dtype=torch.float16, requires_grad=grad)
    k = torch.empty(1, heads[1], Sk, 128, dtype=torch.float16)
    mask = torch.ones(1, 1, Sq, Sk, dtype=torch.bool)
    seen = Dense(1, Sq, Sk, mask=mask) if masked else full(Sq, Sk, True, (None, None))
    kind = kind_of(q, k, k, None, None, None, 0.0, False, None, None, seen.facts)
    return request_of(kind)._replace(device="cuda", capability=90)


def test_which_requests_are_trees() -> None:
    assert triton_decode.refuses(asked(17, 4096)) is None
    assert "17 to 64 queries" in asked(64, 4096).describe()
    for other in (
        asked(65, 4096),  # too many
        asked(64, 511),  # too few keys: a small prefill
        asked(64, 4096, masked=False),  # no mask of their own: a piece of a prompt
        asked(64, 4096, grad=True),
    ):
        assert triton_decode.refuses(other) == "takes at most 16 queries, or 64 with a mask over 8 times as many keys"
    assert "more than 16 queries" in asked(65, 4096).describe()


@pytest.mark.parametrize(
    ("Sq", "heads", "first"),
    [
        (17, (32, 8), "triton_decode"),
        (64, (32, 8), "triton_decode"),
        (64, (32, 32), "triton_decode"),
        (64, (64, 8), "triton_decode"),
        (33, (64, 4), "torch_sdpa"),  # 528 queries share a KV head: K and V would be read nine times
    ],
)
def test_who_is_asked_first_on_hopper(Sq: int, heads: tuple[int, int], first: str) -> None:
    assert ladder.order(asked(Sq, 8192, heads))[0] == first
