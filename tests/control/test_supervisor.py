"""The supervisor: how workers start, who may speak, what is answered, and how they end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from tests.control.stage import (
    GRANT,
    FakeAdmission,
    Run,
    Stage,
    question,
    settings_for,
    settle,
    until,
)
from toppy.control import supervisor as supervisor_module
from toppy.control.admission import Admission
from toppy.control.supervisor import start_worker
from toppy.errors import ResourceLimitError
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial
from toppy.protocol.worker_lifecycle import WorkerState
from toppy.system.processes import Process
from toppy.wire.ipc_message import (
    SETTINGS_LENGTH,
    Admitted,
    FromWorker,
    Hello,
    IpcError,
    Owners,
    Ready,
    Report,
    SetLogLevel,
    Stop,
    TokenAnswer,
    TokenRequest,
    parse_settings,
)

# the start


def test_a_generation_serves_once_every_worker_is_ready(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(0, 1)
        serving = asyncio.create_task(stage.supervisor.wait_until_serving(generation))
        stage.bring_up(0)
        stage.greet(1)
        await settle()
        assert not serving.done()
        stage.say(Ready("native"), 1)
        await serving
        assert stage.serving() == [0, 1]

    run(scenario, serve=())


def test_a_generation_gets_no_connection_before_it_is_activated(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(2, 3)
        stage.bring_up(2, 3)
        assert stage.listeners.active == [0, 1]
        stage.supervisor.activate(generation)
        assert stage.listeners.active == [2, 3]
        assert stage.listeners.live == [0, 1, 2, 3]

    run(scenario, serve=(0, 1))


def test_every_worker_is_told_who_serves_what(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.serve(2)
        told = dict(stage.sent(Owners))
        assert told == {
            stage.peer(slot): Owners(active=(2,), generations={0: 1, 1: 1, 2: 2})
            for slot in range(3)
        }

    run(scenario, serve=(0, 1))


def test_where_the_kernel_refuses_to_steer_the_active_generation_stays(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        before = stage.supervisor.active
        generation = stage.start(1)
        stage.bring_up(1)
        stage.listeners.refusals.append(OSError("no"))
        with pytest.raises(OSError, match="no"):
            stage.supervisor.activate(generation)
        assert stage.supervisor.active is before
        assert stage.listeners.active == [0]

    run(scenario)


def test_settings_go_through_the_pipe_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPPY_GW_TOKEN", "the token")
    monkeypatch.setenv("PATH", "/usr/bin")
    spawned: list[tuple[Sequence[str], bytes, Sequence[int], Mapping[str, str]]] = []

    def spawn(
        arguments: Sequence[str],
        said: bytes,
        *,
        descriptors: Sequence[int],
        environ: Mapping[str, str],
    ) -> Process:
        spawned.append((arguments, said, descriptors, environ))
        return cast(Process, None)

    monkeypatch.setattr(supervisor_module, "spawn", spawn)
    settings = settings_for(0, 1, 0, "the secret of a worker")
    start_worker(settings)
    ((arguments, said, descriptors, environ),) = spawned
    assert parse_settings(said[SETTINGS_LENGTH.size :]) == settings
    assert descriptors == [30, 31, 40, 41]
    assert environ["PATH"] == "/usr/bin"
    visible = str((arguments, environ))
    for secret in ("the token", "the secret of a worker", "the private key"):
        assert secret not in visible


def test_each_worker_has_a_secret_of_its_own(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        told = {process.settings.secret for process in stage.processes if process.settings}
        assert told == {stage.worker(slot).secret for slot in range(3)}
        assert len(told) == 3
        assert all(len(secret) == 64 for secret in told)

    run(scenario, serve=(0, 1, 2))


def test_a_worker_that_ends_before_it_is_ready_fails_its_generation(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(1, 2)
        stage.bring_up(1)
        stage.process(2).end(1)
        with pytest.raises(ResourceLimitError, match="ended before it served"):
            await stage.supervisor.wait_until_serving(generation)
        assert stage.listeners.active == [0]

    run(scenario)


def test_a_worker_that_ends_while_the_others_get_ready_fails_its_generation(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(1, 2)
        serving = asyncio.create_task(stage.supervisor.wait_until_serving(generation))
        await settle()
        stage.bring_up(1)
        stage.process(1).end(-11)
        await settle()
        stage.bring_up(2)
        with pytest.raises(ResourceLimitError):
            await serving

    run(scenario)


def test_workers_that_are_never_ready_fail_their_generation_and_are_ended(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(1)
        stage.greet(1)
        process = stage.process(1)
        with pytest.raises(ResourceLimitError, match=r"did not come up|ended before"):
            await stage.supervisor.wait_until_serving(generation)
        await until(lambda: process.signals == [signal.SIGKILL])

    run(scenario)


def test_a_generation_that_never_served_leaves_no_worker(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        generation = stage.start(1, 2)
        stage.bring_up(1)
        await stage.supervisor.end_generation(generation)
        assert stage.supervisor.free_slots() == [1, 2, 3]
        assert list(stage.supervisor.generations) == [1]
        assert stage.supervisor.deaths == 0
        assert len(stage.processes) == 3

    run(scenario, slots=4)


# who may speak


@pytest.mark.parametrize("secret", ["", "wrong", "fälschung", "\ud800"])
def test_a_process_without_the_secret_is_nobody(run: Run, secret: str) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.hear(b"stranger", Hello(0, 1, 1, secret))
        stage.server.hear(b"stranger", question())
        stage.server.hear(b"stranger", TokenRequest(1, "right"))
        stage.server.report(Report(0, 1, secret, WorkerCounters(pings=99)))
        stage.server.report(Report(99, 1, secret, WorkerCounters(pings=99)))
        stage.server.hear_garbage(IpcError("garbage"))
        await settle()
        assert stage.answers() == []
        assert stage.statistics.total().pings == 0
        assert stage.worker().state is WorkerState.SERVING

    run(scenario)


def test_a_hello_for_a_slot_that_does_not_exist_is_ignored(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.hear(b"stranger", Hello(99, 1, 1, stage.worker().secret))
        stage.server.hear(b"stranger", question())
        await settle()
        assert stage.answers() == []

    run(scenario)


@pytest.mark.parametrize(
    "message", [Ready("native"), Hello(0, 1, 1, ""), question(), TokenRequest(1, "right")]
)
def test_a_worker_that_speaks_out_of_turn_is_ended(run: Run, message: FromWorker) -> None:
    async def scenario(stage: Stage) -> None:
        if isinstance(message, Hello):
            process = stage.process()
            stage.greet()  # for the second time
        elif isinstance(message, Ready):
            process = stage.process()
            stage.say(message)  # likewise
        else:
            stage.start(1)
            process = stage.process(1)
            stage.greet(1)
            stage.say(message, 1)  # before it is ready
        assert process.signals == [signal.SIGKILL]
        assert stage.answers() == []

    run(scenario)


def test_a_worker_that_speaks_another_protocol_is_ended(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.start(1)
        worker = stage.worker(1)
        stage.say(Hello(1, 2, worker.process.pid, worker.secret, protocol=99), 1)
        assert stage.process(1).signals == [signal.SIGKILL]

    run(scenario)


# questions


def test_an_admission_is_answered_to_the_worker_that_asked(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(question(5), slot=1)
        await until(lambda: stage.sent(Admitted))
        assert stage.sent(Admitted) == [(stage.peer(1), Admitted(5, GRANT, None))]
        stage.admission.decision = denial = Denial(403, "http_request_denied", "no", "default")
        stage.say(question(6), slot=0)
        await until(lambda: len(stage.sent(Admitted)) == 2)
        assert stage.sent(Admitted)[1] == (stage.peer(0), Admitted(6, None, denial))

    run(scenario, serve=(0, 1))


def test_a_slow_decision_holds_nobody_up(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.may_answer.clear()
        stage.say(question(1))
        await until(lambda: stage.admission.asked)
        stage.say(TokenRequest(2, "right"))
        assert stage.answers() == [TokenAnswer(2, True)]
        stage.admission.may_answer.set()
        await until(lambda: len(stage.answers()) == 2)

    run(scenario)


def test_a_policy_that_changes_during_a_decision_is_the_one_that_decides(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.may_answer.clear()
        stage.say(question(1))
        await until(lambda: stage.admission.asked)
        denial = Denial(403, "http_request_denied", "not any more", "default")
        changed = FakeAdmission(denial)
        stage.supervisor.admission = cast(Admission, changed)
        stage.admission.may_answer.set()
        await until(stage.answers)
        assert changed.asked == [question(1)]
        assert stage.answers() == [Admitted(1, None, denial)]

    run(scenario)


def test_too_many_decisions_at_once_are_429(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_MAX_DECISIONS", 3)

    async def scenario(stage: Stage) -> None:
        stage.admission.may_answer.clear()
        for number in range(5):
            stage.say(question(number))
        refused = [a for a in stage.answers() if isinstance(a, Admitted) and a.denial is not None]
        assert [(a.request, a.denial.status) for a in refused if a.denial] == [(3, 429), (4, 429)]
        stage.admission.may_answer.set()
        await until(lambda: len(stage.answers()) == 5)
        stage.say(question(6))
        await until(lambda: len(stage.answers()) == 6)
        assert stage.answers()[-1] == Admitted(6, GRANT, None)

    run(scenario)


@pytest.mark.parametrize(("credential", "is_valid"), [("right", True), ("wrong", False)])
def test_a_token_is_answered(run: Run, credential: str, is_valid: bool) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(TokenRequest(9, credential))
        assert stage.answers() == [TokenAnswer(9, is_valid)]

    run(scenario)


def test_a_draining_workers_questions_are_answered(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.supervisor.drain_worker(stage.worker(), 10.0)
        stage.say(question(4))
        await until(lambda: stage.sent(Admitted))
        assert stage.sent(Admitted) == [(stage.peer(), Admitted(4, GRANT, None))]

    run(scenario)


def test_a_log_level_is_said_to_every_worker(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.supervisor.set_log_level("debug")
        assert stage.sent(SetLogLevel) == [
            (stage.peer(slot), SetLogLevel("debug")) for slot in range(2)
        ]

    run(scenario, serve=(0, 1))


# the end of a worker


def test_a_dead_worker_is_replaced_and_its_counters_are_kept(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first, secret = stage.process(), stage.worker().secret
        stage.report(WorkerCounters(pings=3, tunnels_open=2))
        first.end(-11)
        await settle()
        await stage.pass_time(1.0)
        assert len(stage.processes) == 2
        assert stage.supervisor.deaths == 1
        assert stage.worker().secret != secret
        assert stage.statistics.total() == WorkerCounters(pings=3)
        stage.bring_up()
        assert stage.serving() == [0]

    run(scenario)


def test_a_worker_that_lived_long_is_replaced_at_once(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.pass_time(60.0)
        stage.process().end(-9)
        await until(lambda: len(stage.processes) == 2)

    run(scenario)


def test_a_replacement_is_of_the_same_slot_place_and_generation(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process(3).end(-9)
        await stage.pass_time(1.0)
        settings = stage.process(3).settings
        assert settings is not None
        assert (settings.slot, settings.generation, settings.read) == (3, 1, (1,))

    run(scenario, serve=(2, 3))


def test_the_sockets_of_a_worker_that_was_killed_are_removed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        left = [stage.directory / name for name in ("worker-0.sock", "stray-0.sock")]
        others = stage.directory / "worker-1.sock"
        for path in (*left, others):
            path.touch()
        stage.process(0).end(-9)
        await until(lambda: 0 not in stage.supervisor.workers)
        assert not any(path.exists() for path in left)
        assert others.exists()

    run(scenario, serve=(0, 1))


def test_while_a_worker_is_missing_the_others_get_its_connections(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process(0).end(-9)
        await stage.pass_time(1.0)
        stage.bring_up(0)
        assert stage.listeners.active == [0, 1]
        assert stage.listeners.live == [0, 1]

    run(scenario, serve=(0, 1))


def test_a_dead_workers_last_words_change_nothing(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        secret, peer = stage.worker().secret, stage.peer()
        stage.process().end(-11)
        await stage.pass_time(1.0)
        stage.server.report(Report(0, 1, secret, WorkerCounters(pings=3)))
        stage.server.hear(peer, question())
        stage.server.hear(peer, Hello(0, 1, 1, secret))
        await settle()
        assert stage.statistics.total().pings == 0
        assert stage.answers() == []
        assert stage.worker().state is WorkerState.SPAWNED

    run(scenario)


def test_a_replacement_that_never_serves_is_ended_and_replaced(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process().end(-9)
        await stage.pass_time(40.0)
        assert len(stage.processes) == 4
        assert [process.signals for process in stage.processes[1:3]] == [[signal.SIGKILL]] * 2
        assert stage.supervisor.deaths == 3

    run(scenario)


def test_a_replacement_that_cannot_be_started_is_tried_again(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.spawn_failures = [OSError("no memory"), OSError("still none")]
        stage.process().end(-9)
        await stage.pass_time(2.0)
        assert not stage.spawn_failures
        assert len(stage.processes) == 2

    run(scenario)


def test_a_worker_that_says_nothing_is_ended_and_replaced(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        hanging = stage.process(0)
        for _ in range(40):
            stage.report(WorkerCounters(), 1)
            await asyncio.sleep(0.5)
        assert hanging.signals == [signal.SIGKILL]
        assert stage.process(1).signals == []
        assert stage.process(0) is not hanging

    run(scenario, serve=(0, 1))


def test_workers_are_not_blamed_for_a_control_plane_that_slept(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.pass_time(5.0)
        clock = asyncio.get_running_loop().time
        # the stage has replaced it, too: undone before the stage ends, not after
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: clock() + 60.0)
            await asyncio.sleep(2.5)
        assert stage.process().signals == []

    run(scenario)


# crash loops


def test_a_worker_that_keeps_dying_is_replaced_ever_more_slowly(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        loop = asyncio.get_running_loop()
        pauses = []
        for number in range(1, 11):
            stage.process().end(1)
            died = loop.time()
            while len(stage.processes) == number:
                await stage.pass_time(0.01)
            pauses.append(loop.time() - died)
        assert pauses[0] < 0.1
        assert all(5.0 <= pause <= 10.1 for pause in pauses[8:])
        assert stage.supervisor.deaths == 10

    run(scenario)


async def crash_until_it_is_failing(stage: Stage, slot: int) -> None:
    """Let the worker of a slot die until a second or more passes before it is replaced."""
    for _ in range(7):
        stage.process(slot).end(1)
        await until(lambda: slot not in stage.supervisor.workers)
        for _ in range(1000):
            if slot in stage.supervisor.workers:
                break
            await stage.pass_time(0.01)
    stage.process(slot).end(1)
    await until(lambda: slot not in stage.supervisor.workers)
    await settle()


def test_a_slot_that_keeps_failing_gets_no_new_connections_meanwhile(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await crash_until_it_is_failing(stage, 0)
        assert stage.listeners.active == [1]
        await stage.pass_time(11.0)
        assert stage.listeners.active == [1], "it has been started, and does not serve yet"
        stage.bring_up(0)
        assert stage.listeners.active == [0, 1]

    run(scenario, serve=(0, 1))


def test_the_others_serve_on_while_one_keeps_failing(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        survivor = stage.process(1)
        await crash_until_it_is_failing(stage, 0)
        assert survivor.signals == []
        stage.say(question(), slot=1)
        await until(lambda: stage.sent(Admitted))

    run(scenario, serve=(0, 1))


def test_when_every_slot_fails_packets_wait_for_the_next_workers(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await crash_until_it_is_failing(stage, 0)
        assert stage.listeners.active == [0]

    run(scenario)


def test_a_worker_that_is_to_follow_keeps_its_slot(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await crash_until_it_is_failing(stage, 0)
        assert stage.supervisor.free_slots() == [1, 2, 3]
        await stage.pass_time(11.0)
        assert stage.worker(0).generation.number == 1

    run(scenario, slots=4)


def test_a_slot_that_failed_is_free_once_another_generation_serves(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await crash_until_it_is_failing(stage, 0)
        before = len(stage.processes)
        stage.serve(1)
        await stage.pass_time(11.0)
        assert len(stage.processes) == before + 1
        assert list(stage.supervisor.generations) == [2]
        assert stage.supervisor.free_slots() == [0, 2, 3]

    run(scenario, slots=4)


# the end of it all


def test_stopping_tells_every_worker_and_waits_for_it(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.supervisor.stop(4.0)
        assert stage.answers() == [Stop(4.0)] * 2
        assert [process.signals for process in stage.processes] == [[signal.SIGTERM]] * 2
        await settle()
        assert len(stage.processes) == 2, "a worker that was told to stop was replaced"
        assert stage.supervisor.deaths == 0

    run(scenario, serve=(0, 1))


def test_stopping_ends_what_drains_too(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(1)
        stage.supervisor.drain_generation(first, 0.0)
        await stage.supervisor.stop(4.0)
        assert [process.signals for process in stage.processes] == [[signal.SIGTERM]] * 2

    run(scenario)


def test_a_worker_that_does_not_stop_is_killed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process().ignores_sigterm = True
        await stage.supervisor.stop(4.0)
        assert stage.processes[0].signals == [signal.SIGTERM, signal.SIGKILL]

    run(scenario)


def test_stopping_beside_a_worker_that_has_just_died_works(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process(0).end(-9)
        survivor = stage.process(1)
        await stage.supervisor.stop(1.0)
        assert survivor.signals == [signal.SIGTERM]

    run(scenario, serve=(0, 1))


def test_letting_go_leaves_every_worker_running(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.supervisor.let_go()
        assert all(process.is_forgotten for process in stage.processes)
        assert all(process.signals == [] for process in stage.processes)
        assert stage.answers() == []

    run(scenario, serve=(0, 1))
