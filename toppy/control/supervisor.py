"""Spawns the workers, hears what they say, answers, and replaces the ones that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from toppy.control.admission import Admission
from toppy.control.generation import Generation, GenerationState, SettingsFor, Worker
from toppy.control.listeners import Listeners
from toppy.control.live_lists import LiveLists
from toppy.control.rates import Rates
from toppy.control.saved_state import SavedGeneration, SavedWorker
from toppy.control.statistics import Statistics
from toppy.control.tunnel_audit import TunnelAudit
from toppy.errors import ResourceLimitError
from toppy.ipc.control_channel import ControlServer, Peer
from toppy.ipc.worker_sockets import remove_sockets
from toppy.model.grant import Denial, Grant
from toppy.observe.log import get_logger
from toppy.protocol.backoff import Backoff
from toppy.protocol.worker_lifecycle import (
    IllegalTransitionError,
    WorkerInput,
    WorkerState,
)
from toppy.system.processes import Process, spawn
from toppy.wire.ipc_message import (
    PROTOCOL,
    AdmissionRequest,
    Admitted,
    ClosedTaken,
    ClosedTunnels,
    CloseTunnels,
    ConnectionPage,
    Drain,
    FromWorker,
    Hello,
    IpcError,
    LiveConnection,
    LiveTunnel,
    Owners,
    Ready,
    Refusals,
    Report,
    SetBudgets,
    SetLimits,
    SetLogLevel,
    Stop,
    TokenAnswer,
    TokenRequest,
    ToWorker,
    TunnelPage,
    Usage,
    WorkerSettings,
    encode_settings,
)

START_DEADLINE_S = 15.0
"""From spawn to READY, on a loaded machine."""
_STABLE_S = 10.0
"""A worker that lived this long did not die of its start; the back-off begins anew."""
_FAILING_AFTER_S = 1.0
"""A slot whose worker is started only after so long gets no new connections meanwhile."""
_WATCH_INTERVAL_S = 2.0
_HEARTBEAT_TIMEOUT_S = 10.0
"""Workers report twice a second; one that is silent for so long hangs."""
_MAX_DECISIONS = 4096
"""Admissions under way at once; more are answered 429."""
_SECRET_BYTES = 32

_log = get_logger("supervisor")


class Supervisor:
    """Keeps a worker serving in each slot of the active generation.

    ``on_change`` is called whenever something changed that a next control plane must know.
    """

    def __init__(
        self,
        server: ControlServer,
        listeners: Listeners,
        admission: Admission,
        statistics: Statistics,
        audit: TunnelAudit,
        *,
        runtime_dir: str,
        slot_count: int,
        rates: Rates | None = None,
        on_change: Callable[[], None] = lambda: None,
        start: Callable[[WorkerSettings], Process] | None = None,
    ) -> None:
        self._server = server
        self._listeners = listeners
        self.admission = admission
        self._statistics = statistics
        self._audit = audit
        self.rates = rates or Rates()
        self._runtime_dir = runtime_dir
        self.slot_count = slot_count
        self._on_change = on_change
        self._start_process = start or start_worker
        self.generations: dict[int, Generation] = {}
        self.active: Generation | None = None
        self.newest = 0
        """The number of the newest generation."""
        self.workers: dict[int, Worker] = {}
        self.deaths = 0
        self.slot_freed = asyncio.Event()
        """Set whenever a worker has ended."""
        self._by_peer: dict[Peer, Worker] = {}
        self._backoffs: dict[int, Backoff] = {}
        self._failing: set[int] = set()
        self._respawning: set[int] = set()
        """Slots whose worker has died and is to be replaced."""
        self._is_stopping = False
        self._group: asyncio.TaskGroup | None = None
        self._decisions = 0
        self.lists = LiveLists(self.workers, self._send)

    async def run(self, begin: Callable[[], None]) -> None:
        """Serve until cancelled; ``begin`` is called when workers can be started or taken over,
        before any of them is heard.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            begin()
            group.create_task(
                self._server.serve(self._receive, self._receive_report, self._receive_garbage)
            )
            group.create_task(self._watch_heartbeats())

    # generations

    def free_slots(self) -> list[int]:
        """Slots without a worker, and in which none is to be replaced."""
        taken = self.workers.keys() | self._respawning
        return [slot for slot in range(self.slot_count) if slot not in taken]

    def start_generation(
        self, revision: int, slots: Iterable[int], plan: SettingsFor
    ) -> Generation:
        """Start the workers of the next generation. They get no connection before ``activate``.

        Raises ``OSError`` when a process cannot be started.
        """
        self.newest += 1
        generation = Generation(self.newest, revision, tuple(slots), plan, time.time())
        self.generations[generation.number] = generation
        for slot in generation.slots:
            self._spawn(slot, generation)
        return generation

    async def wait_until_serving(self, generation: Generation) -> None:
        """Raises ``ResourceLimitError`` when one of its workers ends, or takes too long."""
        workers = [self.workers[slot] for slot in generation.slots]
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                came_up = await asyncio.gather(*(asyncio.shield(w.settled) for w in workers))
        except TimeoutError:
            raise ResourceLimitError(
                f"the workers did not come up within {START_DEADLINE_S:.0f} s: is the machine "
                "overloaded? The log above may say more"
            ) from None
        # one may have ended while the others came up
        if not all(came_up) or not all(worker.is_serving for worker in workers):
            raise ResourceLimitError(
                "a worker ended before it served: the log above says why it ended"
            )

    def activate(self, generation: Generation) -> None:
        """Give new connections to ``generation``; others that took them do so no more.

        Raises ``OSError`` when the kernel refuses; then nothing has changed.
        """
        before = self.active
        self.active = generation
        try:
            self._steer()
        except OSError:
            self.active = before
            raise
        generation.state = GenerationState.ACTIVE
        if before is not None and before is not generation:
            before.state = GenerationState.DRAINING
        self._on_change()

    def drain_generation(self, generation: Generation, timeout_s: float) -> list[int]:
        """Let its workers end when what they have has ended; the slots concerned."""
        return [
            worker.slot
            for worker in self._workers_of(generation)
            if self.drain_worker(worker, timeout_s)
        ]

    def drain_worker(self, worker: Worker, timeout_s: float) -> bool:
        """False when the worker cannot: it has not begun to serve, and is ended."""
        worker.is_expected_to_end = True
        try:
            worker.handle(WorkerInput.DRAIN)
        except IllegalTransitionError:
            worker.process.kill()
            return False
        self._send(worker, Drain(timeout_s))
        return True

    async def end_generation(self, generation: Generation) -> None:
        """End its workers at once: it has never served anybody."""
        workers = self._workers_of(generation)
        for worker in workers:
            worker.is_expected_to_end = True
            worker.process.kill()
        for worker in workers:
            await worker.process.wait()
        await asyncio.sleep(0)
        self.generations.pop(generation.number, None)

    def _workers_of(self, generation: Generation) -> list[Worker]:
        return [w for w in self.workers.values() if w.generation is generation]

    def _steer(self) -> None:
        """Tell kernel and workers who takes new connections, and who is alive."""
        if self.active is None:
            return
        # sorted: the same set is always the same program, and no handshake under way is misled
        active = sorted(
            worker.slot
            for worker in self._workers_of(self.active)
            if not worker.is_expected_to_end and worker.slot not in self._failing
        )
        # with none left, packets wait in the sockets for those that are being started
        slots = tuple(active or self.active.slots)
        live = sorted(set(slots) | self.workers.keys())
        self._listeners.steer(slots, live)
        owners = Owners(slots, {slot: w.generation.number for slot, w in self.workers.items()})
        for worker in self.workers.values():
            self._send(worker, owners)

    def steer_if_possible(self) -> None:
        """Tell kernel and workers of a change; where the kernel refuses, packets stray."""
        try:
            self._steer()
        except OSError as error:
            _log.error("packets cannot be steered", reason=str(error))

    # processes

    def _spawn(self, slot: int, generation: Generation) -> None:
        secret = secrets.token_hex(_SECRET_BYTES)
        place = generation.slots.index(slot)
        process = self._start_process(
            generation.settings_for(slot, generation.number, place, secret)
        )
        worker = Worker(slot, generation, process, secret, time.time())
        self.workers[slot] = worker
        self._watch(worker)
        _log.info("worker started", slot=slot, generation=generation.number, pid=process.pid)
        self._on_change()

    def _watch(self, worker: Worker) -> None:
        assert self._group is not None
        self._group.create_task(self._await_end(worker))
        loop = asyncio.get_running_loop()
        loop.call_later(START_DEADLINE_S, self._end_unless_serving, worker)

    def _end_unless_serving(self, worker: Worker) -> None:
        if worker.state in (WorkerState.SPAWNED, WorkerState.GREETED):
            _log.error("worker takes too long to start", slot=worker.slot, pid=worker.process.pid)
            worker.process.kill()

    async def _await_end(self, worker: Worker) -> None:
        code = await worker.process.wait()
        is_wanted = worker.is_expected_to_end
        # we kill those only that have not served; what drains ends by itself
        ends_well = (
            (0, None)
            if worker.state is WorkerState.DRAINING
            else (0, None, -signal.SIGKILL, -signal.SIGTERM)
        )
        was_known = self._forget(worker)
        has_ended_well = is_wanted and code in ends_well
        has_died = was_known and not self._is_stopping and not has_ended_well
        self._audit.worker_ended(worker, exit_code=code, has_died=has_died)
        if self._is_stopping or not was_known:
            return
        lived_s = time.time() - worker.started_at
        generation = worker.generation
        if has_ended_well:
            _log.info("worker ended", slot=worker.slot, generation=generation.number)
        else:
            self.deaths += 1
            _log.error(
                "worker died",
                slot=worker.slot,
                generation=generation.number,
                pid=worker.process.pid,
                exit_code=code,
                lived_s=round(lived_s, 1),
            )
        if generation is self.active and not is_wanted:
            self._respawning.add(worker.slot)
            try:
                await self._respawn(worker.slot, generation, lived_s)
            finally:
                self._respawning.discard(worker.slot)
                self.slot_freed.set()
            return
        self._retire_if_empty(generation)
        self.steer_if_possible()
        self._on_change()

    async def _respawn(self, slot: int, generation: Generation, lived_s: float) -> None:
        backoff = self._backoffs.setdefault(
            slot, Backoff(lambda: secrets.randbelow(1000) / 1000, first_s=0.05, most_s=10.0)
        )
        if lived_s >= _STABLE_S:
            backoff.reset()
        else:
            await self._pause(slot, backoff)
        while not self._is_stopping and slot not in self.workers:
            # it may have changed during the pause
            if generation is not self.active:
                self._retire_if_empty(generation)
                return
            try:
                self._spawn(slot, generation)
            except OSError as error:
                _log.error("worker cannot be started", slot=slot, reason=str(error))
                await self._pause(slot, backoff)

    async def _pause(self, slot: int, backoff: Backoff) -> None:
        delay_s = backoff.next_delay_s()
        if delay_s >= _FAILING_AFTER_S:
            self._failing.add(slot)
            self.steer_if_possible()
        await asyncio.sleep(delay_s)

    def _retire_if_empty(self, generation: Generation) -> None:
        if generation is self.active or self._workers_of(generation):
            return
        if self.generations.pop(generation.number, None) is not None:
            _log.info("generation retired", generation=generation.number)

    def _forget(self, worker: Worker) -> bool:
        """False when it had been replaced already."""
        with contextlib.suppress(IllegalTransitionError):
            worker.handle(WorkerInput.EXIT)
        worker.close()
        if worker.peer is not None:
            self._by_peer.pop(worker.peer, None)
        self.lists.forget(worker)
        self.rates.forget(worker)
        if self.workers.get(worker.slot) is not worker:
            return False
        del self.workers[worker.slot]
        remove_sockets(self._runtime_dir, worker.slot)
        self._statistics.worker_gone(worker.slot)
        self.slot_freed.set()
        return True

    async def _watch_heartbeats(self) -> None:
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
                if worker.is_serving and now - worker.heard_at > _HEARTBEAT_TIMEOUT_S:
                    _log.error("worker hangs", slot=worker.slot, pid=worker.process.pid)
                    worker.process.kill()

    async def stop(self, deadline_s: float) -> None:
        """Tell every worker to stop; what still runs after ``deadline_s`` is killed."""
        self._is_stopping = True
        workers = list(self.workers.values())
        for worker in workers:
            with contextlib.suppress(IllegalTransitionError):
                worker.handle(WorkerInput.STOP)
            self._send(worker, Stop(deadline_s))
            worker.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(deadline_s):
                for worker in workers:
                    await worker.process.wait()
        except TimeoutError:
            for worker in workers:
                worker.process.kill()
                await worker.process.wait()

    def let_go(self) -> None:
        """Leave the workers to the next control plane."""
        self._is_stopping = True
        for worker in self.workers.values():
            worker.process.forget()
            worker.close()

    # workers of an earlier control plane

    def adopt(
        self,
        saved_workers: Iterable[tuple[SavedWorker, Process, socket.socket]],
        saved_generations: Iterable[SavedGeneration],
        active: int,
        settings_for: SettingsFor,
    ) -> None:
        """Go on with workers that run already; the active generation's missing ones are started.

        Raises ``OSError``.
        """
        for saved in saved_generations:
            generation = Generation(
                saved.number, saved.revision, saved.slots, settings_for, saved.since
            )
            generation.state = (
                GenerationState.ACTIVE if saved.number == active else GenerationState.DRAINING
            )
            self.generations[saved.number] = generation
            self.newest = max(self.newest, saved.number)
        for known, process, line in saved_workers:
            generation = self.generations[known.generation]
            worker = Worker(known.slot, generation, process, known.secret, known.since)
            worker.line = line
            # what drains, or never came to serve anybody, ends by itself or is drained
            worker.is_expected_to_end = generation.number != active
            self.workers[known.slot] = worker
            self._watch(worker)
            _log.info(
                "worker taken over",
                slot=known.slot,
                generation=generation.number,
                pid=process.pid,
            )
        self.active = self.generations[active]
        for slot in self.active.slots:
            if slot not in self.workers:
                self._spawn(slot, self.active)
        for generation in list(self.generations.values()):
            self._retire_if_empty(generation)
        self._steer()
        self._on_change()

    def saved_workers(self) -> tuple[SavedWorker, ...]:
        """For the next control plane."""
        return tuple(
            SavedWorker(
                slot=worker.slot,
                generation=worker.generation.number,
                place=worker.generation.slots.index(worker.slot),
                pid=worker.process.pid,
                started=worker.process.started,
                since=worker.started_at,
                secret=worker.secret,
            )
            for worker in self.workers.values()
            if not worker.process.has_ended
        )

    def saved_generations(self) -> tuple[SavedGeneration, ...]:
        """For the next control plane."""
        return tuple(
            SavedGeneration(
                number=generation.number,
                revision=generation.revision,
                slots=generation.slots,
                is_draining=generation.state is GenerationState.DRAINING,
                since=generation.since,
            )
            for generation in self.generations.values()
        )

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
                self._receive_ready(worker, message)
                return
            worker.handle(WorkerInput.REQUEST)
        except IllegalTransitionError as error:
            _log.error("worker broke the protocol", slot=worker.slot, reason=str(error))
            worker.process.kill()
            return
        match message:
            case TokenRequest():
                is_valid = self.admission.is_valid(message.authorization, message.certificate)
                if not is_valid:
                    self._audit.credential_refused(worker, message.source)
                self._server.send(peer, TokenAnswer(message.request, is_valid))
            case AdmissionRequest():
                self._admit(peer, worker, message)
            case ClosedTunnels():

                def acknowledge(number: int) -> None:
                    self._send(worker, ClosedTaken(number))

                self._audit.closed(worker, message, acknowledge)
            case Usage():
                self.rates.receive(worker, message, time.time())
            case Refusals(refused=refused):
                self._audit.refused(worker, refused)
            case TunnelPage(request=request, tunnels=tunnels, is_last=is_last):
                self._receive_page(worker, request, tunnels, is_last)
            case ConnectionPage(request=request, connections=connections, is_last=is_last):
                self._receive_page(worker, request, connections, is_last)

    def _receive_ready(self, worker: Worker, message: Ready) -> None:
        worker.handle(WorkerInput.READY)
        worker.engine = message.engine
        worker.has_meters = message.has_meters
        _log.info(
            "worker serves",
            slot=worker.slot,
            generation=worker.generation.number,
            engine=worker.engine,
        )
        if message.is_draining:
            worker.handle(WorkerInput.DRAIN)
            worker.is_expected_to_end = True
        elif worker.is_expected_to_end:
            # its control plane died before it could tell; it was not to serve any more
            self.drain_worker(worker, 0.0)
        self._failing.discard(worker.slot)
        self.steer_if_possible()

    def _greet(self, peer: Peer, hello: Hello) -> None:
        worker = self.workers.get(hello.slot)
        if worker is None or not worker.is_proved_by(hello.secret):
            _log.warning("a process that we did not start said hello", pid=hello.pid)
            return
        if hello.protocol != PROTOCOL:
            _log.error("worker is of another version and ends", slot=worker.slot, pid=hello.pid)
            worker.process.kill()
            return
        try:
            worker.handle(WorkerInput.HELLO)
        except IllegalTransitionError as error:
            _log.error("worker broke the protocol", slot=worker.slot, reason=str(error))
            worker.process.kill()
            return
        worker.peer = peer
        self._by_peer[peer] = worker

    def _admit(self, peer: Peer, worker: Worker, message: AdmissionRequest) -> None:
        assert self._group is not None
        if self._decisions >= _MAX_DECISIONS:
            denial = Denial(429, "connection_limit_reached", "too many tunnels are being opened")
            self._audit.refused_unread(worker, message, denial)
            self._server.send(peer, Admitted(message.request, None, denial))
            return
        self._decisions += 1
        self._group.create_task(self._decide(peer, worker, message))

    async def _decide(self, peer: Peer, worker: Worker, message: AdmissionRequest) -> None:
        try:
            while True:
                admission = self.admission
                decision = await admission.decide(message)
                if admission is self.admission:  # the policy may have changed meanwhile
                    break
        finally:
            self._decisions -= 1
        is_renewal = bool(message.address)
        if isinstance(decision, Grant):
            decision = self._limit(worker, message, decision, is_renewal=is_renewal)
        decision = self._audit.decided(worker, message, decision)
        if isinstance(decision, Grant):
            if self._server.send(peer, Admitted(message.request, decision, None)):
                self.rates.sent(worker, decision, is_renewal=is_renewal)
        else:
            self._server.send(peer, Admitted(message.request, None, decision))

    def _limit(
        self, worker: Worker, message: AdmissionRequest, grant: Grant, *, is_renewal: bool
    ) -> Grant | Denial:
        unix_now = time.time()
        if is_renewal:
            return self.rates.renew(worker, grant, message.protocol, unix_now)
        return self.rates.admit(worker, grant, message.protocol, time.monotonic(), unix_now)

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

    def _send(self, worker: Worker, message: ToWorker) -> bool:
        """False: the worker will not hear it."""
        return worker.peer is not None and self._server.send(worker.peer, message)

    # live tunnels and connections; see also ``lists``

    def _receive_page(
        self,
        worker: Worker,
        number: int,
        items: tuple[LiveTunnel | LiveConnection, ...],
        is_last: bool,
    ) -> None:
        for item in items:
            if isinstance(item, LiveTunnel):
                self._audit.seen(worker, item)
        self.lists.receive(worker, number, items, is_last)

    def close_tunnels(self, worker: Worker, tunnels: Iterable[LiveTunnel], denial: Denial) -> bool:
        """Have live tunnels ended, their clients told why. False: the worker will not hear it."""
        keys = tuple((tunnel.connection, tunnel.quarter_stream_id) for tunnel in tunnels)
        return self._send(worker, CloseTunnels(keys, denial))

    def tell(self, worker: Worker, message: SetBudgets | SetLimits) -> bool:
        """False: the worker will not hear it. One of code from before rates need not."""
        return not worker.has_meters or self._send(worker, message)

    def set_log_level(self, level: str) -> None:
        """Of all workers."""
        for worker in self.workers.values():
            self._send(worker, SetLogLevel(level))


def start_worker(settings: WorkerSettings) -> Process:
    """A worker process that reads its settings. Raises ``OSError``."""
    return spawn(
        (sys.executable, "-I", "-m", "toppy.worker"),
        encode_settings(settings),
        descriptors=[descriptor for row in settings.sockets for descriptor in row],
        environ=_worker_environment(os.environ),
    )


def _worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: nothing that may be a secret."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "TMPDIR", "RUST_BACKTRACE", "SSL_CERT_FILE")
    return {name: environ[name] for name in kept if name in environ}
