"""Rollouts: from a request to the next generation, or to a reason and nothing changed."""

from __future__ import annotations

import asyncio
import signal
from typing import cast

import pytest

from tests.control.stage import Run, Stage, settings_for, settle, until
from toppy.control.generation import GenerationState
from toppy.control.listeners import Listeners
from toppy.control.rollouts import Outcome, Plan, ReloadError, Rollouts
from toppy.errors import ConfigError
from toppy.protocol.rollout import RolloutState
from toppy.wire.ipc_message import Drain, Ready


class Configuration:
    """What a rollout reads: the next revision for ``workers`` workers, or ``error``."""

    def __init__(self) -> None:
        self.revision = 1
        self.workers = 1
        self.waits_for_slots = False
        self.error: ConfigError | None = None
        self.reads = 0
        self.committed: list[int] = []

    def prepare(self) -> Plan:
        self.reads += 1
        if self.error is not None:
            raise self.error

        def commit() -> int:
            self.revision += 1
            self.committed.append(self.revision)
            return self.revision

        return Plan(
            revision=self.revision + 1,
            workers=self.workers,
            settings_for=settings_for,
            drain_timeout_s=30.0,
            waits_for_slots=self.waits_for_slots,
            warnings=("a warning",),
            commit=commit,
        )


class Gateway:
    """A stage with rollouts."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.configuration = Configuration()
        self.rollouts = Rollouts(
            stage.supervisor, cast(Listeners, stage.listeners), self.configuration.prepare
        )

    def request(self) -> asyncio.Task[Outcome]:
        return asyncio.create_task(self.rollouts.request())

    async def until_starting(self, *slots: int) -> None:
        """Until the next generation's workers run in these slots, and have said nothing."""
        await until(lambda: self.rollouts.state is RolloutState.STARTING)
        assert set(slots) <= self.stage.supervisor.workers.keys()

    async def reload(self, *slots: int) -> Outcome:
        """A whole rollout that succeeds."""
        outcome = self.request()
        await self.until_starting(*slots)
        self.stage.bring_up(*slots)
        return await outcome

    @property
    def generations(self) -> dict[int, GenerationState]:
        return {number: g.state for number, g in self.stage.supervisor.generations.items()}

    def assert_unchanged(self) -> None:
        """Generation 1 serves in slot 0, and nothing else is left."""
        assert self.generations == {1: GenerationState.ACTIVE}
        assert list(self.stage.supervisor.workers) == [0]
        assert self.stage.serving() == [0]
        assert self.stage.listeners.active == [0]
        assert self.stage.sent(Drain) == []
        assert self.configuration.committed == []
        assert self.rollouts.state is RolloutState.IDLE


def test_the_next_generation_serves_and_the_earlier_one_drains(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = await gateway.reload(1)
        assert (outcome.generation, outcome.revision) == (2, 2)
        assert outcome.warnings == ("a warning",)
        assert gateway.generations == {1: GenerationState.DRAINING, 2: GenerationState.ACTIVE}
        assert stage.listeners.active == [1]
        assert stage.sent(Drain) == [(stage.peer(0), Drain(30.0))]
        assert gateway.configuration.committed == [2]
        assert gateway.rollouts.state is RolloutState.IDLE

    run(scenario)


def test_nothing_is_switched_or_committed_before_every_worker_serves(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.workers = 2
        outcome = gateway.request()
        await gateway.until_starting(1, 2)
        stage.bring_up(1)
        stage.greet(2)
        await stage.pass_time(5.0)
        assert stage.listeners.active == [0]
        assert gateway.configuration.committed == []
        assert not outcome.done()

    run(scenario)


def test_the_number_of_workers_may_change(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.workers = 3
        await gateway.reload(1, 2, 3)
        assert stage.listeners.active == [1, 2, 3]
        gateway.configuration.workers = 1
        await gateway.reload(4)
        assert stage.listeners.active == [4]

    run(scenario)


# two at once


def test_a_request_during_a_rollout_gets_the_next_one(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        first = gateway.request()
        await gateway.until_starting(1)
        second = gateway.request()
        await settle()
        stage.bring_up(1)
        assert (await first).generation == 2
        assert not second.done()
        await gateway.until_starting(2)
        stage.bring_up(2)
        assert (await second).generation == 3
        assert gateway.configuration.reads == 2

    run(scenario)


def test_all_requests_during_a_rollout_get_one_together(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        first = gateway.request()
        await gateway.until_starting(1)
        later = [gateway.request() for _ in range(5)]
        await settle()
        stage.bring_up(1)
        await first
        await gateway.until_starting(2)
        stage.bring_up(2)
        assert {(await each).generation for each in later} == {3}
        await settle()
        assert gateway.rollouts.state is RolloutState.IDLE
        assert gateway.configuration.reads == 2

    run(scenario)


def test_a_request_that_was_remembered_runs_after_a_failure_too(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        first = gateway.request()
        await gateway.until_starting(1)
        second = gateway.request()
        await settle()
        stage.process(1).end(1)
        with pytest.raises(ReloadError):
            await first
        await gateway.until_starting(1)
        stage.bring_up(1)
        assert (await second).revision == 2

    run(scenario)


def test_who_no_longer_waits_does_not_disturb(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        first = gateway.request()
        await gateway.until_starting(1)
        first.cancel()
        await settle()
        stage.bring_up(1)
        await until(lambda: gateway.rollouts.state is RolloutState.IDLE)
        assert stage.listeners.active == [1]
        await gateway.reload(2)

    run(scenario)


# what goes wrong


def test_a_wrong_configuration_changes_nothing(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.error = ConfigError("workers = 0: must be 1 or more", key="workers")
        with pytest.raises(ConfigError, match="workers = 0"):
            await gateway.rollouts.request()
        gateway.assert_unchanged()
        assert len(stage.processes) == 1

    run(scenario)


def test_a_rollout_after_a_wrong_configuration_works(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.error = ConfigError("wrong")
        with pytest.raises(ConfigError):
            await gateway.rollouts.request()
        gateway.configuration.error = None
        assert (await gateway.reload(1)).revision == 2

    run(scenario)


@pytest.mark.parametrize("which", [1, 2])
def test_a_worker_that_fails_takes_the_whole_generation_back(run: Run, which: int) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.workers = 2
        outcome = gateway.request()
        await gateway.until_starting(1, 2)
        stage.bring_up(3 - which)
        processes = stage.processes[1:]
        stage.process(which).end(1)
        with pytest.raises(ReloadError, match="did not come up"):
            await outcome
        assert all(process.has_ended for process in processes)
        gateway.assert_unchanged()

    run(scenario)


def test_workers_that_take_too_long_are_taken_back(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = gateway.request()
        await gateway.until_starting(1)
        process = stage.process(1)
        await stage.pass_time(16.0)
        with pytest.raises(ReloadError, match="did not come up"):
            await outcome
        assert process.signals == [signal.SIGKILL]
        gateway.assert_unchanged()

    run(scenario)


@pytest.mark.parametrize("how_many_start", [0, 1])
def test_a_process_that_cannot_be_started_takes_the_others_back(
    run: Run, how_many_start: int
) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        gateway.configuration.workers = 2
        start = stage.supervisor._start_process
        left = [how_many_start]

        def refuse(settings: object) -> object:
            if not left[0]:
                raise OSError("no memory")
            left[0] -= 1
            return start(settings)  # type: ignore[arg-type]

        stage.supervisor._start_process = refuse  # type: ignore[assignment]
        with pytest.raises(ReloadError, match="no memory"):
            await gateway.rollouts.request()
        assert all(process.has_ended for process in stage.processes[1:])
        gateway.assert_unchanged()

    run(scenario)


def test_where_the_kernel_refuses_the_switch_everything_is_taken_back(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = gateway.request()
        await gateway.until_starting(1)
        stage.greet(1)
        # one refusal when the worker is ready, one at the switch
        stage.listeners.refusals = [OSError("no"), OSError("no")]
        stage.say(Ready("native"), 1)
        with pytest.raises(ReloadError, match="cannot be steered"):
            await outcome
        gateway.assert_unchanged()

    run(scenario)


def test_a_failed_generations_number_is_not_used_again(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = gateway.request()
        await gateway.until_starting(1)
        stage.process(1).end(1)
        with pytest.raises(ReloadError):
            await outcome
        assert (await gateway.reload(1)).generation == 3

    run(scenario)


def test_a_failing_worker_of_the_serving_generation_survives_a_failed_rollout(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        stage.process(0).end(1)
        await until(lambda: 0 not in stage.supervisor.workers)
        outcome = gateway.request()
        await gateway.until_starting(1)
        await stage.pass_time(1.0)
        stage.process(1).end(1)
        with pytest.raises(ReloadError):
            await outcome
        stage.bring_up(0)
        gateway.assert_unchanged()

    run(scenario)


# slots


def test_without_free_slots_a_rollout_fails_and_says_what_to_do(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        with pytest.raises(ReloadError, match=r"1 slots are needed and 0 are free.*drain g1"):
            await gateway.rollouts.request()
        assert gateway.generations == {1: GenerationState.DRAINING, 2: GenerationState.ACTIVE}
        assert gateway.rollouts.state is RolloutState.IDLE

    run(scenario, slots=2)


def test_a_slot_that_has_become_free_is_used(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        stage.process(0).end(0)
        await until(stage.supervisor.free_slots)
        assert (await gateway.reload(0)).generation == 3

    run(scenario, slots=2)


def test_a_rollout_may_wait_for_free_slots(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        gateway.configuration.waits_for_slots = True
        outcome = gateway.request()
        await stage.pass_time(590.0)
        assert gateway.rollouts.state is RolloutState.PREPARING
        stage.process(0).end(0)
        await gateway.until_starting(0)
        stage.bring_up(0)
        assert (await outcome).generation == 3

    run(scenario, slots=2)


def test_a_rollout_does_not_wait_for_ever(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        gateway.configuration.waits_for_slots = True
        outcome = gateway.request()
        await stage.pass_time(601.0)
        with pytest.raises(ReloadError, match="1 slots are needed and 0 are free"):
            await outcome
        assert gateway.rollouts.state is RolloutState.IDLE

    run(scenario, slots=2)


def test_a_rollout_that_waited_reads_the_configuration_again(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        gateway.configuration.waits_for_slots = True
        outcome = gateway.request()
        await settle()
        gateway.configuration.error = ConfigError("somebody has broken it meanwhile")
        stage.process(0).end(0)
        with pytest.raises(ConfigError, match="meanwhile"):
            await outcome
        assert gateway.rollouts.state is RolloutState.IDLE

    run(scenario, slots=2)


def test_a_revision_is_counted_at_the_switch(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = gateway.request()
        await gateway.until_starting(1)
        gateway.configuration.revision = 5  # policies were pushed while the workers came up
        stage.bring_up(1)
        assert (await outcome).revision == 6
        assert stage.supervisor.generations[2].revision == 6

    run(scenario)


def test_a_request_while_one_waits_is_remembered(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.reload(1)
        gateway.configuration.waits_for_slots = True
        first, second = gateway.request(), gateway.request()
        await settle()
        stage.process(0).end(0)
        await gateway.until_starting(0)
        stage.bring_up(0)
        assert (await first).generation == 3
        assert not second.done()
        stage.process(1).end(0)
        await gateway.until_starting(1)
        stage.bring_up(1)
        assert (await second).generation == 4

    run(scenario, slots=2)


# the gateway stops


@pytest.mark.parametrize("state", ["preparing", "starting", "remembered"])
def test_stopping_ends_what_is_under_way_and_whoever_waits(run: Run, state: str) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        if state == "preparing":
            await gateway.reload(1)
            gateway.configuration.waits_for_slots = True
        waiting = [gateway.request()]
        await settle()
        if state == "remembered":
            waiting.append(gateway.request())
            await settle()
        assert gateway.rollouts.state.value == ("preparing" if state == "preparing" else "starting")
        await gateway.rollouts.stop()
        await settle()
        assert all(each.cancelled() for each in waiting)
        assert gateway.rollouts.state is RolloutState.STOPPED
        assert gateway.configuration.committed in ([], [2])

    run(scenario, slots=2)


def test_a_gateway_that_stops_begins_no_rollout(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        await gateway.rollouts.stop()
        with pytest.raises(ReloadError, match="stopping"):
            await gateway.rollouts.request()
        assert len(stage.processes) == 1

    run(scenario)


def test_a_rollout_that_was_stopped_leaves_its_workers_to_be_stopped_with_all_others(
    run: Run,
) -> None:
    async def scenario(stage: Stage) -> None:
        gateway = Gateway(stage)
        outcome = gateway.request()
        await gateway.until_starting(1)
        stage.bring_up(1)
        await gateway.rollouts.stop()
        await stage.supervisor.stop(4.0)
        assert [process.signals for process in stage.processes] == [[signal.SIGTERM]] * 2
        assert outcome.cancelled()

    run(scenario)
