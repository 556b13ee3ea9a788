"""The supervisor with processes, channel and admission that do as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from toppy.control import supervisor as supervisor_module
from toppy.control.admission import Admission
from toppy.control.listeners import Listeners
from toppy.control.statistics import Statistics
from toppy.control.supervisor import Supervisor, Worker
from toppy.errors import ResourceLimitError
from toppy.ipc.control_channel import ControlServer, Peer
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.protocol.backoff import Backoff
from toppy.protocol.worker_lifecycle import WorkerState
from toppy.wire.ipc_message import (
    SETTINGS_LENGTH,
    AdmissionRequest,
    Admitted,
    FromWorker,
    Hello,
    IpcError,
    Ready,
    Report,
    Stop,
    TokenAnswer,
    TokenRequest,
    ToWorker,
    WorkerSettings,
    parse_settings,
)

DEADLINE_S = 10.0
GRANT = Grant(("192.0.2.53",), 53, "token", "dns", 1)


class FakeStdin:
    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True


class FakeProcess:
    """Lives until it is killed, told to end, or ended by the test."""

    pids = itertools.count(1000)
    ignores_sigterm = False

    def __init__(self, arguments: tuple[object, ...], options: dict[str, Any]) -> None:
        self.arguments = arguments
        self.options = options
        self.pid = next(self.pids)
        self.stdin = FakeStdin()
        self.returncode: int | None = None
        self.signals: list[int] = []
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    def send_signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        self.signals.append(number)
        if not self.ignores_sigterm:
            self.end(-number)

    def kill(self) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        self.signals.append(signal.SIGKILL)
        self.end(-signal.SIGKILL)


class FakeServer:
    """The control channel; ``hear`` and ``report`` are what workers say on it."""

    def __init__(self) -> None:
        self.sent: list[tuple[Peer, ToWorker]] = []
        self.is_served = False
        self.hear: Callable[[Peer, FromWorker], None]
        self.report: Callable[[Report], None]
        self.hear_garbage: Callable[[IpcError], None]

    async def serve(
        self,
        on_message: Callable[[Peer, FromWorker], None],
        on_report: Callable[[Report], None],
        on_garbage: Callable[[IpcError], None],
    ) -> None:
        self.hear, self.report, self.hear_garbage = on_message, on_report, on_garbage
        self.is_served = True
        await asyncio.Event().wait()

    def send(self, peer: Peer, message: ToWorker) -> bool:
        self.sent.append((peer, message))
        return True


class FakeListeners:
    def __init__(self) -> None:
        self.active: list[int] = []

    def steer(self, active_slots: list[int]) -> None:
        self.active = active_slots


class FakeAdmission:
    """Answers with ``decision``, once the test lets it."""

    def __init__(self) -> None:
        self.decision: Grant | Denial = GRANT
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[AdmissionRequest] = []

    def is_valid(self, authorization: str | None) -> bool:
        return authorization == "right"

    async def decide(self, request: AdmissionRequest) -> Grant | Denial:
        self.asked.append(request)
        await self.may_answer.wait()
        return self.decision


class Stage:
    """A supervisor, its surroundings, and workers that can be made to speak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worker_count: int) -> None:
        self._worker_count = worker_count
        self.processes: list[FakeProcess] = []
        self.server = FakeServer()
        self.listeners = FakeListeners()
        self.admission = FakeAdmission()
        self.statistics = Statistics()
        self.is_serving = asyncio.Event()
        self.spawn_failures: list[OSError] = []

        async def spawn(*arguments: object, **options: Any) -> FakeProcess:
            if self.spawn_failures:
                raise self.spawn_failures.pop(0)
            self.processes.append(FakeProcess(arguments, options))
            return self.processes[-1]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
        monkeypatch.setattr(
            supervisor_module, "Backoff", lambda *_, **__: Backoff(lambda: 0.0, first_s=0.0)
        )
        self.supervisor = Supervisor(
            cast(ControlServer, self.server),
            cast(Listeners, self.listeners),
            cast(Admission, self.admission),
            self.statistics,
            settings_for,
            worker_count=worker_count,
        )

    @property
    def has_begun(self) -> bool:
        """The channel is served and every worker is started."""
        return self.server.is_served and len(self.processes) == self._worker_count

    def worker(self, slot: int = 0) -> Worker:
        return self.supervisor.workers[slot]

    def process(self, slot: int = 0) -> FakeProcess:
        return cast(FakeProcess, self.worker(slot).process)

    def peer(self, slot: int = 0) -> Peer:
        return b"peer-%d-%d" % (slot, self.process(slot).pid)

    def say(self, message: FromWorker, slot: int = 0) -> None:
        self.server.hear(self.peer(slot), message)

    def greet(self, slot: int = 0, secret: str | None = None) -> None:
        worker = self.worker(slot)
        said = worker.secret if secret is None else secret
        self.say(Hello(slot, worker.generation, worker.process.pid, said), slot)

    def bring_up(self, slot: int = 0) -> None:
        self.greet(slot)
        self.say(Ready("native"), slot)

    def answers(self) -> list[ToWorker]:
        return [message for _, message in self.server.sent]


def settings_for(slot: int, generation: int, secret: str) -> WorkerSettings:
    return WorkerSettings(
        slot=slot,
        generation=generation,
        secret=secret,
        control_address="ipc://control",
        report_address="ipc://reports",
        sockets=(30 + slot,),
        names=("localhost",),
        proxy_name="toppy-gw",
        engine="native",
        certificate_chain_pem=b"chain",
        private_key_pem=b"the private key",
        reset_key=b"r",
        token_key=b"t",
        quic={},
        limits={},
        log_level="info",
        log_format="json",
    )


def question(number: int = 1) -> AdmissionRequest:
    return AdmissionRequest(number, "right", "a.example", 53, "udp", False, "")


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until ``condition`` holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("not reached")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a scenario on a stage whose supervisor runs; with ``up``, its workers serve already."""

    def run_scenario(
        scenario: Callable[[Stage], Coroutine[Any, Any, None]], *, workers: int = 1, up: bool = True
    ) -> None:
        async def whole() -> None:
            stage = Stage(monkeypatch, workers)
            running = asyncio.create_task(stage.supervisor.run(stage.is_serving.set))
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await until(lambda: stage.has_begun)
                    if up:
                        for slot in range(workers):
                            stage.bring_up(slot)
                        await stage.is_serving.wait()
                    await scenario(stage)
                    assert not up or not running.done(), "the supervisor gave up"
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running

        asyncio.run(whole())

    return run_scenario


# the start


def test_it_serves_once_every_worker_is_ready(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        assert stage.listeners.active == [0, 1]
        stage.bring_up(0)
        stage.greet(1)
        await asyncio.sleep(0)
        assert not stage.is_serving.is_set()
        stage.say(Ready("native"), 1)
        await stage.is_serving.wait()
        assert [w.state for w in stage.supervisor.workers.values()] == [WorkerState.SERVING] * 2

    run(scenario, workers=2, up=False)


def test_settings_go_through_the_pipe_and_nowhere_else(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPPY_GW_TOKEN", "the token")
    monkeypatch.setenv("PATH", "/usr/bin")

    async def scenario(stage: Stage) -> None:
        process = stage.process()
        settings = parse_settings(process.stdin.written[SETTINGS_LENGTH.size :])
        assert settings == settings_for(0, 1, stage.worker().secret)
        assert not process.stdin.is_closed
        assert process.options["pass_fds"] == (30,)
        assert process.options["env"]["PATH"] == "/usr/bin"
        assert "the token" not in str((process.arguments, process.options))
        assert stage.worker().secret not in str((process.arguments, process.options))

    run(scenario)


def test_a_worker_that_ends_before_it_is_ready_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        stage = Stage(monkeypatch, 2)
        running = asyncio.create_task(stage.supervisor.run(stage.is_serving.set))
        await until(lambda: stage.has_begun)
        stage.bring_up(0)
        stage.process(1).end(1)
        with pytest.raises(BaseExceptionGroup) as caught:
            await running
        assert caught.group_contains(ResourceLimitError, match="one ended")

    asyncio.run(scenario())


def test_workers_that_are_never_ready_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "START_DEADLINE_S", 0.01)

    async def scenario() -> None:
        stage = Stage(monkeypatch, 1)
        with pytest.raises(BaseExceptionGroup) as caught:
            await stage.supervisor.run(stage.is_serving.set)
        assert caught.group_contains(ResourceLimitError, match="too long")

    asyncio.run(scenario())


# who may speak


@pytest.mark.parametrize("secret", ["", "wrong", "f\u00e4lschung", "\ud800"])
def test_a_process_without_the_secret_is_nobody(run: Callable[..., None], secret: str) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.hear(b"stranger", Hello(0, 1, 1, secret))
        stage.server.hear(b"stranger", question())
        stage.server.hear(b"stranger", TokenRequest(1, "right"))
        stage.server.report(Report(0, 1, secret, WorkerCounters(pings=99)))
        stage.server.report(Report(99, 1, secret, WorkerCounters(pings=99)))
        stage.server.hear_garbage(IpcError("garbage"))
        await asyncio.sleep(0)
        assert stage.server.sent == []
        assert stage.statistics.total().pings == 0
        assert stage.worker().state is WorkerState.SERVING

    run(scenario)


def test_a_hello_for_a_slot_that_does_not_exist_is_ignored(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.server.hear(b"stranger", Hello(99, 1, 1, stage.worker().secret))
        stage.server.hear(b"stranger", question())
        await asyncio.sleep(0)
        assert stage.server.sent == []

    run(scenario)


@pytest.mark.parametrize(
    "message", [Ready("native"), Hello(0, 1, 1, ""), question(), TokenRequest(1, "right")]
)
def test_a_worker_that_speaks_out_of_turn_is_ended(
    run: Callable[..., None], message: FromWorker
) -> None:
    async def scenario(stage: Stage) -> None:
        process = stage.process()
        if isinstance(message, Hello):
            stage.greet()  # for the second time
        elif isinstance(message, Ready):
            stage.say(message)  # likewise
        else:
            process.end(-9)
            await until(lambda: len(stage.processes) == 2)
            process = stage.process()
            stage.greet()
            stage.say(message)  # before it is ready
        assert process.signals == [signal.SIGKILL]
        assert stage.server.sent == []

    run(scenario)


# questions


def test_an_admission_is_answered_to_the_worker_that_asked(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(question(5), slot=1)
        await until(lambda: stage.server.sent)
        assert stage.server.sent == [(stage.peer(1), Admitted(5, GRANT, None))]
        stage.admission.decision = denial = Denial(403, "http_request_denied", "no", "default")
        stage.say(question(6), slot=0)
        await until(lambda: len(stage.server.sent) == 2)
        assert stage.server.sent[1] == (stage.peer(0), Admitted(6, None, denial))

    run(scenario, workers=2)


def test_a_slow_decision_holds_nobody_up(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.admission.may_answer.clear()
        stage.say(question(1))
        await until(lambda: stage.admission.asked)
        stage.say(TokenRequest(2, "right"))
        assert stage.answers() == [TokenAnswer(2, True)]
        stage.admission.may_answer.set()
        await until(lambda: len(stage.server.sent) == 2)

    run(scenario)


def test_too_many_decisions_at_once_are_429(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_MAX_DECISIONS", 3)

    async def scenario(stage: Stage) -> None:
        stage.admission.may_answer.clear()
        for number in range(5):
            stage.say(question(number))
        refused = [a for a in stage.answers() if isinstance(a, Admitted) and a.denial is not None]
        assert [(a.request, a.denial.status) for a in refused if a.denial] == [(3, 429), (4, 429)]
        stage.admission.may_answer.set()
        await until(lambda: len(stage.server.sent) == 5)
        stage.say(question(6))
        await until(lambda: len(stage.server.sent) == 6)
        assert stage.answers()[-1] == Admitted(6, GRANT, None)

    run(scenario)


@pytest.mark.parametrize(("credential", "is_valid"), [("right", True), ("wrong", False)])
def test_a_token_is_answered(run: Callable[..., None], credential: str, is_valid: bool) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(TokenRequest(9, credential))
        assert stage.answers() == [TokenAnswer(9, is_valid)]

    run(scenario)


# death


def test_a_dead_worker_is_replaced_and_its_counters_are_kept(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        first, secret = stage.process(), stage.worker().secret
        stage.server.report(Report(0, 1, secret, WorkerCounters(pings=3, tunnels_open=2)))
        first.end(-11)
        await until(lambda: len(stage.processes) == 2)
        assert stage.supervisor.deaths == 1
        assert first.stdin.is_closed
        assert stage.worker().secret != secret
        assert stage.statistics.total() == WorkerCounters(pings=3)
        stage.bring_up()
        assert stage.worker().state is WorkerState.SERVING

    run(scenario)


def test_a_dead_workers_last_words_change_nothing(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        secret, peer = stage.worker().secret, stage.peer()
        stage.process().end(-11)
        await until(lambda: len(stage.processes) == 2)
        stage.server.report(Report(0, 1, secret, WorkerCounters(pings=3)))
        stage.server.hear(peer, question())
        stage.server.hear(peer, Hello(0, 1, 1, secret))
        await asyncio.sleep(0)
        assert stage.statistics.total().pings == 0
        assert stage.server.sent == []
        assert stage.worker().state is WorkerState.SPAWNED

    run(scenario)


def test_a_replacement_that_never_serves_is_ended_and_replaced(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(stage: Stage) -> None:
        monkeypatch.setattr(supervisor_module, "START_DEADLINE_S", 0.0)
        stage.process().end(-9)
        await until(lambda: len(stage.processes) >= 3)
        assert stage.supervisor.deaths >= 2

    run(scenario)


def test_a_worker_that_keeps_dying_is_replaced_each_time(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        for number in range(1, 6):
            stage.process().end(1)
            await until(lambda: len(stage.processes) == number + 1)  # noqa: B023
        assert stage.supervisor.deaths == 5

    run(scenario)


def test_a_replacement_that_cannot_be_started_is_tried_again(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.spawn_failures = [OSError("no memory"), OSError("still none")]
        stage.process().end(-9)
        await until(lambda: len(stage.processes) == 2)
        assert not stage.spawn_failures

    run(scenario)


# the end


def test_stopping_tells_every_worker_and_waits_for_it(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.supervisor.stop(4.0)
        assert stage.answers() == [Stop(4.0)] * 2
        assert [process.signals for process in stage.processes] == [[signal.SIGTERM]] * 2
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(stage.processes) == 2, "a worker that was told to stop was replaced"
        assert stage.supervisor.deaths == 0

    run(scenario, workers=2)


def test_a_worker_that_does_not_stop_is_killed(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeProcess, "ignores_sigterm", True)

    async def scenario(stage: Stage) -> None:
        await stage.supervisor.stop(0.01)
        assert stage.process().signals == [signal.SIGTERM, signal.SIGKILL]

    run(scenario)


def test_stopping_beside_a_worker_that_has_just_died_works(run: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process(0).end(-9)
        await stage.supervisor.stop(1.0)
        assert stage.process(1).signals == [signal.SIGTERM]

    run(scenario, workers=2)
