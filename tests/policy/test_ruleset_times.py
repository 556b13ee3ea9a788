"""Rules with times: which hold now, and when an allow ends."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.test_ruleset import ALICE, PUBLIC, decide, rules
from toppy.model.target import Target
from toppy.policy.ruleset import DEFAULT_RULE

OFFICE = {"days": "mon-fri", "hours": "08:00-18:00"}
NIGHT = {"hours": "22:00-06:00"}


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


MONDAY_9 = at("2026-03-02T09:00")
MONDAY_18 = at("2026-03-02T18:00")
MONDAY_20 = at("2026-03-02T20:00")
MONDAY_22 = at("2026-03-02T22:00")


def test_an_allow_ends_with_its_time() -> None:
    ruleset = rules({"name": "office", "when": OFFICE})
    open_now = decide(ruleset, PUBLIC, now=MONDAY_9)
    assert (open_now.rule, open_now.until) == ("office", MONDAY_18)
    closed = decide(ruleset, PUBLIC, now=MONDAY_18)
    assert (closed.is_allowed, closed.rule) == (False, DEFAULT_RULE)


def test_an_allow_without_times_does_not_end() -> None:
    assert decide(rules({}), PUBLIC, now=MONDAY_9).until is None


def test_an_allow_ends_where_the_time_of_a_deny_begins() -> None:
    ruleset = rules({"name": "all"}, {"name": "night", "action": "deny", "when": NIGHT})
    assert decide(ruleset, PUBLIC, now=MONDAY_20).until == MONDAY_22
    assert decide(ruleset, PUBLIC, now=MONDAY_22).rule == "night"


def test_an_allow_goes_on_where_another_rule_takes_over() -> None:
    ruleset = rules({"name": "office", "when": OFFICE}, {"name": "always"})
    decision = decide(ruleset, PUBLIC, now=MONDAY_9)
    assert (decision.rule, decision.until) == ("office", None)
    evening = {"hours": "17:00-22:00"}
    ruleset = rules({"name": "office", "when": OFFICE}, {"name": "evening", "when": evening})
    assert decide(ruleset, PUBLIC, now=MONDAY_9).until == MONDAY_22


def test_times_of_rules_that_do_not_match_end_nothing() -> None:
    ruleset = rules(
        {"name": "all"},
        {"action": "deny", "when": NIGHT, "ports": [1]},
        {"action": "deny", "when": NIGHT, "cidr": "10.0.0.0/8"},
        {"action": "deny", "when": NIGHT, "subjects": "bob"},
    )
    assert decide(ruleset, PUBLIC, now=MONDAY_20).until is None


def test_of_several_addresses_the_first_end_counts() -> None:
    ruleset = rules(
        {"cidr": "93.184.0.0/16"},
        {"cidr": "8.8.8.8", "when": OFFICE},
    )
    decision = decide(ruleset, "name.example", addresses=(PUBLIC, "8.8.8.8"), now=MONDAY_9)
    assert decision.addresses == (PUBLIC, "8.8.8.8")
    assert decision.until == MONDAY_18


def test_a_name_is_not_resolved_outside_the_time_of_its_rule() -> None:
    ruleset = rules({"when": OFFICE, "host": "db.example"})
    target = Target("db.example", 53)
    assert ruleset.may_resolve(ALICE, target, now=MONDAY_9).is_allowed
    assert not ruleset.may_resolve(ALICE, target, now=MONDAY_20).is_allowed


def test_a_client_decides_a_name_by_the_time() -> None:
    ruleset = rules({"when": OFFICE, "host": "db.example"}, guards_special=False)
    for moment, is_allowed in ((MONDAY_9, True), (MONDAY_20, False)):
        decision = ruleset.decide_name(ALICE, Target("db.example", 53), now=moment)
        assert decision is not None
        assert decision.is_allowed is is_allowed


def test_the_rules_that_hold_are_told_for_whoever_waits_for_a_change() -> None:
    ruleset = rules({"when": OFFICE}, {}, {"action": "deny", "when": NIGHT})
    assert ruleset.open_windows(MONDAY_9) == (True, False)
    assert ruleset.open_windows(MONDAY_20) == (False, False)
    assert ruleset.open_windows(MONDAY_22) == (False, True)
    assert rules({}).open_windows(MONDAY_9) == ()


def test_rules_that_take_turns_for_ever_end_an_allow_at_last() -> None:
    clock = [f"{minute // 60:02}:{minute % 60:02}" for minute in range(24 * 60)] + ["24:00"]
    minutes = [f"{begin}-{end}" for begin, end in pairwise(clock)]
    ruleset = rules({"when": {"hours": minutes[::2]}}, {"when": {"hours": minutes[1::2]}})
    decision = decide(ruleset, PUBLIC, now=at("2026-03-02T00:00"))
    assert decision.until == at("2026-03-02T01:04")


def test_the_time_is_among_the_reasons() -> None:
    ruleset = rules({"name": "office", "when": OFFICE})
    (finding,) = ruleset.explain(ALICE, Target(PUBLIC, 53), [PUBLIC], now=MONDAY_20)
    assert not finding.matches
    assert finding.reasons == ("when: not at this time (mon 2026-03-02 20:00 UTC)",)


TABLES = st.fixed_dictionaries(
    {"action": st.sampled_from(["allow", "deny"])},
    optional={
        "when": st.sampled_from(
            [
                OFFICE,
                NIGHT,
                {"days": "mon"},
                {"hours": ["08:00-09:30", "09:30-12:00"]},
                {"not_after": "2026-03-03T12:00"},
                {"not_before": "2026-03-02T12:00"},
            ]
        ),
        "cidr": st.sampled_from(["93.184.0.0/16", "8.8.8.8"]),
    },
)


@given(st.lists(TABLES, max_size=5), st.integers(0, 7 * 1440), st.floats(0, 1))
def test_an_allow_holds_until_its_end_and_not_at_it(
    tables: list[dict[str, Any]], minute: int, part: float
) -> None:
    now = at("2026-03-01T00:00") + 60.0 * minute
    ruleset = rules(*tables)
    decision = decide(ruleset, PUBLIC, now=now)
    if not decision.is_allowed:
        return
    until = decision.until if decision.until is not None else now + 14 * 86_400
    between = now + (until - now) * part
    if between < until:
        assert decide(ruleset, PUBLIC, now=between).is_allowed
    if decision.until is not None:
        assert decision.until > now
        assert not decide(ruleset, PUBLIC, now=decision.until).is_allowed


@pytest.mark.parametrize("moment", [MONDAY_9, MONDAY_20])
def test_asking_again_answers_the_same(moment: float) -> None:
    ruleset = rules({"when": OFFICE}, {"action": "deny", "when": NIGHT})
    assert decide(ruleset, PUBLIC, now=moment) == decide(ruleset, PUBLIC, now=moment)
