"""Span corruption and padded batches."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5GemmaConfig

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE
from hf_attn_patch.training.data.chunks import Corruption, Pair, collate_pairs
from hf_attn_patch.training.data.stream import Position
from hf_attn_patch.training.model.other_objectives import shift_right

EOS, MASK, SENTINELS = 1, 2, tuple(range(1000, 1020))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 200), seed=st.integers(0, 1000), bart=st.booleans())
def test_source_and_target_together_are_the_text(length, seed, bart):
    ids = list(range(10, 10 + length))
    corruption = Corruption(() if bart else SENTINELS, MASK, EOS)
    source, target = corruption.apply(ids, random.Random(seed))
    assert source[-1] == target[-1] == EOS
    gaps = [i for i in source if i == MASK or i in SENTINELS]
    kept = [i for i in source[:-1] if i not in gaps]
    hidden = length - len(kept)
    assert abs(hidden - 0.15 * length) <= 1
    assert kept == [i for i in ids if i in set(kept)]  # in order
    if bart:
        assert target[:-1] == ids
        return
    # putting each sentinel's span back into its gap gives the text
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert [t for i in source[:-1] for t in (spans[i] if i in SENTINELS else [i])] == ids
    assert gaps == list(SENTINELS[: len(gaps)])
    assert all(spans.values())


def test_padding_and_the_decoders_input():
    pairs = [Pair([5, 6, 7], [8, EOS], Position(), (0, 0)), Pair([5], [9, 9, EOS], Position(), (1, 1))]
    batch = collate_pairs(pairs, pad=0)
    assert batch.ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.labels.tolist() == [[8, EOS, IGNORE], [9, 9, EOS]]

    class Config:
        decoder_start_token_id, pad_token_id = 3, 0

    assert shift_right(batch.labels, Config).tolist() == [[3, 8, EOS], [3, 9, 9]]
    assert (batch.labels == torch.tensor([[8, EOS, IGNORE], [9, 9, EOS]])).all()


def test_a_decoders_first_token_is_that_of_generate():
    labels = torch.tensor([[8, EOS]])
    assert shift_right(labels, T5GemmaConfig(decoder={"bos_token_id": 5})).tolist() == [[5, 8]]  # names no other
    with pytest.raises(TrainingError, match="decoder_start_token_id; set it"):
        shift_right(labels, T5Config())
