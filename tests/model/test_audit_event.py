"""Audit events: their facts survive the reason that carries them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.model.audit_event import Fact, parse_facts, reason_with_facts

KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_facts_follow_the_sentence() -> None:
    facts: dict[str, Fact] = {
        "tunnel": "s0g1c2t0",
        "duration_s": 1.5,
        "is_echo": False,
        "rule": "office DNS",
    }
    said = reason_with_facts("the client ended it", facts)
    assert said == (
        'the client ended it; tunnel=s0g1c2t0 duration_s=1.5 is_echo=false rule="office DNS"'
    )


@given(TEXTS, st.dictionaries(KEYS, TEXTS, min_size=1, max_size=5))
def test_facts_are_found_again(text: str, facts: dict[str, str]) -> None:
    assert parse_facts(reason_with_facts(text, facts)) == (text, facts)


def test_a_reason_without_facts_is_all_sentence() -> None:
    assert parse_facts("no rule allows it; sorry") == ("no rule allows it; sorry", {})
    assert parse_facts("") == ("", {})
    assert reason_with_facts("", {}) == ""


@given(st.text(max_size=60))
def test_any_reason_can_be_read(reason: str) -> None:
    text, facts = parse_facts(reason)
    assert facts or text == reason


def test_a_value_cannot_pretend_to_be_other_facts() -> None:
    said = reason_with_facts("denied", {"host": 'x; subject="root'})
    assert parse_facts(said) == ("denied", {"host": 'x; subject="root'})
