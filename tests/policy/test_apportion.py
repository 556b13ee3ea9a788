"""Parts of an amount: fair, whole, and never more than there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.policy.apportion import apportion


def test_who_is_alone_gets_everything() -> None:
    assert apportion(1000, [0]) == [1000]


def test_who_all_want_more_than_there_is_share_equally() -> None:
    assert apportion(1000, [5000, 900, 100_000, 800]) == [250] * 4


def test_who_wants_little_gets_it_and_the_others_share_the_rest() -> None:
    assert apportion(1000, [100, 5000, 5000]) == [100, 450, 450]


def test_what_nobody_wants_is_shared_by_all() -> None:
    assert apportion(1000, [100, 300]) == [400, 600]


def test_who_wants_nothing_has_enough_to_begin_with() -> None:
    idle, busy = apportion(1_000_000, [0, 10**9])
    assert (idle, busy) == (25_000, 975_000)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_nobody_is_left_with_nothing(total: int) -> None:
    assert min(apportion(total, [0, 10, 10**9, 5])) == 1


@given(st.integers(1, 10**12), st.lists(st.integers(0, 10**12), min_size=1, max_size=70))
def test_parts_add_up_to_no_more_than_there_is(total: int, wanted: list[int]) -> None:
    parts = apportion(total, wanted)
    assert len(parts) == len(wanted)
    assert min(parts) >= 1
    assert sum(parts) <= max(total, len(wanted))
    # and hardly anything is left over
    assert sum(parts) >= total - 2 * len(wanted)


@given(st.integers(1000, 10**12), st.lists(st.integers(0, 10**12), min_size=2, max_size=20))
def test_who_wants_more_gets_no_less(total: int, wanted: list[int]) -> None:
    parts = apportion(total, wanted)
    in_order = [part for _, part in sorted(zip(wanted, parts, strict=True))]
    assert all(b >= a - 1 for a, b in itertools.pairwise(in_order))
