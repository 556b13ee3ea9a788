"""A policy that changes: live tunnels are looked at again, until every worker has answered."""

from __future__ import annotations

import asyncio
import signal
from typing import cast

from tests.control.stage import (
    FakeAdmission,
    FakeProcess,
    Run,
    Stage,
    live_tunnel,
    saved_worker,
    settle,
    until,
)
from toppy.config.rates import RatesSection
from toppy.control.admission import Admission
from toppy.control.generation import Worker
from toppy.control.recheck import Recheck
from toppy.control.tunnel_audit import TunnelAudit
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial
from toppy.model.rate import DirectionLimits, Rate, TunnelLimits
from toppy.wire.ipc_message import CloseTunnels, ListTunnels, SetLimits, TunnelChange, TunnelPage

DENIED = Denial(403, "http_request_denied", "not any more", "no dns")


def rechecking(stage: Stage) -> Recheck:
    return Recheck(stage.supervisor, TunnelAudit(stage.audit))


def questions(stage: Stage, slot: int = 0) -> list[int]:
    """Those that a worker was asked, in order."""
    return [asked.request for peer, asked in stage.sent(ListTunnels) if peer == stage.peer(slot)]


async def answer(stage: Stage, slot: int, *connections: int) -> None:
    """Say what is open when it is asked the next time."""
    before = len(questions(stage, slot))
    while len(questions(stage, slot)) == before:
        await stage.pass_time(0.1)
    tunnels = tuple(live_tunnel(connection) for connection in connections)
    stage.say(TunnelPage(questions(stage, slot)[-1], tunnels, True), slot)


def cut(stage: Stage) -> list[tuple[bytes, CloseTunnels]]:
    return stage.sent(CloseTunnels)


def test_what_is_denied_is_cut_and_everybody_has_confirmed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.denied = DENIED
        applying = asyncio.create_task(rechecking(stage).apply())
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        for slot in (0, 1):
            stage.say(TunnelPage(questions(stage, slot)[0], (live_tunnel(slot),), True), slot)
        assert await applying == []
        assert cut(stage) == [
            (stage.peer(0), CloseTunnels(((0, 0),), DENIED)),
            (stage.peer(1), CloseTunnels(((1, 0),), DENIED)),
        ]
        await stage.pass_time(60.0)
        assert len(stage.sent(ListTunnels)) == 2

    run(scenario, serve=(0, 1))


def test_a_worker_that_does_not_answer_is_named_and_asked_until_it_does(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.denied = DENIED
        recheck = rechecking(stage)
        applying = asyncio.create_task(recheck.apply())
        await until(lambda: stage.sent(ListTunnels))
        stage.say(TunnelPage(questions(stage, 1)[0], (), True), 1)
        await stage.pass_time(5.5)
        assert await applying == ["s0"]
        assert cut(stage) == []
        await answer(stage, 0, 7)
        await until(lambda: cut(stage))
        assert cut(stage) == [(stage.peer(0), CloseTunnels(((7, 0),), DENIED))]
        await settle()
        asked = len(stage.sent(ListTunnels))
        await stage.pass_time(60.0)
        assert len(stage.sent(ListTunnels)) == asked
        await recheck.stop()

    run(scenario, serve=(0, 1))


def test_a_worker_that_will_not_hear_of_a_cut_has_not_confirmed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.denied = DENIED
        recheck = rechecking(stage)
        applying = asyncio.create_task(recheck.apply())
        await until(lambda: stage.sent(ListTunnels))
        stage.server.is_full = True
        stage.say(TunnelPage(questions(stage)[0], (live_tunnel(7),), True))
        assert await applying == ["s0"]
        stage.server.is_full = False
        await answer(stage, 0, 7)
        await until(lambda: cut(stage))
        await recheck.stop()

    run(scenario)


def test_a_worker_that_was_taken_over_and_not_heard_yet_is_asked_when_it_is(run: Run) -> None:
    def adopt(stage: Stage) -> None:
        stage.start(0)
        _, _, line = saved_worker(0, 1, FakeProcess())
        stage.worker(0).line = line

    async def scenario(stage: Stage) -> None:
        stage.admission.denied = DENIED
        recheck = rechecking(stage)
        assert await recheck.apply() == ["s0"]
        stage.bring_up(0)
        await answer(stage, 0, 7)
        await until(lambda: cut(stage))
        await recheck.stop()

    run(scenario, begin=adopt)


def test_a_worker_that_ends_is_asked_no_more(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        applying = asyncio.create_task(recheck.apply())
        await stage.pass_time(5.5)
        assert await applying == ["s0"]
        gone: Worker = stage.worker(0)
        stage.process().end(-9)
        await until(lambda: stage.supervisor.workers.get(0) is not gone)
        asked = len(stage.sent(ListTunnels))
        await asyncio.sleep(20.0)
        assert len(stage.sent(ListTunnels)) == asked
        await recheck.stop()

    run(scenario)


def test_a_worker_that_reports_and_never_answers_is_ended(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        applying = asyncio.create_task(recheck.apply())
        process = stage.process()
        for _ in range(90):
            if stage.process() is process:
                stage.report(WorkerCounters())
            await asyncio.sleep(0.5)
            if process.has_ended:
                break
        assert process.signals == [signal.SIGKILL]
        assert await applying == ["s0"]
        await recheck.stop()

    run(scenario)


def test_many_who_ask_at_once_are_served_by_two_runs(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        applying = [asyncio.create_task(recheck.apply()) for _ in range(200)]
        for runs in (1, 2):
            await until(lambda: len(stage.sent(ListTunnels)) == runs)  # noqa: B023
            stage.say(TunnelPage(questions(stage)[-1], (), True))
        assert await asyncio.gather(*applying) == [[]] * 200
        await stage.pass_time(1.0)
        assert len(stage.sent(ListTunnels)) == 2

    run(scenario)


def test_who_asks_while_one_runs_gets_a_run_of_the_policy_that_holds_then(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        first = asyncio.create_task(recheck.apply())
        await until(lambda: len(stage.sent(ListTunnels)) == 1)
        second = asyncio.create_task(recheck.apply())
        await settle()
        stage.say(TunnelPage(questions(stage)[-1], (live_tunnel(7),), True))
        await first
        assert cut(stage) == []
        stage.admission.denied = DENIED
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        stage.say(TunnelPage(questions(stage)[-1], (live_tunnel(7),), True))
        await second
        assert len(cut(stage)) == 1
        third = asyncio.create_task(recheck.apply())
        await until(lambda: len(stage.sent(ListTunnels)) == 3)
        third.cancel()
        await recheck.stop()

    run(scenario)


async def watching(stage: Stage) -> asyncio.Task[None]:
    task = asyncio.create_task(rechecking(stage).watch())
    await settle()
    return task


def test_tunnels_are_looked_at_when_the_time_of_a_rule_begins_or_ends(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.windows = (True, False)
        watch = await watching(stage)
        await stage.pass_time(60.0)
        assert stage.sent(ListTunnels) == []
        stage.admission.windows = (True, True)
        stage.admission.denied = DENIED
        await answer(stage, 0, 7)
        await until(lambda: cut(stage))
        assert cut(stage) == [(stage.peer(0), CloseTunnels(((7, 0),), DENIED))]
        await stage.pass_time(60.0)
        assert len(stage.sent(ListTunnels)) == 1
        watch.cancel()

    run(scenario)


def test_a_change_within_a_second_of_a_new_policy_is_not_missed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.windows = (True,)
        watch = await watching(stage)
        newer = FakeAdmission()
        newer.windows = (True,)
        stage.supervisor.admission = cast(Admission, newer)
        await answer(stage, 0)
        watch.cancel()

    run(scenario)


def test_a_new_policy_without_times_is_applied_by_who_brought_it(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        watch = await watching(stage)
        stage.supervisor.admission = cast(Admission, FakeAdmission())
        await stage.pass_time(10.0)
        assert stage.sent(ListTunnels) == []
        watch.cancel()

    run(scenario)


# rates


def limit(stage: Stage, bytes_per_sec: int) -> None:
    """The limits that hold from now on."""
    rates = RatesSection.model_validate({"udp_bytes_per_sec": bytes_per_sec})
    stage.supervisor.rates.configure(rates, (), 0)


def test_live_tunnels_are_told_of_other_limits_once_and_of_the_rule_that_holds_now(
    run: Run,
) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        limit(stage, 1000)

        async def apply() -> None:
            applying = asyncio.create_task(recheck.apply())
            await answer(stage, 0, 7)
            assert await applying == []

        await apply()  # nothing has changed since the worker was born
        assert stage.sent(SetLimits) == []
        limit(stage, 2000)
        stage.admission.renamed = {"dns": "names"}
        await apply()
        await apply()
        limits = TunnelLimits(DirectionLimits(bytes=Rate(2000, 2000)))
        told = [said for _, said in stage.sent(SetLimits)]
        assert told == [SetLimits((TunnelChange(7, 0, "names", limits),))]

    run(scenario)


def test_a_worker_that_did_not_hear_of_other_limits_is_pursued(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        recheck = rechecking(stage)
        limit(stage, 1000)
        limit(stage, 2000)
        applying = asyncio.create_task(recheck.apply())
        await until(lambda: stage.sent(ListTunnels))
        stage.server.is_full = True
        stage.say(TunnelPage(questions(stage)[0], (live_tunnel(7),), True))
        assert await applying == ["s0"]
        stage.server.is_full = False
        await answer(stage, 0, 7)
        await until(lambda: stage.sent(SetLimits))
        await recheck.stop()

    run(scenario)
