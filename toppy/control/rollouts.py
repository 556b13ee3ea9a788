"""Runs rollouts: obeys ``toppy.protocol.rollout`` with a supervisor and its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from toppy.control.generation import Generation, SettingsFor
from toppy.control.listeners import Listeners
from toppy.control.supervisor import Supervisor
from toppy.errors import LocalError, ResourceLimitError, ToppyError
from toppy.observe.log import get_logger
from toppy.protocol.rollout import Rollout, RolloutCommand, RolloutInput, RolloutState

_SLOTS_DEADLINE_S = 600.0
"""``reload.when_full = "wait"`` waits no longer."""

_log = get_logger("rollout")


class ReloadError(LocalError):
    """A rollout did not happen; the serving generation goes on unchanged."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout is to lead to."""

    revision: int
    """Of the configuration, as far as is known when the plan is made."""
    workers: int
    settings_for: SettingsFor
    drain_timeout_s: float
    waits_for_slots: bool
    warnings: tuple[str, ...]
    commit: Callable[[], int]
    """Called at the switch: from here on the new configuration holds; its revision."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rollout has led to."""

    generation: int
    revision: int
    warnings: tuple[str, ...]
    duration_s: float


class Rollouts:
    """One rollout at a time; who asks meanwhile gets the next one, together with all who do."""

    def __init__(
        self, supervisor: Supervisor, listeners: Listeners, prepare: Callable[[], Plan]
    ) -> None:
        """``prepare`` reads the configuration; it raises ``ConfigError``."""
        self._supervisor = supervisor
        self._listeners = listeners
        self._prepare = prepare
        self._machine = Rollout()
        self._task: asyncio.Task[None] | None = None
        self._waiting: list[asyncio.Future[Outcome]] = []

    @property
    def state(self) -> RolloutState:
        """Where the rollout under way is."""
        return self._machine.state

    async def request(self) -> Outcome:
        """Until the next generation serves. Raises ``ToppyError`` that says why it does not."""
        wanted: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        match self._machine.handle(RolloutInput.REQUESTED):
            case RolloutCommand.PREPARE:
                self._task = asyncio.create_task(self._run([wanted]))
            case RolloutCommand.REMEMBER:
                self._waiting.append(wanted)
            case _:
                raise ReloadError("the gateway is stopping")
        return await wanted

    async def stop(self) -> None:
        """The gateway stops, whatever is under way."""
        self._machine.handle(RolloutInput.STOP)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for wanted in self._waiting:
            wanted.cancel()

    async def _run(self, wanted: list[asyncio.Future[Outcome]]) -> None:
        while True:
            try:
                outcome = await self._attempt()
            except ToppyError as error:
                for each in wanted:
                    if not each.cancelled():
                        each.set_exception(error)
            except asyncio.CancelledError:
                for each in wanted:
                    each.cancel()
                raise
            else:
                for each in wanted:
                    if not each.cancelled():
                        each.set_result(outcome)
            if not self._machine.take_remembered():
                return
            wanted, self._waiting = self._waiting, []
            self._machine.handle(RolloutInput.REQUESTED)

    async def _attempt(self) -> Outcome:
        began = time.monotonic()
        handle, supervisor = self._machine.handle, self._supervisor
        try:
            plan, slots = await self._prepare_with_slots()
        except ToppyError:
            handle(RolloutInput.REFUSED)
            raise
        handle(RolloutInput.PREPARED)
        generation: Generation | None = None
        try:
            generation = supervisor.start_generation(plan.revision, slots, plan.settings_for)
            await supervisor.wait_until_serving(generation)
        except (ResourceLimitError, OSError) as error:
            handle(RolloutInput.WORKER_FAILED)
            await self._roll_back(slots)
            raise ReloadError(f"the next generation did not come up: {error}") from None
        handle(RolloutInput.ALL_READY)
        before = supervisor.active
        try:
            supervisor.activate(generation)
        except OSError as error:
            handle(RolloutInput.SWITCH_FAILED)
            await self._roll_back(slots)
            raise ReloadError(f"packets cannot be steered to it: {error}") from None
        generation.revision = plan.commit()
        handle(RolloutInput.SWITCHED)
        if before is not None:
            supervisor.drain_generation(before, plan.drain_timeout_s)
        duration_s = round(time.monotonic() - began, 3)
        _log.info(
            "generation serves",
            generation=generation.number,
            revision=generation.revision,
            workers=plan.workers,
            duration_s=duration_s,
        )
        return Outcome(generation.number, generation.revision, plan.warnings, duration_s)

    async def _roll_back(self, slots: list[int]) -> None:
        for generation in list(self._supervisor.generations.values()):
            if generation.number == self._supervisor.newest and generation.slots == tuple(slots):
                await self._supervisor.end_generation(generation)
        self._machine.handle(RolloutInput.ROLLED_BACK)

    async def _prepare_with_slots(self) -> tuple[Plan, list[int]]:
        """The configuration, and free slots for its workers; it is read again after every wait.

        Raises ``ToppyError``.
        """
        supervisor = self._supervisor
        end = time.monotonic() + _SLOTS_DEADLINE_S
        while True:
            plan = self._prepare()
            supervisor.slot_freed.clear()
            free = supervisor.free_slots()
            if len(free) >= plan.workers:
                return plan, free[: plan.workers]
            running = sorted(g.number for g in supervisor.generations.values())
            why = (
                f"{plan.workers} slots are needed and {len(free)} are free: generations "
                f"{', '.join(f'g{number}' for number in running)} still run"
            )
            left_s = end - time.monotonic()
            if not plan.waits_for_slots or left_s <= 0:
                raise ReloadError(
                    f"{why}; end the oldest with `toppy-gw drain g{running[0]} --timeout 10`, or "
                    'set reload.when_full = "wait" or a shorter reload.drain_timeout_s'
                )
            _log.warning("reload waits for slots", reason=why)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await supervisor.slot_freed.wait()
