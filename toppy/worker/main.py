"""A data-plane worker: one process, one slot's sockets, QUIC on one side and targets on the other.

Started by the control plane, which writes its settings to the worker's standard input and keeps
that pipe open: its end tells the worker that the control plane is gone. It goes on then with the
grants it has, until another control plane takes it over.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
import time

import uvloop

from toppy.ipc.control_channel import ControlClient
from toppy.ipc.takeover_channel import TakeoverListener
from toppy.ipc.worker_sockets import takeover_path
from toppy.model.grant import Denial, Grant
from toppy.net.quic_driver import QuicDriver
from toppy.net.udp_socket import UdpSocket
from toppy.observe.log import configure_logging, get_logger
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import H3_ALPN, PING_ALPN, Endpoint
from toppy.quic.engine import EngineConfig
from toppy.quic.gate import ConnectionGate, GateLimits
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title
from toppy.system.processes import run_on_core
from toppy.system.stop_signals import release_stop_signals
from toppy.wire.connection_id import (
    CONNECTION_ID_BYTES,
    WorkerAddress,
    encode_family,
    encode_prefix,
)
from toppy.wire.ipc_message import (
    SETTINGS_LENGTH,
    AdmissionRequest,
    Admitted,
    ClosedTaken,
    ClosedTunnel,
    CloseTunnels,
    ConnectionPage,
    Drain,
    Hello,
    IpcError,
    ListConnections,
    ListTunnels,
    Owners,
    Ready,
    Report,
    SetBudgets,
    SetLimits,
    SetLogLevel,
    Stop,
    TokenAnswer,
    TokenRequest,
    ToWorker,
    TunnelPage,
    WorkerSettings,
    pages,
    parse_settings,
)
from toppy.worker.client_certificates import certificate_reader
from toppy.worker.closed_tunnels import ClosedTunnelQueue
from toppy.worker.refusals import RefusalTable
from toppy.worker.router import Router
from toppy.worker.strays import Strays
from toppy.worker.target import UdpTarget, connect_tcp_target, open_udp_target
from toppy.worker.tcp_relay import Connecting, TcpFlow
from toppy.worker.tunnel import RouterLimits
from toppy.worker.udp_relay import UdpFlow

_TICK_S = 0.5
_STRAYS_PER_WAKE_UP = 64
_TARGET_BUFFER_BYTES = 1 << 20
_STREAM_WINDOW_BYTES = 8 << 20
_CONNECTION_WINDOW_BYTES = 512 << 10
"""What a stranger can make a worker hold; UDP tunnels use DATAGRAM frames, their capsules need
little. A connection with a TCP tunnel gets more: see ``tcp_relay``."""
_PAUSED_WINDOW_BYTES = 32 << 20
"""What the targets that do not read can make a connection hold, beyond that."""

_LAST_WORDS_S = 1.0
"""How long a worker that ends waits until its tunnels' ends are in the audit log."""

_log = get_logger("worker")


class Worker:
    """Wires endpoint, router, driver and control channel together."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._slot, self._generation = settings.slot, settings.generation
        self._stopped = asyncio.Event()
        now = time.monotonic()
        limits = settings.limits
        gate = ConnectionGate(
            GateLimits(
                max_connections=limits["max_connections"],
                max_connections_per_source=limits["max_connections_per_source"],
                retry_threshold=limits["retry_threshold"],
                handshake_timeout_s=limits["handshake_timeout_s"],
                attempts_per_source_per_s=limits["max_connection_attempts_per_source_per_s"],
            )
        )
        self._engine = make_engine(
            settings.engine,
            EngineConfig(
                is_client=False,
                alpn_protocols=(H3_ALPN, PING_ALPN),
                certificate_chain_pem=settings.certificate_chain_pem,
                private_key_pem=settings.private_key_pem,
                idle_timeout_s=settings.quic["idle_timeout_s"],
                congestion_control=settings.quic["congestion_control"],
                initial_packet_bytes=settings.quic["initial_packet_bytes"],
                max_packet_bytes=settings.quic["max_packet_bytes"],
                max_bidirectional_streams=limits["max_streams_per_connection"],
                stream_window_bytes=_STREAM_WINDOW_BYTES,
                connection_window_bytes=_CONNECTION_WINDOW_BYTES,
                paused_window_bytes=_PAUSED_WINDOW_BYTES,
                tunnel_queue_bytes=limits["tunnel_queue_bytes"],
                connection_queue_bytes=limits["connection_queue_bytes"],
                connection_id_prefix=encode_prefix(settings.slot, settings.generation),
                reset_prefix=encode_family(),
                connection_id_bytes=CONNECTION_ID_BYTES,
                reset_key=settings.reset_key,
                token_key=settings.token_key,
                resumes_sessions=settings.quic["session_resumption"],
                client_ca_pem=settings.client_ca_pem,
                requires_client_certificate=settings.requires_client_certificate,
                cipher_suites=settings.cipher_suites,
            ),
            gate=gate.decide,
            now=now,
        )
        self._endpoint = Endpoint(
            self._engine, is_client=False, max_header_bytes=limits["max_header_bytes"]
        )
        self._router = Router(
            self._endpoint,
            gate,
            self,
            RouterLimits(
                max_tunnels_per_connection=limits["max_tunnels_per_connection"],
                max_failed_auth_per_connection=limits["max_failed_auth_per_connection"],
                max_failed_auth_per_source_per_min=limits["max_failed_auth_per_source_per_min"],
                max_pending_admissions=limits["max_pending_admissions"],
                admission_timeout_s=limits["admission_timeout_s"],
                tunnel_idle_timeout_s=limits["tunnel_idle_timeout_s"],
                tcp_idle_timeout_s=limits["tcp_idle_timeout_s"],
                tcp_connect_timeout_s=limits["tcp_connect_timeout_s"],
                tcp_max_connecting=limits["tcp_max_connecting"],
                tcp_max_connecting_per_connection=limits["tcp_max_connecting_per_connection"],
                early_datagrams_per_tunnel=limits["early_datagrams_per_tunnel"],
                early_bytes_per_tunnel=limits["early_bytes_per_tunnel"],
                capsule_queue_bytes=limits["tunnel_queue_bytes"],
                connection_capsule_queue_bytes=limits["connection_queue_bytes"],
            ),
            proxy_name=settings.proxy_name,
            own_names=frozenset(settings.names),
            unix_now=time.time(),
            read_certificate=certificate_reader(self._engine, settings.client_ca_pem),
        )
        rows = [
            [
                UdpSocket(
                    socket.socket(fileno=row[index]),
                    gso=settings.quic["gso"],
                    gro=settings.quic["gro"],
                    answers_from_same_address=True,
                )
                for index in settings.read
            ]
            for row in settings.sockets
        ]
        self._sockets = [sock for row in rows for sock in row]
        self._driver = QuicDriver(
            self._endpoint,
            self._sockets,
            self._router.pump,
            # without steering the generations read the same sockets, one after the other
            is_reading=settings.is_steered,
        )
        own = WorkerAddress(settings.slot, settings.generation % 256)
        self._strays = Strays(settings.runtime_dir, own, rows, gate, self._driver.take)
        if not settings.is_steered:
            self._driver.divert(self._strays.sort)
        self._closed = ClosedTunnelQueue()
        self._refusals = RefusalTable()
        self._all_heard = asyncio.Event()
        self._has_ended = False
        self._connect()
        self._takeover: TakeoverListener | None = None
        self._drain_deadline: float | None = None
        self._orphaned_at: float | None = None
        self._unheard_since: float | None = None
        """When the last control plane was lost; one that took over and has said nothing since does
        not count: it may never come up."""
        self._is_known = False
        """The control plane has spoken to it: then the next one will know of it, too."""

    def _connect(self) -> None:
        settings = self._settings
        self._control = ControlClient(settings.control_address, settings.report_address)
        self._receiver = asyncio.get_running_loop().create_task(
            self._control.serve(self._receive, self._garbage)
        )

    # what the router has done for it

    def ask(self, message: AdmissionRequest | TokenRequest) -> bool:
        """See ``RouterShell``. Without a control plane the question waits for the next one."""
        if self._settings.refuses_unrecorded and self._closed.is_full:
            return False
        return self._orphaned_at is not None or self._control.send(message)

    def open_udp(self, tunnel: UdpFlow, grant: Grant) -> UdpTarget:
        """See ``RouterShell``."""
        return open_udp_target(
            tunnel,
            grant,
            self._router.receive_from_target,
            self._driver.flush_soon,
            buffer_bytes=_TARGET_BUFFER_BYTES,
        )

    def connect_tcp(self, flow: TcpFlow, grant: Grant, timeout_s: float) -> Connecting:
        """See ``RouterShell``."""
        client = self._engine.peer_address(flow.connection)
        return connect_tcp_target(flow, grant, timeout_s, client)

    def flush(self) -> None:
        """See ``RouterShell``."""
        self._driver.flush_soon()

    def now(self) -> float:
        """See ``RouterShell``."""
        return time.monotonic()

    def tunnel_closed(self, tunnel: ClosedTunnel) -> None:
        """See ``RouterShell``."""
        self._closed.add(tunnel)

    def refused(self, source: str, target: str, denial: Denial) -> None:
        """See ``RouterShell``."""
        self._refusals.add(source, target, denial)

    async def run(self) -> None:
        """Serve until told to stop, until drained, or until there is no control plane for long."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._stopped.set)
        # a terminal that closes tells the whole group; the control plane decides what follows
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        release_stop_signals()  # it may have been started while they were held
        loop.add_reader(sys.stdin.fileno(), self._lose_parent)
        loop.add_reader(self._strays.fileno(), self._receive_strays)
        self._takeover = TakeoverListener(
            takeover_path(settings.runtime_dir, settings.slot),
            settings.secret,
            [descriptor for row in settings.sockets for descriptor in row],
            self._follow_new_control_plane,
            self._lose_control_plane,
            on_trouble=lambda error: _log.error(
                "a new control plane cannot be heard now", reason=error.strerror, slot=self._slot
            ),
        )
        self._introduce()
        ticker = loop.create_task(self._tick())
        try:
            await self._stopped.wait()
        finally:
            self._has_ended = True
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
            loop.remove_reader(self._strays.fileno())
            self._takeover.close()
            now = time.monotonic()
            self._router.close(now)
            self._driver.flush_now()
            self._driver.close()
            self._strays.close()
            self._report()
            await self._say_last_words()
            # let ZeroMQ's thread hand the last report over
            await asyncio.sleep(0.05)
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
            self._control.close()

    async def _say_last_words(self) -> None:
        """The ends of its tunnels, until they are in the audit log; not without a control plane."""
        self._refusals.send(self._control.send)
        self._closed.send(self._control.send, time.monotonic())
        if self._closed and self._orphaned_at is None:
            self._all_heard.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._all_heard.wait()

    def _introduce(self) -> None:
        settings = self._settings
        self._control.send(Hello(settings.slot, settings.generation, os.getpid(), settings.secret))
        self._control.send(
            Ready(self._engine.name, self._drain_deadline is not None, has_meters=True)
        )

    # the control plane, and its end

    def _lose_parent(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._lose_control_plane()

    def _lose_control_plane(self) -> None:
        if not self._is_known:
            self._stopped.set()
        elif self._orphaned_at is None and not self._stopped.is_set():
            _log.warning(
                "control plane is gone, worker goes on",
                slot=self._slot,
                generation=self._generation,
            )
            if self._unheard_since is None:
                self._unheard_since = time.monotonic()
            self._orphaned_at = self._unheard_since

    def _follow_new_control_plane(self) -> None:
        """Begin anew: what was said to the old one is lost, and said again."""
        _log.info("worker has a new control plane", slot=self._slot, generation=self._generation)
        loop = asyncio.get_running_loop()
        loop.remove_reader(sys.stdin.fileno())
        self._orphaned_at = None
        self._is_known = True
        self._receiver.cancel()
        self._control.close()
        self._connect()
        self._introduce()
        self._router.ask_again()
        self._closed.say_again()
        self._router.metering.tell_again()
        self._report()

    def _receive(self, message: ToWorker) -> None:
        now = time.monotonic()
        self._is_known = True
        self._unheard_since = None
        if isinstance(message, ClosedTaken):
            self._closed.acknowledge(message.number)
            if not self._closed:
                self._all_heard.set()
            return
        if self._has_ended:
            return
        match message:
            case Admitted() | TokenAnswer():
                self._router.receive_answer(message, now)
                self._driver.flush_soon()
            case Owners(active=active, generations=generations):
                self._strays.learn(active, generations)
                if not self._settings.is_steered:
                    self._driver.read(self._settings.slot in active)
            case Drain(timeout_s=timeout_s):
                self._drain(timeout_s, now)
            case ListTunnels(request=request, with_authorization=with_authorization):
                tunnels = self._router.live_tunnels(with_authorization=with_authorization)
                for page, is_last in pages(tunnels):
                    self._control.send(TunnelPage(request, page, is_last))
            case ListConnections(request=request):
                for found, is_last in pages(self._router.live_connections()):
                    self._control.send(ConnectionPage(request, found, is_last))
            case CloseTunnels(tunnels=closing, denial=denial):
                self._router.close_tunnels(closing, denial)
                self._driver.flush_soon()
            case SetBudgets():
                self._router.metering.set_budgets(message, now)
            case SetLimits(tunnels=changes):
                self._router.metering.set_limits(changes, now)
            case SetLogLevel(level=level):
                configure_logging(level, self._settings.log_format, process="worker")
            case Stop():
                self._stopped.set()

    def _drain(self, timeout_s: float, now: float) -> None:
        _log.info(
            "worker drains", timeout_s=timeout_s, slot=self._slot, generation=self._generation
        )
        self._drain_deadline = now + timeout_s if timeout_s else math.inf
        self._driver.divert(self._strays.sort)
        self._router.drain(now)
        self._driver.flush_soon()

    def _receive_strays(self) -> None:
        now = time.monotonic()
        for _ in range(_STRAYS_PER_WAKE_UP):
            if not self._strays.receive(now):
                break
        self._driver.wake_up(now)

    def _garbage(self, error: IpcError) -> None:
        _log.error("control plane sent something else than a message", reason=str(error))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self._router.tick(now, time.time())
            self._driver.flush_soon()
            self._report()
            if self._orphaned_at is None:
                self._closed.send(self._control.send, now)
                self._refusals.send(self._control.send)
                self._router.metering.send(self._control.send)
            if (
                self._drain_deadline is not None
                and (self._router.is_drained or now >= self._drain_deadline)
                # without a control plane nobody would hear its last report
                and self._orphaned_at is None
            ):
                _log.info(
                    "worker is drained",
                    tunnels=self._router.tunnels,
                    slot=self._slot,
                    generation=self._generation,
                )
                self._stopped.set()
            if self._orphaned_at is not None and self._is_left_alone(now - self._orphaned_at):
                _log.error(
                    "no control plane came back, worker stops",
                    slot=self._slot,
                    generation=self._generation,
                )
                self._stopped.set()

    def _is_left_alone(self, orphaned_s: float) -> bool:
        patience_s = self._settings.orphan_timeout_s
        assert self._takeover is not None
        return not self._takeover.can_be_found or bool(patience_s and orphaned_s >= patience_s)

    def _report(self) -> None:
        settings = self._settings
        counters = self._router.snapshot()
        counters.socket_overflow = sum(sock.overflow for sock in self._sockets)
        counters.send_errors = self._driver.send_errors
        counters.strays = self._strays.handed_over
        counters.strays_lost = self._strays.lost
        self._control.report(Report(settings.slot, settings.generation, settings.secret, counters))


def read_settings() -> WorkerSettings:
    """Read the length-prefixed settings from standard input, which stays open."""
    stdin = sys.stdin.buffer.raw if hasattr(sys.stdin.buffer, "raw") else sys.stdin.buffer

    def read_exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = stdin.read(size - len(data))
            if not chunk:
                sys.exit("toppy-gw worker: started without settings; run toppy-gw instead")
            data += chunk
        return data

    (size,) = SETTINGS_LENGTH.unpack(read_exactly(SETTINGS_LENGTH.size))
    return parse_settings(read_exactly(size))


async def _run(settings: WorkerSettings) -> None:
    await Worker(settings).run()


def main() -> None:
    """Entry point of ``python -m toppy.worker``."""
    settings = read_settings()
    set_process_title(f"toppy-gw: worker {settings.slot} gen {settings.generation}")
    configure_logging(settings.log_level, settings.log_format, process="worker")
    raise_descriptor_limit()
    if settings.core is not None:
        try:
            run_on_core(settings.core)
        except OSError as error:  # it may have been taken away since
            _log.warning("worker is not pinned", core=settings.core, reason=error.strerror)
    uvloop.run(_run(settings))
