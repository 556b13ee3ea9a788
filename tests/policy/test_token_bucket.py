"""The rate limit: bounded by rate and burst, exact, on any clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import LocalError
from toppy.policy.token_bucket import TokenBucket

_RATES = st.integers(1, 10**10)
_BURSTS = st.integers(1, 10**9)
_SIZES = st.integers(0, 10**9)
_MOMENTS = st.floats(0.0, 2.0**22)
"""A monotonic clock's: 48 days."""


def test_it_starts_full() -> None:
    bucket = TokenBucket(100, 1000, 5.0)
    assert bucket.available(5.0) == 1000
    assert bucket.take(5000, 5.0) == 1000
    assert bucket.take(5000, 5.0) == 0


def test_it_gains_its_rate() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    bucket.take(1000, 0.0)
    assert bucket.take(5000, 2.5) == 250


def test_it_holds_no_more_than_the_burst() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    assert bucket.take(5000, 1e6) == 1000


def test_a_whole_that_does_not_fit_takes_nothing() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    assert not bucket.take_whole(1001, 0.0)
    assert bucket.take_whole(1000, 0.0)
    assert not bucket.take_whole(1, 0.0)
    assert bucket.take_whole(0, 0.0)


def test_many_small_looks_gain_as_much_as_one() -> None:
    """At 1 byte per second a nanosecond gains a billionth of a byte, and none is lost."""
    bucket = TokenBucket(1, 10, 0.0)
    bucket.take(10, 0.0)
    for tick in range(1, 1001):
        bucket.available(tick / 1000)
    assert bucket.available(1.0) == 1


def test_a_clock_that_goes_back_gives_nothing_twice() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    bucket.take(1000, 0.0)
    assert bucket.take(5000, 5.0) == 500
    assert bucket.take(5000, 1.0) == 0
    assert bucket.take(5000, 5.0) == 0
    assert bucket.take(5000, 6.0) == 100


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (0, 0), (-1, 1)])
def test_without_a_rate_or_a_burst_there_is_no_bucket(rate: int, burst: int) -> None:
    with pytest.raises(LocalError, match="at least 1 byte"):
        TokenBucket(rate, burst, 0.0)


@given(_RATES, _BURSTS, _MOMENTS, st.lists(st.tuples(_SIZES, _MOMENTS), max_size=50))
def test_it_never_grants_more_than_burst_and_rate_on_any_clock(
    rate: int, burst: int, began: float, steps: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate, burst, began)
    latest = began
    granted = 0
    for wanted, now in steps:
        latest = max(latest, now)
        took = bucket.take(wanted, now)
        assert 0 <= took <= min(wanted, burst)
        granted += took
        # clocks are read to the nanosecond
        assert granted <= burst + rate * (latest - began + 1e-9) + 1


@given(_RATES, _BURSTS, _MOMENTS, st.lists(st.floats(0.0, 10.0), min_size=1, max_size=50))
def test_who_takes_all_there_is_gets_the_exact_rate(
    rate: int, burst: int, began: float, waits: list[float]
) -> None:
    bucket = TokenBucket(rate, burst, began)
    bucket.take(burst, began)
    now = began
    level = 0
    for wait in waits:
        before_ns = round(now * 10**9)
        now += wait
        level = min(burst * 10**9, level + (round(now * 10**9) - before_ns) * rate)
        assert bucket.take(10**12, now) == level // 10**9
        level %= 10**9


@given(_RATES, _BURSTS, _SIZES, _SIZES, _MOMENTS)
def test_after_the_wait_the_bytes_may_go(
    rate: int, burst: int, spent: int, wanted: int, now: float
) -> None:
    bucket = TokenBucket(rate, burst, now)
    bucket.take(spent, now)
    wait_s = bucket.wait_s(wanted, now)
    size = min(wanted, burst)
    assert (wait_s == 0.0) == (size <= bucket.available(now))
    assert bucket.take_whole(size, now + wait_s)


@given(_RATES, _BURSTS, _SIZES, _MOMENTS)
def test_the_wait_is_no_longer_than_the_bytes_take(
    rate: int, burst: int, wanted: int, now: float
) -> None:
    bucket = TokenBucket(rate, burst, now)
    bucket.take(burst, now)
    assert bucket.wait_s(wanted, now) <= min(wanted, burst) / rate + 2.1e-6


def test_another_rate_holds_from_then_on_and_keeps_what_was_gained() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    bucket.take(1000, 0.0)
    bucket.change(200, 500, 1.0)
    assert bucket.available(1.0) == 100
    assert bucket.available(2.0) == 300
    bucket.change(200, 50, 2.0)
    assert bucket.available(2.0) == 50
    with pytest.raises(LocalError):
        bucket.change(0, 50, 2.0)


def test_a_bucket_is_full_until_something_is_taken_and_when_it_has_come_back() -> None:
    bucket = TokenBucket(100, 1000, 0.0)
    assert bucket.is_full(0.0)
    bucket.take(50, 0.0)
    assert not bucket.is_full(0.4)
    assert bucket.is_full(0.5)
