"""Spawns the workers, hears what they say, answers, and replaces the ones that die."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from toppy.control.admission import Admission
from toppy.control.listeners import Listeners
from toppy.control.statistics import Statistics
from toppy.errors import ResourceLimitError
from toppy.ipc.control_channel import ControlServer, Peer
from toppy.model.grant import Denial, Grant
from toppy.observe.log import get_logger
from toppy.protocol.backoff import Backoff
from toppy.protocol.worker_lifecycle import (
    IllegalTransitionError,
    WorkerInput,
    WorkerState,
    next_state,
)
from toppy.wire.ipc_message import (
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
    WorkerSettings,
    encode_settings,
)

START_DEADLINE_S = 15.0
"""From spawn to READY, on a loaded machine."""
_STABLE_S = 10.0
"""A worker that lived this long did not die of its start; the back-off begins anew."""
_WATCH_INTERVAL_S = 2.0
_HEARTBEAT_TIMEOUT_S = 10.0
"""Workers report twice a second; one that is silent for so long hangs."""
_MAX_DECISIONS = 4096
"""Admissions under way at once; more are answered 429."""

_log = get_logger("supervisor")


class Worker:
    """One worker process as the control plane knows it."""

    def __init__(self, slot: int, generation: int, process: asyncio.subprocess.Process) -> None:
        self.slot = slot
        self.generation = generation
        self.process = process
        self.secret = ""
        self.peer: Peer | None = None
        self.engine = ""
        self.state = WorkerState.SPAWNED
        self.started_at = time.time()
        self.serving = asyncio.Event()
        self.heard_at = time.monotonic()
        """When its last report came."""

    def is_proved_by(self, secret: str) -> bool:
        """Whether a message with ``secret`` comes from this worker."""
        return hmac.compare_digest(self.secret.encode(), secret.encode("utf-8", "surrogatepass"))

    def handle(self, happened: WorkerInput) -> None:
        """Take one step of the lifecycle; raises ``IllegalTransitionError``."""
        self.state = next_state(self.state, happened)
        if self.state is WorkerState.SERVING and not self.serving.is_set():
            self.serving.set()
            self.heard_at = time.monotonic()

    def kill(self) -> None:
        """End the process at once, if it has not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """Keeps one worker serving in each active slot."""

    def __init__(
        self,
        server: ControlServer,
        listeners: Listeners,
        admission: Admission,
        statistics: Statistics,
        settings_for: Callable[[int, int, str], WorkerSettings],
        *,
        worker_count: int,
    ) -> None:
        self._server = server
        self._listeners = listeners
        self._admission = admission
        self._statistics = statistics
        self._settings_for = settings_for
        self._slots = range(worker_count)
        self.generation = 1
        self.workers: dict[int, Worker] = {}
        self.deaths = 0
        self._by_peer: dict[Peer, Worker] = {}
        self._is_stopping = False
        self._group: asyncio.TaskGroup | None = None
        self._decisions = 0

    async def run(self, on_serving: Callable[[], None]) -> None:
        """Serve until cancelled; ``on_serving`` is called once every worker has reported READY.

        Raises ``ResourceLimitError`` when the first workers do not come up.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(
                self._server.serve(self._receive, self._receive_report, self._receive_garbage)
            )
            # before the workers read: what arrives meanwhile waits where it will be read
            self._listeners.steer(list(self._slots))
            for slot in self._slots:
                await self._spawn(slot)
            await self._await_first_workers(group)
            for slot in self._slots:
                group.create_task(self._keep_alive(slot))
            group.create_task(self._watch())
            on_serving()

    async def _await_first_workers(self, group: asyncio.TaskGroup) -> None:
        async def wait_for_all() -> None:
            for worker in self.workers.values():
                await worker.serving.wait()

        ends = [group.create_task(worker.process.wait()) for worker in self.workers.values()]
        serving = group.create_task(wait_for_all())
        waited_for: set[asyncio.Task[Any]] = {serving, *ends}
        try:
            await asyncio.wait(
                waited_for, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not serving.done():
                raise ResourceLimitError(
                    "the workers did not come up: "
                    + ("one ended; " if any(end.done() for end in ends) else "they take too long; ")
                    + "the log above says why"
                )
        finally:
            for task in waited_for:
                task.cancel()

    async def stop(self, deadline_s: float) -> None:
        """Tell every worker to stop; what still runs after ``deadline_s`` is killed."""
        self._is_stopping = True
        for worker in self.workers.values():
            with contextlib.suppress(IllegalTransitionError):
                worker.handle(WorkerInput.STOP)
            if worker.peer is not None:
                self._server.send(worker.peer, Stop(deadline_s))
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(deadline_s):
                for worker in self.workers.values():
                    await worker.process.wait()
        except TimeoutError:
            for worker in self.workers.values():
                worker.kill()
                await worker.process.wait()

    async def _spawn(self, slot: int) -> None:
        secret = secrets.token_hex(32)
        settings = self._settings_for(slot, self.generation, secret)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            "toppy.worker",
            stdin=asyncio.subprocess.PIPE,
            pass_fds=settings.sockets,
            env=_worker_environment(os.environ),
        )
        worker = Worker(slot, self.generation, process)
        worker.secret = secret
        self.workers[slot] = worker
        assert process.stdin is not None
        # the pipe stays open: its end tells the worker that we are gone
        process.stdin.write(encode_settings(settings))
        _log.info("worker started", slot=slot, generation=self.generation, pid=process.pid)

    def _end_unless_serving(self, worker: Worker) -> None:
        if worker.state in (WorkerState.SPAWNED, WorkerState.GREETED):
            _log.error("worker takes too long to start", slot=worker.slot, pid=worker.process.pid)
            worker.kill()

    async def _keep_alive(self, slot: int) -> None:
        backoff = Backoff(lambda: secrets.randbelow(1000) / 1000, first_s=0.05, most_s=10.0)
        while True:
            worker = self.workers[slot]
            code = await worker.process.wait()
            self._forget(worker)
            if self._is_stopping:
                return
            self.deaths += 1
            lived_s = time.time() - worker.started_at
            _log.error(
                "worker died",
                slot=slot,
                generation=worker.generation,
                pid=worker.process.pid,
                exit_code=code,
                lived_s=round(lived_s, 1),
            )
            if lived_s >= _STABLE_S:
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_delay_s())
            await self._respawn(slot, backoff)

    async def _respawn(self, slot: int, backoff: Backoff) -> None:
        while not self._is_stopping:  # it may have changed during the pause
            try:
                await self._spawn(slot)
            except OSError as error:
                _log.error("worker cannot be started", slot=slot, reason=str(error))
                await asyncio.sleep(backoff.next_delay_s())
            else:
                loop = asyncio.get_running_loop()
                loop.call_later(START_DEADLINE_S, self._end_unless_serving, self.workers[slot])
                return

    async def _watch(self) -> None:
        """Replace workers that run and say nothing. Reports are their heartbeat."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_INTERVAL_S)
            now = time.monotonic()
            if now - before > 2 * _WATCH_INTERVAL_S:
                # it was us who did not listen
                for worker in self.workers.values():
                    worker.heard_at = now
            for worker in self.workers.values():
                silent_s = now - worker.heard_at
                if worker.state is WorkerState.SERVING and silent_s > _HEARTBEAT_TIMEOUT_S:
                    _log.error("worker hangs", slot=worker.slot, pid=worker.process.pid)
                    worker.kill()

    def _forget(self, worker: Worker) -> None:
        worker.handle(WorkerInput.EXIT)
        if worker.peer is not None:
            self._by_peer.pop(worker.peer, None)
        self._statistics.worker_gone(worker.slot)
        if worker.process.stdin is not None:
            worker.process.stdin.close()

    # what workers say

    def _receive(self, peer: Peer, message: FromWorker) -> None:
        if isinstance(message, Hello):
            self._greet(peer, message)
            return
        worker = self._by_peer.get(peer)
        if worker is None:
            _log.warning("a stranger spoke on the control channel")
            return
        try:
            if isinstance(message, Ready):
                worker.handle(WorkerInput.READY)
                worker.engine = message.engine
                _log.info("worker serves", slot=worker.slot, generation=worker.generation)
                return
            worker.handle(WorkerInput.REQUEST)
        except IllegalTransitionError as error:
            _log.error("worker broke the protocol", slot=worker.slot, reason=str(error))
            worker.kill()
            return
        match message:
            case TokenRequest():
                is_valid = self._admission.is_valid(message.authorization)
                self._server.send(peer, TokenAnswer(message.request, is_valid))
            case AdmissionRequest():
                self._admit(peer, message)

    def _greet(self, peer: Peer, hello: Hello) -> None:
        worker = self.workers.get(hello.slot)
        if worker is None or not worker.is_proved_by(hello.secret):
            _log.warning("a process that we did not start said hello", pid=hello.pid)
            return
        try:
            worker.handle(WorkerInput.HELLO)
        except IllegalTransitionError as error:
            _log.error("worker broke the protocol", slot=worker.slot, reason=str(error))
            worker.kill()
            return
        worker.peer = peer
        self._by_peer[peer] = worker

    def _admit(self, peer: Peer, message: AdmissionRequest) -> None:
        assert self._group is not None
        if self._decisions >= _MAX_DECISIONS:
            denial = Denial(429, "connection_limit_reached", "too many tunnels are being opened")
            self._server.send(peer, Admitted(message.request, None, denial))
            return
        self._decisions += 1
        self._group.create_task(self._decide(peer, message))

    async def _decide(self, peer: Peer, message: AdmissionRequest) -> None:
        try:
            decision = await self._admission.decide(message)
        finally:
            self._decisions -= 1
        if isinstance(decision, Grant):
            self._server.send(peer, Admitted(message.request, decision, None))
        else:
            self._server.send(peer, Admitted(message.request, None, decision))

    def _receive_report(self, report: Report) -> None:
        worker = self.workers.get(report.slot)
        if worker is None or not worker.is_proved_by(report.secret):
            return  # the last words of a worker that has been replaced, or a stranger
        with contextlib.suppress(IllegalTransitionError):
            worker.handle(WorkerInput.REPORT)
            worker.heard_at = time.monotonic()
            if worker.state is not WorkerState.GONE:
                self._statistics.report(report.slot, report.counters)

    def _receive_garbage(self, error: IpcError) -> None:
        _log.warning("something else than a message on the control channel", reason=str(error))


def _worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: nothing that may be a secret."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "RUST_BACKTRACE", "SSL_CERT_FILE")
    return {name: environ[name] for name in kept if name in environ}
