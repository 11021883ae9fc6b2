"""From transformers' mask request to a layout: every pattern against the mask written out position by position."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch.attn.visibility import DENSE, FULL, PACKED, PADDED, Padded
from hf_attn_patch.hf.mask_pattern import Pattern, dense_from_carrier, of_carrier

CPU = torch.device("cpu")


def keys_mask(kind: str, B: int, S: int) -> torch.Tensor | None:
    if kind == "no":
        return None
    keys = torch.ones(B, S, dtype=torch.bool)
    if kind in ("left", "both"):
        keys[1 % B, :4], keys[-1, :7] = False, False
    if kind in ("right", "both"):
        keys[0, -3:] = False
    if kind == "holes":
        keys[0, 5] = False
    if kind == "empty row":
        keys[0] = False
    return keys


def written_out(B, S, causal, window, keys, documents):
    """bool [B, S, S], one position after another."""
    see = torch.zeros(B, S, S, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(S), range(S)):
        left, right = window
        see[b, i, j] = (
            (not causal or j <= i)
            and (left is None or i - j <= left)
            and (right is None or j - i <= right)
            and (keys is None or bool(keys[b, j]))
            and (documents is None or documents[i] == documents[j])
        )
    return see


def laid_out(layout, B, S):
    see = torch.zeros(B, S, S, dtype=torch.bool)
    mask = layout.dense(CPU)
    see[..., layout.start : layout.stop] = True if mask is None else mask[:, 0]
    return see


@pytest.mark.parametrize("padding", ["no", "left", "right", "both", "holes", "empty row"])
@pytest.mark.parametrize("window", [(None, None), (3, None), (2, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_patterns(causal, window, padding, packed):
    if packed and not causal:
        pytest.skip("positions say nothing where attention is bidirectional")
    B, S = 3, 13
    keys = keys_mask(padding, B, S)
    lengths = [5, 8]
    documents = [d for d, n in enumerate(lengths) for _ in range(n)] if packed else None
    positions = torch.cat([torch.arange(n) for n in lengths])[None] if packed else None
    pattern = Pattern(B, S, S, causal, window, keys=keys)
    layout = pattern.resolve(positions)
    expected = written_out(B, S, causal, window, keys, documents)
    rows = torch.ones(B, S, dtype=torch.bool) if keys is None else keys
    assert torch.equal(laid_out(layout, B, S)[rows], expected[rows])
    kinds = {"no": FULL, "left": PADDED, "right": PADDED, "both": PADDED, "holes": DENSE, "empty row": PADDED}
    assert layout.kind == (PACKED if packed and padding != "holes" else kinds[padding])
    if not packed:
        carrier = pattern.carrier()
        assert of_carrier(carrier) is pattern
        assert of_carrier(carrier.clone()) is None
        assert torch.equal(dense_from_carrier(carrier.clone(), S, S)[:, 0], expected)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_segments_cover_every_token_once(data):
    B, S = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    spans = [sorted(data.draw(st.tuples(st.integers(0, S), st.integers(0, S)))) for _ in range(B)]
    keys = torch.zeros(B, S, dtype=torch.bool)
    for b, (lo, hi) in enumerate(spans):
        keys[b, lo:hi] = True
    causal = data.draw(st.booleans())
    layout = Pattern(B, S, S, causal, keys=keys).resolve()
    if not isinstance(layout, Padded):
        return
    cu_q, cu_k = (t.tolist() for t in layout.segments())
    assert cu_q[0] == cu_k[0] == 0
    assert cu_q[-1] == B * S
    assert cu_k[-1] == B * layout.keys
    assert cu_q == sorted(cu_q)
    assert cu_k == sorted(cu_k)
    for b, (lo, hi) in enumerate(spans):  # the middle one of each row's five holds the valid keys
        k0, k1 = cu_k[5 * b + 2], cu_k[5 * b + 3]
        assert k1 - k0 == hi - lo
        if hi > lo:
            assert k0 - b * layout.keys + layout.start == lo


def test_static_cache_reads_only_what_was_written():
    keys = torch.zeros(2, 64, dtype=torch.bool)
    keys[:, :20] = True
    layout = Pattern(2, 20, 64, True, offset=torch.tensor(0), keys=keys).resolve()
    assert (layout.kind, layout.start, layout.stop) == (FULL, 0, 20)
    later = Pattern(2, 17, 64, True, offset=torch.tensor(20)).resolve()
    assert (later.kind, later.start, later.stop) == (FULL, 0, 37)


def test_chunks_count_from_the_left_padding():
    keys = torch.ones(1, 12, dtype=torch.bool)
    keys[0, :2] = False
    layout = Pattern(1, 12, 12, True, chunk=(4, torch.tensor([2])), keys=keys).resolve()
    mask = layout.dense(CPU)
    assert mask is not None
    see = mask[0, 0]
    for i, j in itertools.product(range(2, 12), range(12)):
        assert bool(see[i, j]) == (2 <= j <= i and (i - 2) // 4 == (j - 2) // 4)
