"""A supervisor in virtual time, with processes, channel and admission that do as the test says."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from toppy.control.admission import Admission
from toppy.control.audit_settings import AuditSettings
from toppy.control.audit_writer import AuditWriter
from toppy.control.generation import Generation, Worker
from toppy.control.listeners import Listeners
from toppy.control.saved_state import SavedGeneration, SavedWorker
from toppy.control.statistics import Statistics
from toppy.control.supervisor import Supervisor
from toppy.control.tunnel_audit import TunnelAudit
from toppy.ipc.control_channel import ControlServer, Peer
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.protocol.worker_lifecycle import WorkerState
from toppy.system.processes import Process
from toppy.wire.ipc_message import (
    AdmissionRequest,
    FromWorker,
    Hello,
    IpcError,
    LiveTunnel,
    Owners,
    Ready,
    Report,
    ToWorker,
    WorkerSettings,
)

M = TypeVar("M")
Scenario = Callable[["Stage"], Coroutine[Any, Any, None]]
Run = Callable[..., None]

GRANT = Grant(("192.0.2.53",), 53, "token", "dns", 1)


class FakeProcess:
    """Lives until it is killed, told to end, or ended by the test. ``is_child``: how it ended is
    known.
    """

    pids = itertools.count(1000)

    def __init__(self, settings: WorkerSettings | None = None, *, is_child: bool = True) -> None:
        self.settings = settings
        self.pid = next(self.pids)
        self.started = self.pid * 10
        self.returncode: int | None = None
        self.signals: list[int] = []
        self.ignores_sigterm = False
        self.is_forgotten = False
        self._is_child = is_child
        self._ended = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return self.returncode

    def end(self, code: int) -> None:
        self.returncode = code if self._is_child else None
        self._ended.set()

    def send_signal(self, number: int) -> None:
        if self.has_ended:
            return
        self.signals.append(number)
        if number == signal.SIGKILL or not self.ignores_sigterm:
            self.end(-number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait_blocking(self, _: float) -> bool:
        return self.has_ended

    def forget(self) -> None:
        self.is_forgotten = True


class FakeServer:
    """The control channel; ``hear`` and ``report`` are what workers say on it."""

    def __init__(self) -> None:
        self.sent: list[tuple[Peer, ToWorker]] = []
        self.is_served = False
        self.is_full = False
        """What is sent is lost."""
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
        if self.is_full:
            return False
        self.sent.append((peer, message))
        return True


class FakeListeners:
    """Knows where the kernel was told to bring packets; ``refusals`` are its next answers."""

    def __init__(self) -> None:
        self.active: list[int] = []
        self.live: list[int] = []
        self.refusals: list[OSError] = []

    def steer(self, active_slots: Sequence[int], live_slots: Sequence[int]) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.active, self.live = list(active_slots), list(live_slots)


class FakeAdmission:
    """Answers with ``decision``, once the test lets it."""

    def __init__(self, decision: Grant | Denial = GRANT) -> None:
        self.decision = decision
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[AdmissionRequest] = []
        self.denied: Denial | None = None
        """What live tunnels are cut for."""
        self.renamed: dict[str, str] = {}
        """Rules that have another name now."""
        self.windows: tuple[bool, ...] = ()
        """Which rules with times hold now."""

    def open_windows(self) -> tuple[bool, ...]:
        return self.windows

    def recheck(self, _: LiveTunnel) -> Denial | None:
        return self.denied

    def rule_of(self, tunnel: LiveTunnel) -> str:
        return self.renamed.get(tunnel.rule, tunnel.rule)

    def is_valid(self, authorization: str | None, _: object = None) -> bool:
        return authorization == "right"

    async def decide(self, request: AdmissionRequest) -> Grant | Denial:
        self.asked.append(request)
        await self.may_answer.wait()
        return self.decision


class Stage:
    """A supervisor, its surroundings, and workers that can be made to speak."""

    def __init__(self, directory: Path, slot_count: int) -> None:
        self.directory = directory
        self.processes: list[FakeProcess] = []
        """Those that the supervisor has started."""
        self.server = FakeServer()
        self.listeners = FakeListeners()
        self.admission = FakeAdmission()
        self.statistics = Statistics()
        self.audit = AuditWriter(AuditSettings())
        self.spawn_failures: list[OSError] = []
        self.changes = 0
        """How often there was something new that a next control plane must know."""
        self.supervisor = Supervisor(
            cast(ControlServer, self.server),
            cast(Listeners, self.listeners),
            cast(Admission, self.admission),
            self.statistics,
            TunnelAudit(self.audit),
            runtime_dir=str(directory),
            slot_count=slot_count,
            on_change=self._note_change,
            start=self._start,
        )

    def _note_change(self) -> None:
        self.changes += 1

    def _start(self, settings: WorkerSettings) -> Process:
        if self.spawn_failures:
            raise self.spawn_failures.pop(0)
        self.processes.append(FakeProcess(settings))
        return cast(Process, self.processes[-1])

    def worker(self, slot: int = 0) -> Worker:
        return self.supervisor.workers[slot]

    def process(self, slot: int = 0) -> FakeProcess:
        return cast(FakeProcess, self.worker(slot).process)

    def peer(self, slot: int = 0) -> Peer:
        return b"peer-%d-%d" % (slot, self.process(slot).pid)

    # what workers do

    def say(self, message: FromWorker, slot: int = 0) -> None:
        self.server.hear(self.peer(slot), message)

    def greet(self, slot: int = 0, secret: str | None = None) -> None:
        worker = self.worker(slot)
        said = worker.secret if secret is None else secret
        self.say(Hello(slot, worker.generation.number, worker.process.pid, said), slot)

    def bring_up(self, *slots: int) -> None:
        for slot in slots or (0,):
            self.greet(slot)
            self.say(Ready("native", has_meters=True), slot)

    def report(self, counters: WorkerCounters, slot: int = 0) -> None:
        worker = self.worker(slot)
        self.server.report(Report(slot, worker.generation.number, worker.secret, counters))

    async def pass_time(self, duration_s: float) -> None:
        """Let time pass; workers that relay report as they should."""
        loop = asyncio.get_running_loop()
        end = loop.time() + duration_s
        while loop.time() < end:
            for slot, worker in self.supervisor.workers.items():
                if worker.is_serving:
                    self.report(WorkerCounters(), slot)
            await asyncio.sleep(min(0.5, end - loop.time()))

    def serving(self) -> list[int]:
        """Slots whose worker serves."""
        workers = self.supervisor.workers.items()
        return sorted(slot for slot, worker in workers if worker.state is WorkerState.SERVING)

    # generations

    def start(self, *slots: int, revision: int = 1) -> Generation:
        """The next generation; it has said nothing yet."""
        return self.supervisor.start_generation(revision, slots, settings_for)

    def serve(self, *slots: int, revision: int = 1) -> Generation:
        """The next generation, which takes the new connections from here on."""
        generation = self.start(*slots, revision=revision)
        self.bring_up(*slots)
        self.supervisor.activate(generation)
        return generation

    # what was said to workers

    def sent(self, kind: type[M]) -> list[tuple[Peer, M]]:
        """To whom what was said, of one kind of message."""
        return [(peer, said) for peer, said in self.server.sent if isinstance(said, kind)]

    def answers(self) -> list[ToWorker]:
        """Everything but who owns which slot."""
        return [said for _, said in self.server.sent if not isinstance(said, Owners)]


def settings_for(slot: int, generation: int, place: int, secret: str) -> WorkerSettings:
    return WorkerSettings(
        slot=slot,
        generation=generation,
        secret=secret,
        control_address="ipc://control",
        report_address="ipc://reports",
        runtime_dir="/nowhere",
        sockets=((30 + slot, 31 + slot), (40 + slot, 41 + slot)),
        read=(place,),
        is_steered=True,
        names=("localhost",),
        proxy_name="toppy-gw",
        engine="native",
        certificate_chain_pem=b"chain",
        private_key_pem=b"the private key",
        reset_key=b"r",
        token_key=b"t",
        quic={},
        limits={},
        orphan_timeout_s=600.0,
        log_level="info",
        log_format="json",
    )


def question(number: int = 1) -> AdmissionRequest:
    return AdmissionRequest(number, "right", "a.example", 53, "udp", False, "")


def live_tunnel(connection: int, quarter_stream_id: int = 0) -> LiveTunnel:
    return LiveTunnel(
        connection, quarter_stream_id, "", "a.example", 53, "udp", "", "alice", "dns", 0.0, 0, 0
    )


def saved_worker(
    slot: int, generation: int, process: FakeProcess, *, place: int | None = None
) -> tuple[SavedWorker, Process, socket.socket]:
    """A worker that an earlier control plane left; the end of its line is ours."""
    known = SavedWorker(
        slot=slot,
        generation=generation,
        place=slot if place is None else place,
        pid=process.pid,
        started=process.started,
        since=5.0,
        secret=f"secret of s{slot}",
    )
    return known, cast(Process, process), socket.socket(socket.AF_UNIX)


def saved_generation(
    number: int, *slots: int, is_draining: bool = False, revision: int = 1
) -> SavedGeneration:
    return SavedGeneration(number, revision, slots, is_draining, 5.0)


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run, without any time passing, until ``condition`` holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("not reached")


async def settle() -> None:
    """Let the other tasks do what they can do now."""
    for _ in range(20):
        await asyncio.sleep(0)
