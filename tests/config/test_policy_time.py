"""The times of a policy rule, as they are written."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toppy.config.gateway import parse_gateway_config
from toppy.config.policy import PolicyRule
from toppy.config.policy_time import DAY_MINUTES, When, find_zone, parse_moment
from toppy.errors import ConfigError


def when(**times: Any) -> When:
    return When.model_validate(times)


@pytest.mark.parametrize(
    ("written", "days"),
    [
        ("mon", (0,)),
        ("Mon-Fri", (0, 1, 2, 3, 4)),
        ("fri-mon", (0, 4, 5, 6)),
        (["sat", "sun"], (5, 6)),
        (["wed - thu", "mon"], (0, 2, 3)),
        ("mon-sun", tuple(range(7))),
    ],
)
def test_days_are_names_and_ranges(written: Any, days: tuple[int, ...]) -> None:
    assert when(days=written).days == days


@pytest.mark.parametrize(
    ("written", "hours"),
    [
        ("08:00-18:00", ((480, 1080),)),
        ("22:00-06:00", ((1320, 1800),)),
        ("00:00-24:00", ((0, 1440),)),
        (["08:00-12:00", " 13:00 - 17:30 "], ((480, 720), (780, 1050))),
    ],
)
def test_hours_are_from_and_to_perhaps_over_midnight(written: Any, hours: Any) -> None:
    assert when(hours=written).hours == hours


def test_a_moment_without_an_offset_is_the_zones() -> None:
    found = when(
        zone="Europe/Berlin", not_before="2026-03-01T08:00", not_after="2026-07-01T08:00:00Z"
    )
    assert found.not_before is not None
    assert found.not_before.astimezone(UTC) == datetime(2026, 3, 1, 7, tzinfo=UTC)
    assert found.not_after == datetime(2026, 7, 1, 8, tzinfo=UTC)


def test_a_date_is_the_whole_day_at_both_ends() -> None:
    found = when(not_before=date(2026, 3, 1), not_after="2026-03-01")
    assert found.not_before == datetime(2026, 3, 1, tzinfo=UTC)
    assert found.not_after == datetime(2026, 3, 2, tzinfo=UTC)


def test_toml_dates_and_times_are_taken_as_they_are() -> None:
    text = (
        '[auth]\ntoken = "long-enough"\n[[policy.rules]]\naction = "allow"\n[policy.rules.when]\n'
        'days = ["mon-fri"]\nnot_before = 2026-03-01\nnot_after = 2026-04-01T00:00:00+02:00\n'
    )
    (rule,) = parse_gateway_config(text, "f", {}).config.policy.rules
    assert rule.when is not None
    assert rule.when.not_before == datetime(2026, 3, 1, tzinfo=UTC)
    assert rule.when.not_after == datetime(2026, 4, 1, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    "times",
    [
        {},
        {"zone": "UTC"},
        {"days": []},
        {"days": "someday"},
        {"days": "mon-"},
        {"days": "-mon"},
        {"days": 1},
        {"days": None},
        {"hours": []},
        {"hours": "8:00-18:00"},
        {"hours": "08:00"},
        {"hours": "24:00-06:00"},
        {"hours": "08:60-18:00"},
        {"hours": "08:00-24:01"},
        {"hours": "08:00-25:00"},
        {"hours": "08:00-08:00"},
        {"hours": "٠٨:00-18:00"},
        {"hours": 8},
        {"days": "mon", "zone": "Mars/Olympus"},
        {"days": "mon", "zone": "../../etc/passwd"},
        {"days": "mon", "zone": "/etc/localtime"},
        {"days": "mon", "zone": ""},
        {"days": "mon", "zone": 5},
        {"not_before": "soon"},
        {"not_before": 1_700_000_000},
        {"not_before": True},
        {"not_before": "0001-01-01"},
        {"not_after": "9999-12-31"},
        {"not_before": "2026-03-02", "not_after": "2026-03-01"},
        {"not_before": "2026-03-01T00:00Z", "not_after": "2026-03-01T00:00Z"},
        {"days": "mon", "to": "08:00"},
    ],
)
def test_times_that_are_unclear_are_refused(times: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        when(**times)


def test_an_unknown_zone_is_named_with_its_key() -> None:
    text = (
        '[auth]\ntoken = "long-enough"\n[[policy.rules]]\naction = "allow"\n'
        'when = { days = "mon", zone = "Mars/Olympus" }\n'
    )
    with pytest.raises(ConfigError, match="Mars/Olympus") as error:
        parse_gateway_config(text, "gateway.toml", {})
    assert "when.zone" in str(error.value)


def test_utc_needs_no_zone_data() -> None:
    assert find_zone("UTC") is UTC


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(list(When.model_fields)), JUNK))
def test_any_times_are_taken_or_refused(times: dict[str, Any]) -> None:
    try:
        found = when(**times)
    except ValidationError:
        return
    assert all(0 <= begin < end <= 2 * DAY_MINUTES for begin, end in found.hours)
    assert all(0 <= day < 7 for day in found.days)


@given(st.text(max_size=30))
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    try:
        moment = parse_moment(text, UTC)
    except ValueError:
        return
    assert moment.tzinfo is not None


def test_a_rule_has_its_times() -> None:
    rule = PolicyRule.model_validate({"action": "allow", "when": {"days": "mon"}})
    assert rule.when == when(days="mon")
