"""Every pair of state and input has one outcome: one of the table, or a refusal."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.protocol.rollout import (
    TRANSITIONS,
    IllegalRolloutError,
    Rollout,
    RolloutCommand,
    RolloutInput,
    RolloutState,
)

S, I, C = RolloutState, RolloutInput, RolloutCommand  # noqa: E741


def at(state: RolloutState) -> Rollout:
    rollout = Rollout()
    rollout.state = state
    return rollout


@pytest.mark.parametrize(("state", "happened"), list(product(S, I)))
def test_a_pair_leads_where_the_table_says_or_is_refused(
    state: RolloutState, happened: RolloutInput
) -> None:
    rollout = at(state)
    if (state, happened) in TRANSITIONS:
        expected, command = TRANSITIONS[state, happened]
        assert rollout.handle(happened) is command
        assert rollout.state is expected
    else:
        with pytest.raises(IllegalRolloutError, match=happened.value):
            rollout.handle(happened)
        assert rollout.state is state


@pytest.mark.parametrize("state", [s for s in S if s is not S.IDLE and s is not S.STOPPED])
def test_a_request_during_a_rollout_is_remembered_once(state: RolloutState) -> None:
    rollout = at(state)
    assert rollout.handle(I.REQUESTED) is C.REMEMBER
    assert rollout.handle(I.REQUESTED) is C.REMEMBER
    assert rollout.take_remembered()
    assert not rollout.take_remembered()


@pytest.mark.parametrize("state", list(S))
def test_the_gateway_may_stop_in_every_state(state: RolloutState) -> None:
    rollout = at(state)
    rollout.handle(I.STOP)
    assert rollout.state is S.STOPPED
    assert not rollout.take_remembered()


def possible(state: RolloutState) -> list[RolloutInput]:
    return [happened for (at_state, happened) in TRANSITIONS if at_state is state]


@given(st.lists(st.integers(min_value=0), max_size=60))
def test_workers_that_were_started_are_switched_to_or_ended(choices: list[int]) -> None:
    """Over every permitted sequence: one serving generation, and no next one left behind."""
    rollout = Rollout()
    is_next_running = False
    for choice in choices:
        inputs = possible(rollout.state)
        command = rollout.handle(inputs[choice % len(inputs)])
        if rollout.state is S.STOPPED:
            return  # all workers are stopped then, whatever they are
        if command is C.START_WORKERS:
            assert not is_next_running
            is_next_running = True
        elif command in (C.DRAIN_OLD, C.END_NEW):
            assert is_next_running
            is_next_running = False
        elif command in (C.PREPARE, C.GIVE_UP):
            assert not is_next_running
        if rollout.state is S.IDLE:
            assert not is_next_running


@given(st.lists(st.integers(min_value=0), max_size=60))
def test_no_way_leads_out_of_stopped(choices: list[int]) -> None:
    rollout = at(S.STOPPED)
    for choice in choices:
        inputs = possible(S.STOPPED)
        rollout.handle(inputs[choice % len(inputs)])
        assert rollout.state is S.STOPPED


def test_nothing_is_switched_before_every_worker_is_ready() -> None:
    switching = [pair for pair, (_, command) in TRANSITIONS.items() if command is C.SWITCH]
    assert switching == [(S.STARTING, I.ALL_READY)]
