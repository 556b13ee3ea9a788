"""Refusals that repeat: told at once, then in counts; nothing is missing from the sum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.protocol.refusal_tally import OTHERS, RefusalKind, RefusalTally, Repeated

A = RefusalKind("192.0.2.1", 401, "the token is wrong")
B = RefusalKind("192.0.2.2", 401, "the token is wrong")
BEGIN = 1_700_000_000.0


def tally(most_kinds: int = 10) -> RefusalTally:
    return RefusalTally(interval_s=60.0, most_kinds=most_kinds)


def test_the_first_of_a_kind_is_told_at_once_and_further_ones_are_not() -> None:
    counts = tally()
    assert counts.add(A, "x", BEGIN) == A
    assert counts.add(A, "y", BEGIN + 1) is None
    assert counts.add(B, "x", BEGIN + 1) == B


def test_further_ones_are_told_after_an_interval_with_their_count() -> None:
    counts = tally()
    for number in range(4):
        counts.add(A, f"target {number}", BEGIN + number)
    assert not list(counts.take_due(BEGIN + 59.9))
    assert list(counts.take_due(BEGIN + 60)) == [Repeated(A, 3, "target 3", BEGIN)]
    assert counts.add(A, "x", BEGIN + 61) is None  # it goes on
    assert not list(counts.take_due(BEGIN + 119))
    assert list(counts.take_due(BEGIN + 120)) == [Repeated(A, 1, "x", BEGIN + 60)]


def test_a_kind_that_did_not_repeat_is_new_again() -> None:
    counts = tally(most_kinds=1)
    counts.add(A, "x", BEGIN)
    assert not list(counts.take_due(BEGIN + 60))
    assert counts.add(B, "x", BEGIN + 61) == B


def test_kinds_beyond_the_bound_are_one_for_each_status() -> None:
    counts = tally(most_kinds=1)
    counts.add(A, "x", BEGIN)
    others = RefusalKind("", 401, OTHERS)
    assert counts.add(B, "x", BEGIN) == others
    assert counts.add(RefusalKind("192.0.2.3", 401, "another"), "y", BEGIN) is None
    assert counts.add(RefusalKind("192.0.2.3", 400, "z"), "y", BEGIN) == RefusalKind(
        "", 400, OTHERS
    )
    assert list(counts.take_due(BEGIN + 60)) == [Repeated(others, 1, "y", BEGIN)]


def test_numbers_in_a_reason_make_no_other_kind_and_who_asked_does() -> None:
    counts = tally()
    assert counts.add(RefusalKind("a", 429, "wait 59 s", "bob", "r"), "x", BEGIN) is not None
    assert counts.add(RefusalKind("a", 429, "wait 58 s", "bob", "r"), "x", BEGIN) is None
    assert counts.add(RefusalKind("a", 429, "wait 58 s", "carol", "r"), "x", BEGIN) is not None
    (repeated,) = counts.take_due(BEGIN + 60)
    assert repeated.kind.reason == "wait 59 s"


def test_what_the_caller_does_not_take_stays() -> None:
    counts = tally()
    for kind in (A, A, B, B):
        counts.add(kind, "x", BEGIN)
    assert next(counts.take_due(BEGIN + 60)).kind == A
    assert [each.kind for each in counts.take_due(BEGIN + 60)] == [B]


def test_at_the_end_everything_is_told() -> None:
    counts = tally()
    counts.add(A, "x", BEGIN)
    counts.add(A, "x", BEGIN, count=7)
    assert [each.count for each in counts.take_due(BEGIN, everything=True)] == [7]


def test_a_clock_that_was_set_back_does_not_stop_it() -> None:
    counts = tally()
    counts.add(A, "x", BEGIN)
    counts.add(A, "x", BEGIN)
    assert [each.count for each in counts.take_due(BEGIN - 3600)] == [1]


_STEPS = st.lists(
    st.tuples(
        st.integers(0, 12),  # source
        st.sampled_from([400, 401, 429]),
        st.integers(1, 5),  # count
        st.floats(0, 90),  # seconds until the next
    ),
    max_size=200,
)


@given(_STEPS)
def test_every_refusal_is_told_once_and_what_is_told_has_a_bound(
    steps: list[tuple[int, int, int, float]],
) -> None:
    counts, now, added, told = tally(most_kinds=4), BEGIN, 0, 0
    times: list[float] = []
    for source, status, count, pause in steps:
        added += count
        if counts.add(RefusalKind(str(source), status, "no"), "x", now, count) is not None:
            told += count
            times.append(now)
        now += pause
        for each in counts.take_due(now):
            told += each.count
            times.append(now)
    told += sum(each.count for each in counts.take_due(now, everything=True))
    assert told == added
    # four kinds and three statuses, twice each
    for begin in times:
        assert sum(begin <= at < begin + 60 for at in times) <= 2 * (4 + 3)
