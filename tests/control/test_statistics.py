"""Counters of workers that come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.control.statistics import Statistics
from toppy.model.counters import WorkerCounters


def test_nothing_reported_is_nothing() -> None:
    assert Statistics().by_slot() == {}
    assert Statistics().total() == WorkerCounters()


def test_the_latest_report_of_each_slot_counts() -> None:
    statistics = Statistics()
    statistics.report(0, WorkerCounters(tunnels_total=1, tunnels_open=1))
    statistics.report(0, WorkerCounters(tunnels_total=5, tunnels_open=2))
    statistics.report(1, WorkerCounters(tunnels_total=7, tunnels_open=3))
    assert {slot: c.tunnels_total for slot, c in statistics.by_slot().items()} == {0: 5, 1: 7}
    total = statistics.total()
    assert (total.tunnels_total, total.tunnels_open) == (12, 5)


def test_what_a_dead_worker_counted_is_kept_and_what_it_had_open_is_not() -> None:
    statistics = Statistics()
    statistics.report(
        0,
        WorkerCounters(
            tunnels_total=5,
            tunnels_open=2,
            connections_open=1,
            drops={"queue_full": 3},
            admissions={"granted": 5},
        ),
    )
    statistics.worker_gone(0)
    assert statistics.total() == WorkerCounters(
        tunnels_total=5, drops={"queue_full": 3}, admissions={"granted": 5}
    )
    statistics.report(0, WorkerCounters(tunnels_total=1, tunnels_open=1, drops={"queue_full": 1}))
    total = statistics.total()
    assert (total.tunnels_total, total.tunnels_open, total.drops) == (6, 1, {"queue_full": 4})


def test_a_worker_that_never_reported_leaves_nothing() -> None:
    statistics = Statistics()
    statistics.worker_gone(3)
    assert statistics.by_slot() == {}


def test_reading_changes_nothing() -> None:
    statistics = Statistics()
    statistics.report(0, WorkerCounters(pings=1, drops={"malformed": 1}))
    statistics.worker_gone(0)
    statistics.report(0, WorkerCounters(pings=1, drops={"malformed": 1}))
    first = statistics.total()
    first.drops["malformed"] += 100
    assert statistics.total().drops == {"malformed": 2}
    assert statistics.total().pings == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 100))), max_size=50)
)
def test_totals_never_decrease_whatever_dies(steps: list[tuple[int, int | None]]) -> None:
    statistics = Statistics()
    running = dict.fromkeys(range(4), 0)
    before = 0
    for slot, more in steps:
        if more is None:
            statistics.worker_gone(slot)
            running[slot] = 0
        else:
            running[slot] += more
            statistics.report(slot, WorkerCounters(datagrams_to_target=running[slot]))
        after = statistics.total().datagrams_to_target
        assert after >= before
        before = after


def test_what_a_worker_last_said_counts_when_it_has_ended_under_the_next_control_plane() -> None:
    before = Statistics()
    before.report(0, WorkerCounters(pings=1))
    before.worker_gone(0)
    before.report(0, WorkerCounters(pings=10))
    before.report(1, WorkerCounters(pings=100, tunnels_open=1))
    after = Statistics(before.past, before.latest)
    assert after.total().pings == 111
    after.worker_gone(0)
    after.report(1, WorkerCounters(pings=200))
    assert after.total().pings == 211
