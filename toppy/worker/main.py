"""A data-plane worker: one process, one slot's sockets, QUIC on one side and targets on the other.

Started by the control plane, which writes its settings to the worker's standard input and keeps
that pipe open: its end tells the worker that the control plane is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time

import uvloop

from toppy.ipc.control_channel import ControlClient
from toppy.model.grant import Grant
from toppy.net.quic_driver import QuicDriver
from toppy.net.udp_socket import UdpSocket
from toppy.observe.log import configure_logging, get_logger
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import H3_ALPN, PING_ALPN, Endpoint
from toppy.quic.engine import EngineConfig
from toppy.quic.gate import ConnectionGate, GateLimits
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title
from toppy.wire.connection_id import CONNECTION_ID_BYTES, encode_prefix
from toppy.wire.ipc_message import (
    SETTINGS_LENGTH,
    AdmissionRequest,
    Admitted,
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
from toppy.worker.router import Router, RouterLimits, Tunnel
from toppy.worker.target import UdpTarget, open_udp_target

_TICK_S = 0.5
_TARGET_BUFFER_BYTES = 1 << 20
_STREAM_WINDOW_BYTES = 128 << 10
_CONNECTION_WINDOW_BYTES = 512 << 10
"""What a stranger can make a worker hold. Tunnels use DATAGRAM frames; capsules need little."""


class Worker:
    """Wires endpoint, router, driver and control channel together."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._log = get_logger("worker").bind(slot=settings.slot, generation=settings.generation)
        self._stopped = asyncio.Event()
        now = time.monotonic()
        limits = settings.limits
        gate = ConnectionGate(
            GateLimits(
                max_connections=limits["max_connections"],
                max_connections_per_source=limits["max_connections_per_source"],
                retry_threshold=limits["retry_threshold"],
                handshake_timeout_s=limits["handshake_timeout_s"],
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
                tunnel_queue_bytes=limits["tunnel_queue_bytes"],
                connection_queue_bytes=limits["connection_queue_bytes"],
                connection_id_prefix=encode_prefix(settings.slot, settings.generation),
                connection_id_bytes=CONNECTION_ID_BYTES,
                reset_key=settings.reset_key,
                token_key=settings.token_key,
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
                max_pending_admissions=limits["max_pending_admissions"],
                admission_timeout_s=limits["admission_timeout_s"],
                tunnel_idle_timeout_s=limits["tunnel_idle_timeout_s"],
                early_datagrams_per_tunnel=limits["early_datagrams_per_tunnel"],
                early_bytes_per_tunnel=limits["early_bytes_per_tunnel"],
                capsule_queue_bytes=limits["tunnel_queue_bytes"],
                connection_capsule_queue_bytes=limits["connection_queue_bytes"],
            ),
            proxy_name=settings.proxy_name,
            own_names=frozenset(settings.names),
        )
        self._sockets = [
            UdpSocket(
                socket.socket(fileno=descriptor),
                gso=settings.quic["gso"],
                gro=settings.quic["gro"],
                answers_from_same_address=True,
            )
            for descriptor in settings.sockets
        ]
        self._driver = QuicDriver(self._endpoint, self._sockets, self._router.pump)
        self._control = ControlClient(settings.control_address, settings.report_address)

    # what the router has done for it

    def ask(self, message: AdmissionRequest | TokenRequest) -> bool:
        """See ``RouterShell``."""
        return self._control.send(message)

    def open_target(self, tunnel: Tunnel, grant: Grant) -> UdpTarget:
        """See ``RouterShell``."""
        return open_udp_target(
            tunnel,
            grant,
            self._router.receive_from_target,
            self._driver.flush_soon,
            buffer_bytes=_TARGET_BUFFER_BYTES,
        )

    async def run(self) -> None:
        """Serve until told to stop, or until the control plane is gone."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._stopped.set)
        # a terminal that closes tells the whole group; the control plane decides what follows
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        loop.add_reader(sys.stdin.fileno(), self._control_plane_is_gone)
        self._control.send(Hello(settings.slot, settings.generation, os.getpid(), settings.secret))
        self._control.send(Ready(self._engine.name))
        self._log.info("worker serves", engine=self._engine.name)
        tasks = [
            loop.create_task(self._control.serve(self._receive, self._garbage)),
            loop.create_task(self._tick()),
        ]
        try:
            await self._stopped.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            now = time.monotonic()
            self._router.close(now)
            self._driver.flush_now()
            self._driver.close()
            self._report()
            # let ZeroMQ's thread hand the last report over
            await asyncio.sleep(0.05)
            self._control.close()

    def _control_plane_is_gone(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        if not self._stopped.is_set():
            self._log.warning("control plane is gone, worker stops")
            self._stopped.set()

    def _receive(self, message: ToWorker) -> None:
        match message:
            case Admitted() | TokenAnswer():
                self._router.receive_answer(message, time.monotonic())
                self._driver.flush_soon()
            case Stop():
                self._stopped.set()

    def _garbage(self, error: IpcError) -> None:
        self._log.error("control plane sent something else than a message", reason=str(error))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._router.tick(time.monotonic(), time.time())
            self._driver.flush_soon()
            self._report()

    def _report(self) -> None:
        settings = self._settings
        counters = self._router.snapshot()
        counters.socket_overflow = sum(sock.overflow for sock in self._sockets)
        counters.send_errors = self._driver.send_errors
        counters.send_errors = self._driver.send_errors
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
    uvloop.run(_run(settings))
