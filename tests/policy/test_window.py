"""When a rule holds, and until when: zones, midnights, and clocks that are set."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from toppy.config.policy_time import When, find_zone
from toppy.policy.window import TimeWindow

BERLIN = "Europe/Berlin"
"""Clocks go forward on 2026-03-29 at 02:00 and back on 2026-10-25 at 03:00."""


def window(**times: Any) -> TimeWindow:
    return TimeWindow(When.model_validate(times))


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=find_zone(zone)).timestamp()


@pytest.mark.parametrize(
    ("times", "moment", "is_open"),
    [
        ({"days": "mon-fri"}, "2026-03-06T23:59:59", True),
        ({"days": "mon-fri"}, "2026-03-07T00:00:00", False),
        ({"hours": "08:00-18:00"}, "2026-03-07T08:00:00", True),
        ({"hours": "08:00-18:00"}, "2026-03-07T07:59:59", False),
        ({"hours": "08:00-18:00"}, "2026-03-07T18:00:00", False),
        ({"days": "fri", "hours": "22:00-06:00"}, "2026-03-06T05:00:00", False),
        ({"days": "fri", "hours": "22:00-06:00"}, "2026-03-06T22:00:00", True),
        ({"days": "fri", "hours": "22:00-06:00"}, "2026-03-07T05:59:59", True),
        ({"days": "fri", "hours": "22:00-06:00"}, "2026-03-07T06:00:00", False),
        ({"not_before": "2026-03-07"}, "2026-03-06T23:59:59", False),
        ({"not_before": "2026-03-07"}, "2026-03-07T00:00:00", True),
        ({"not_after": "2026-03-07"}, "2026-03-07T23:59:59", True),
        ({"not_after": "2026-03-07"}, "2026-03-08T00:00:00", False),
        ({"days": "mon", "not_after": "2026-03-01"}, "2026-03-02T12:00:00", False),
        ({"hours": ["08:00-12:00", "13:00-17:00"]}, "2026-03-07T12:30:00", False),
    ],
)
def test_a_moment_is_inside_or_not(times: dict[str, Any], moment: str, is_open: bool) -> None:
    assert window(**times).is_open(at(moment)) is is_open


def test_days_and_hours_are_the_zones() -> None:
    office = window(days="mon-fri", hours="08:00-18:00", zone=BERLIN)
    assert office.is_open(at("2026-03-02T07:00:00"))
    assert not office.is_open(at("2026-03-02T06:59:59"))
    assert office.is_open(at("2026-07-01T06:00:00"))  # summer time
    assert not window(days="mon", zone="Pacific/Auckland").is_open(at("2026-03-02T12:00:00"))


@pytest.mark.parametrize(
    ("times", "moment", "change"),
    [
        ({"hours": "08:00-18:00"}, "2026-03-06T09:00", "2026-03-06T18:00"),
        ({"hours": "08:00-18:00"}, "2026-03-06T18:00", "2026-03-07T08:00"),
        ({"days": "mon-fri"}, "2026-03-02T09:00", "2026-03-07T00:00"),
        ({"days": "mon"}, "2026-03-03T00:00", "2026-03-09T00:00"),
        ({"hours": ["08:00-12:00", "12:00-18:00"]}, "2026-03-06T09:00", "2026-03-06T18:00"),
        ({"hours": ["08:00-14:00", "12:00-18:00"]}, "2026-03-06T09:00", "2026-03-06T18:00"),
        ({"hours": ["18:00-24:00", "00:00-06:00"]}, "2026-03-06T20:00", "2026-03-07T06:00"),
        ({"days": "mon", "not_before": "2027-03-02"}, "2026-03-01T00:00", "2027-03-08T00:00"),
        ({"days": "mon", "not_before": "2027-03-08"}, "2026-03-01T00:00", "2027-03-08T00:00"),
        ({"days": "mon", "not_after": "2026-03-01T10:00"}, "2026-02-23T01:00", "2026-02-24T00:00"),
        (
            {"hours": "08:00-18:00", "not_after": "2026-03-06T10:00"},
            "2026-03-06T09:00",
            "2026-03-06T10:00",
        ),
        ({"not_before": "2026-03-07T01:00"}, "2026-03-06T09:00", "2026-03-07T01:00"),
    ],
)
def test_the_next_change_is_foreseen(times: dict[str, Any], moment: str, change: str) -> None:
    assert window(**times).next_change(at(moment)) == at(change)


@pytest.mark.parametrize(
    ("times", "moment"),
    [
        ({"hours": "00:00-24:00"}, "2026-03-06T09:00"),
        ({"days": "mon-sun"}, "2026-03-06T09:00"),
        ({"days": "mon-sun", "zone": BERLIN}, "2026-03-28T09:00"),
        ({"days": "mon-sun", "zone": BERLIN}, "2026-10-24T09:00"),
        ({"not_before": "2026-03-01"}, "2026-03-06T09:00"),
        ({"not_after": "2026-03-01"}, "2026-03-06T09:00"),
        ({"days": "mon", "not_after": "2026-03-01"}, "2026-03-06T09:00"),
    ],
)
def test_what_never_changes_says_so(times: dict[str, Any], moment: str) -> None:
    assert window(**times).next_change(at(moment)) is None


def test_a_time_that_the_clocks_skip_is_the_one_that_they_show_then() -> None:
    late = window(hours="02:30-05:00", zone=BERLIN)
    assert not late.is_open(at("2026-03-29T01:29:59"))  # 03:29:59 there
    assert late.is_open(at("2026-03-29T01:30:00"))
    assert late.next_change(at("2026-03-29T01:30:00")) == at("2026-03-29T03:00:00")


def test_a_week_whose_only_time_the_clocks_skip_does_not_close_it_for_ever() -> None:
    night = window(days="sun", hours="02:30-03:15", zone=BERLIN)
    assert not night.is_open(at("2026-03-23T12:00"))
    assert night.next_change(at("2026-03-23T12:00")) == at("2026-04-05T00:30")
    assert night.is_open(at("2026-04-05T00:45"))


def test_a_time_that_comes_twice_is_the_first_one() -> None:
    early = window(hours="01:00-02:30", zone=BERLIN)
    assert early.is_open(at("2026-10-25T00:29:59"))  # 02:29:59, summer time
    assert not early.is_open(at("2026-10-25T00:30:00"))
    assert not early.is_open(at("2026-10-25T01:15:00"))  # 02:15 again
    assert early.next_change(at("2026-10-25T01:15:00")) == at("2026-10-26T00:00:00")


def test_the_reason_tells_the_local_time() -> None:
    office = window(days="mon-fri", hours="08:00-18:00", zone=BERLIN, not_after="2026-12-31")
    assert office.describe(at("2026-03-01T12:00")) == (
        "not at this time (sun 2026-03-01 13:00 Europe/Berlin)"
    )
    assert "its time is over" in office.describe(at("2027-01-01T12:00"))
    assert "it begins later" in window(not_before="2026-03-01").describe(at("2026-02-01T12:00"))


def test_a_clock_that_is_set_back_is_believed() -> None:
    office = window(hours="08:00-18:00")
    assert not office.is_open(at("2026-03-06T19:00"))
    assert office.is_open(at("2026-03-06T09:00"))


DAY_TEXTS = st.sampled_from(["mon", "mon-fri", "sat-sun", "fri-mon", "wed"])
CLOCKS = st.times().map(lambda each: f"{each:%H:%M}")
HOURS = st.tuples(CLOCKS, CLOCKS).filter(lambda pair: pair[0] != pair[1]).map("-".join)
TIMES = st.fixed_dictionaries(
    {"zone": st.sampled_from(["UTC", BERLIN, "America/New_York", "Asia/Kathmandu"])},
    optional={
        "days": st.lists(DAY_TEXTS, min_size=1, max_size=2),
        "hours": st.lists(HOURS, min_size=1, max_size=3),
        "not_before": st.datetimes(datetime(2025, 1, 1), datetime(2025, 12, 31)),  # noqa: DTZ001
        "not_after": st.datetimes(datetime(2026, 1, 1), datetime(2027, 12, 31)),  # noqa: DTZ001
    },
).filter(lambda times: len(times) > 1)
MOMENTS = st.integers(int(at("2024-12-01T00:00")), int(at("2028-01-31T00:00"))).map(float)


@given(TIMES, MOMENTS, st.floats(0, 1))
@example({"zone": BERLIN, "hours": ["02:30-03:00"]}, at("2026-03-29T00:00"), 0.5)
def test_nothing_changes_before_the_next_change(
    times: dict[str, Any], moment: float, part: float
) -> None:
    found = window(**times)
    is_open, change = found.is_open(moment), found.next_change(moment)
    until = change if change is not None else moment + 86_400 * 6
    # asked of another one: nothing is remembered there
    between = moment + (until - moment) * part
    if between < until:
        assert window(**times).is_open(between) is is_open
    if change is not None:
        assert change > moment
        assert window(**times).is_open(change) is not is_open


@given(TIMES, st.lists(MOMENTS, min_size=1, max_size=6))
def test_what_was_asked_before_changes_no_answer(
    times: dict[str, Any], moments: list[float]
) -> None:
    found = window(**times)
    for moment in moments:
        fresh = window(**times)
        assert found.is_open(moment) is fresh.is_open(moment)
        assert found.next_change(moment) == fresh.next_change(moment)


@given(TIMES, MOMENTS)
def test_without_bounds_the_local_clock_decides(times: dict[str, Any], moment: float) -> None:
    times = {key: value for key, value in times.items() if not key.startswith("not_")}
    if len(times) == 1:
        return
    local = datetime.fromtimestamp(moment, find_zone(times["zone"]))
    if (
        local.utcoffset() != datetime.fromtimestamp(moment - 86_400, local.tzinfo).utcoffset()
        or local.utcoffset() != datetime.fromtimestamp(moment + 86_400, local.tzinfo).utcoffset()
    ):
        return  # a day on which the clocks are set
    written = When.model_validate(times)
    days = written.days or tuple(range(7))
    minute = local.hour * 60 + local.minute
    expected = any(
        (local.weekday() in days and begin <= minute < end)
        or ((local.weekday() - 1) % 7 in days and begin <= minute + 1440 < end)
        for begin, end in written.hours or ((0, 1440),)
    )
    assert window(**times).is_open(moment) is expected
