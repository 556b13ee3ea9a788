"""Every pair of state and input has one outcome: a state of the table, or a refusal."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.protocol.worker_lifecycle import (
    TRANSITIONS,
    IllegalTransitionError,
    WorkerInput,
    WorkerState,
    next_state,
)

S, I = WorkerState, WorkerInput  # noqa: E741


@pytest.mark.parametrize(("state", "happened"), list(product(S, I)))
def test_a_pair_leads_where_the_table_says_or_is_refused(
    state: WorkerState, happened: WorkerInput
) -> None:
    if (state, happened) in TRANSITIONS:
        assert next_state(state, happened) is TRANSITIONS[state, happened]
    else:
        with pytest.raises(IllegalTransitionError, match=happened.name.lower()):
            next_state(state, happened)


def test_a_worker_asks_nothing_before_it_serves() -> None:
    for state in (S.SPAWNED, S.GREETED):
        assert (state, I.REQUEST) not in TRANSITIONS


def test_a_worker_greets_only_once() -> None:
    assert (S.GREETED, I.HELLO) not in TRANSITIONS
    assert (S.SERVING, I.HELLO) not in TRANSITIONS


@given(st.lists(st.sampled_from(list(I))))
def test_no_sequence_leads_out_of_gone(inputs: list[WorkerInput]) -> None:
    state = S.GONE
    for happened in inputs:
        try:
            state = next_state(state, happened)
        except IllegalTransitionError:
            continue
    assert state is S.GONE


@pytest.mark.parametrize("state", [s for s in S if s is not S.GONE])
def test_a_worker_may_end_in_every_state(state: WorkerState) -> None:
    assert next_state(state, I.EXIT) is S.GONE
