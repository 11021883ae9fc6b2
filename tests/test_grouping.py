import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_attn_patch import GroupingError, KVGrouping, grouping


def test_docstrings():
    assert doctest.testmod(grouping).failed == 0


@given(st.integers(1, 64), st.integers(1, 16))
def test_every_query_head_reads_the_head_that_lists_it(hkv, g):
    groups = KVGrouping(hkv * g, hkv)
    seen = [h for kv in range(hkv) for h in groups.query_heads(kv)]
    assert seen == list(range(hkv * g))
    assert all(h in groups.query_heads(groups.kv_head(h)) for h in seen)


@pytest.mark.parametrize(("hq", "hkv"), [(8, 3), (8, 0), (0, 1), (8, -2), (4, 8)])
def test_impossible_numbers_are_refused(hq, hkv):
    with pytest.raises(GroupingError):
        KVGrouping(hq, hkv)


def test_kinds():
    assert [KVGrouping(8, n).kind for n in (8, 4, 1)] == ["MHA", "GQA", "MQA"]


@given(st.sampled_from([(16, 8, 4, 2), (24, 12, 6, 3), (32, 32, 8, 1)]))
def test_merging_composes(sizes):
    hq, a, b, c = sizes
    one = KVGrouping(hq, a).merged(c)
    two = [[h for m in mid for h in KVGrouping(hq, a).merged(b)[m]] for mid in KVGrouping(hq, b).merged(c)]
    assert [list(r) for r in one] == two
