"""Meters: what may go is bounded by every limit, exact, and shared where it is to be shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.model.rate import Budget, DirectionLimits, Rate, TunnelLimits
from toppy.policy.meter import BudgetDemand, Lane, Meters, single_meter

MIB = 1 << 20
A, B = "a", "b"


def byte_limit(per_s: int, burst: int) -> DirectionLimits:
    return DirectionLimits(bytes=Rate(per_s, burst))


def lane(limits: DirectionLimits) -> Lane:
    meter = single_meter(limits, 0.0)
    assert meter is not None
    assert meter.to_target is not None
    return meter.to_target


def to_target(meters: Meters, key: str, limits: TunnelLimits, now: float = 0.0) -> Lane:
    meter = meters.attach(key, limits, now)
    assert meter is not None
    assert meter.to_target is not None
    return meter.to_target


def shared(budget: Budget) -> TunnelLimits:
    return TunnelLimits(budgets=(budget,))


def demands(meters: Meters) -> dict[str, BudgetDemand]:
    return {each.name: each for each in meters.take_demands()}


# one tunnel


def test_without_limits_there_is_no_meter() -> None:
    meters = Meters()
    assert meters.attach(A, TunnelLimits(), 0.0) is None
    assert single_meter(DirectionLimits(), 0.0) is None
    meters.detach(A)


def test_a_stretch_is_cut_after_the_last_datagram_that_fits() -> None:
    limited = lane(byte_limit(1000, 1000))
    assert limited.take_datagrams(1500, 300, 0.0) == 3
    # what the fourth would have taken of the bucket is there for a smaller one
    assert limited.take_datagrams(100, 0, 0.0) == 1
    assert limited.take_datagrams(1, 0, 0.0) == 0


def test_a_stretch_whose_last_datagram_is_short_goes_whole() -> None:
    limited = lane(byte_limit(1000, 1000))
    assert limited.take_datagrams(1000, 300, 0.0) == 4
    assert limited.take_datagrams(1, 0, 0.0) == 0


def test_an_empty_datagram_costs_no_bytes() -> None:
    limited = lane(byte_limit(1, 1))
    assert limited.take_datagrams(1, 0, 0.0) == 1
    assert limited.take_datagrams(0, 0, 0.0) == 1


def test_datagrams_are_counted_apart_from_bytes() -> None:
    limited = lane(DirectionLimits(Rate(10_000, 10_000), Rate(5, 5)))
    assert limited.take_datagrams(700, 100, 0.0) == 5
    assert limited.take_datagrams(0, 0, 0.0) == 0
    assert limited.take_datagrams(700, 100, 0.4) == 2


def test_directions_have_a_bucket_each() -> None:
    meter = single_meter(byte_limit(100, 100), 0.0)
    assert meter is not None
    assert meter.to_target is not None
    assert meter.to_client is not None
    assert meter.to_target.take_datagrams(100, 0, 0.0) == 1
    assert meter.to_client.take_datagrams(100, 0, 0.0) == 1


def test_a_stream_takes_what_there_is_and_is_told_how_long_to_wait() -> None:
    limited = lane(byte_limit(1000, 1000))
    assert limited.room(5000, 0.0) == 1000
    assert limited.take_bytes(5000, 0.0) == 1000
    assert limited.room(5000, 0.0) == 0
    wait_s = limited.wait_s(500, 0.0)
    assert wait_s == pytest.approx(0.5, abs=1e-5)
    assert limited.take_bytes(500, wait_s) == 500


@given(
    rate=st.integers(1, 10**9),
    burst=st.integers(1, 10**8),
    stretches=st.lists(
        st.tuples(st.integers(0, 65_507), st.integers(0, 9000), st.floats(0.0, 2.0)), max_size=40
    ),
)
def test_never_more_than_burst_and_rate(
    rate: int, burst: int, stretches: list[tuple[int, int, float]]
) -> None:
    limited, now, passed = lane(byte_limit(rate, burst)), 0.0, 0
    for size, segment_size, pause_s in stretches:
        now += pause_s
        granted = limited.take_datagrams(size, segment_size, now)
        count = -(-size // segment_size) if segment_size else 1
        assert 0 <= granted <= count
        passed += size if granted == count else granted * segment_size
    assert passed <= burst + rate * now + 1


@pytest.mark.parametrize("rate", [1 * MIB, 10 * MIB, 100 * MIB])
@pytest.mark.parametrize("segment_size", [64, 1200, 1350])
@pytest.mark.parametrize("overload", [1.1, 3.0])
def test_over_ten_seconds_the_rate_is_kept_within_two_percent(
    rate: int, segment_size: int, overload: float
) -> None:
    """In stretches as the kernel joins them, irregular in size and time, besides the burst, which a
    bucket that starts full allows once. It has room for a few stretches of 64 KiB.
    """
    burst = 256 * 1024
    limited = lane(byte_limit(rate, burst))
    passed, offered, now, turn = 0, 0, 0.0, 0
    while now < 10.0:
        turn += 1
        segments = 1 + turn * 7919 % min(64, 65_000 // segment_size)
        size = segments * segment_size
        offered += size
        granted = limited.take_datagrams(size, segment_size, now)
        passed += granted * segment_size
        now += size / (rate * overload) * (0.5 + turn * 104_729 % 1000 / 1000)
    assert offered > 1.05 * rate * now
    assert passed <= burst + rate * now
    assert passed - burst == pytest.approx(rate * now, rel=0.02)


# budgets


def test_tunnels_of_one_budget_share_it() -> None:
    meters = Meters()
    budget = Budget("rule", to_target=byte_limit(1000, 1000))
    first = to_target(meters, A, shared(budget))
    second = to_target(meters, B, shared(budget))
    assert first.take_datagrams(600, 0, 0.0) == 1
    assert second.take_datagrams(600, 0, 0.0) == 0
    assert second.take_datagrams(400, 0, 0.0) == 1


def test_every_limit_of_a_tunnel_is_charged_and_the_tightest_decides() -> None:
    meters = Meters()
    budget = Budget("rule", to_target=byte_limit(1000, 1000))
    tight = to_target(meters, A, TunnelLimits(byte_limit(300, 300), (budget,)))
    wide = to_target(meters, B, shared(budget))
    assert tight.take_datagrams(1000, 100, 0.0) == 3
    # what the tight one did not get is not taken from the others
    assert wide.take_datagrams(1000, 100, 0.0) == 7


def test_a_budget_without_tunnels_is_told_once_more_and_forgotten() -> None:
    meters = Meters()
    limited = to_target(meters, A, shared(Budget("rule", to_target=byte_limit(1000, 1000))))
    limited.take_datagrams(100, 0, 0.0)
    meters.detach(A)
    assert demands(meters)["rule"] == BudgetDemand("rule", 0, 100, 100, 0, 1, 0)
    assert demands(meters) == {}
    meters.change([], 0.1)  # what was taken has come back
    assert demands(meters) == {}
    assert meters.budgets == 0


def test_closing_a_tunnel_and_opening_another_gains_no_burst() -> None:
    meters = Meters()
    budget = Budget("rule", to_target=byte_limit(100, 1000), to_client=byte_limit(100, 1000))
    passed = 0
    for second in range(20):
        limited = to_target(meters, A, shared(budget), float(second))
        passed += limited.take_bytes(9999, float(second))
        meters.detach(A)
        demands(meters)
    assert passed == 1000 + 100 * 19
    # alone with it or not, what is left of the other direction is full
    later = meters.attach(A, shared(budget), 30.0)
    assert later is not None
    assert later.to_client is not None
    assert later.to_client.room(9999, 30.0) == 1000


def test_idle_budgets_are_remembered_up_to_a_bound() -> None:
    meters = Meters(most_idle=2)
    for name in ("one", "two", "three"):
        limited = to_target(meters, A, shared(Budget(name, to_target=byte_limit(100, 1000))))
        limited.take_bytes(1000, 0.0)
        meters.detach(A)
    demands(meters)
    assert meters.budgets == 2
    again = to_target(meters, A, shared(Budget("three", to_target=byte_limit(100, 1000))))
    assert again.room(9999, 0.0) == 0


def test_only_what_is_new_is_told() -> None:
    meters = Meters()
    limited = to_target(meters, A, shared(Budget("rule", to_target=byte_limit(1000, 1000))))
    assert demands(meters)["rule"].tunnels == 1
    assert demands(meters) == {}
    limited.take_datagrams(5000, 1000, 0.0)
    assert demands(meters)["rule"] == BudgetDemand("rule", 1, 1000, 5000, 0, 5, 0)
    assert demands(meters) == {}
    meters.tell_again()
    assert demands(meters)["rule"].tunnels == 1


def test_a_smaller_part_takes_what_was_saved_up_and_a_larger_one_gives_nothing_at_once() -> None:
    meters = Meters()
    limited = to_target(meters, A, shared(Budget("rule", to_target=byte_limit(1000, 1000))))
    meters.change([Budget("rule", to_target=byte_limit(100, 100))], 0.0)
    assert limited.room(9999, 0.0) == 100
    meters.change([Budget("rule", to_target=byte_limit(1000, 1000))], 0.0)
    assert limited.room(9999, 0.0) == 100
    meters.change([Budget("nobody's", to_target=byte_limit(1, 1))], 0.0)


def test_other_limits_apply_to_a_live_tunnel_at_once() -> None:
    meters = Meters()
    before = to_target(meters, A, TunnelLimits(byte_limit(100, 100)))
    before.take_datagrams(100, 0, 0.0)
    after = to_target(meters, A, TunnelLimits(byte_limit(200, 100)))
    # what it had used stays used: a reload is no gift
    assert after.room(9999, 0.0) == 0
    assert after.room(9999, 0.25) == 50
    assert meters.attach(A, TunnelLimits(), 1.0) is None


def test_a_tunnel_may_move_to_another_budget() -> None:
    meters = Meters()
    to_target(meters, A, shared(Budget("old", to_target=byte_limit(1000, 1000))))
    to_target(meters, A, shared(Budget("new", to_target=byte_limit(1000, 1000))))
    told = demands(meters)
    assert "old" not in told or told["old"].tunnels == 0
    assert told["new"].tunnels == 1
    assert meters.budgets == 1


# quotas


def test_a_quota_counts_both_directions_and_then_nothing_passes() -> None:
    meters = Meters()
    meter = meters.attach(A, shared(Budget("quota", quota_left=100_000)), 0.0)
    assert meter is not None
    assert meter.to_target is not None
    assert meter.to_client is not None
    assert meter.to_target.take_datagrams(60_000, 1000, 0.0) == 60
    assert meter.to_client.take_datagrams(60_000, 1000, 0.0) == 40
    assert meter.to_target.is_spent
    assert meter.to_client.take_datagrams(1000, 1000, 1e6) == 0
    assert meter.to_client.room(1000, 1e6) == 0
    assert meter.to_client.wait_s(1000, 1e6) > 0
    assert demands(meters)["quota"].used_bytes == 100_000


def test_what_was_used_and_not_told_yet_is_no_part_of_what_is_left() -> None:
    meters = Meters()
    limited = to_target(meters, A, shared(Budget("quota", quota_left=100_000)))
    limited.take_datagrams(50_000, 1000, 0.0)
    meters.change([Budget("quota", quota_left=100_000)], 0.0)
    assert limited.room(100_000, 0.0) == 50_000


@given(st.integers(0, 10**6), st.lists(st.integers(0, 65_507), max_size=40))
def test_a_quota_is_never_passed(left: int, sizes: list[int]) -> None:
    meters = Meters()
    limited = to_target(meters, A, shared(Budget("quota", quota_left=left)))
    passed = sum(size * limited.take_datagrams(size, 0, 0.0) for size in sizes)
    assert passed <= left
