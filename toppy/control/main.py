"""The control plane: configuration, listening sockets, workers, health; never a public packet."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvloop

from toppy import __version__
from toppy.config.address import parse_host_port
from toppy.control.admission import Admission
from toppy.control.health import admin_app, health_app, serve_http
from toppy.control.listeners import Listeners
from toppy.control.settings import GatewaySettings, load_settings
from toppy.control.statistics import Statistics
from toppy.control.supervisor import Supervisor
from toppy.errors import ConfigError
from toppy.ipc.control_channel import ControlServer
from toppy.model.counters import WorkerCounters
from toppy.net.resolver import Resolver
from toppy.observe.log import configure_logging, get_logger
from toppy.observe.metrics import WorkerSnapshot, render_metrics
from toppy.policy.ruleset import Ruleset
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.system.descriptors import raise_descriptor_limit
from toppy.system.process_title import set_process_title
from toppy.system.service_manager import ServiceManager
from toppy.wire.ipc_message import WorkerSettings

ADMIN_SOCKET = "admin.sock"
_STOP_DEADLINE_S = 4.0
"""Below the 5 s in which SIGTERM must have done its work."""
_UNIX_PATH_BYTES = 107  # sockaddr_un
_STATUS_INTERVAL_S = 5.0

_log = get_logger("control")


class ControlPlane:
    """One gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        config = settings.config
        self._engine = choose_engine(config.quic.engine)
        count = (os.cpu_count() or 1) if config.workers == "auto" else config.workers
        self._worker_count = count
        self._lock = _lock_runtime_dir(settings.runtime_dir)
        self._listeners = Listeners(
            [parse_host_port(text) for text in config.listen.quic],
            2 * count,
            buffer_bytes=config.listen.socket_buffer_bytes,
        )
        self._health_socket: socket.socket | None = None
        if config.listen.health:
            self._health_socket = _bind_health(*parse_host_port(config.listen.health))
        self._statistics = Statistics()
        self._started_at = time.time()
        self._is_serving = False
        self._services = ServiceManager()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises ``ConfigError`` when it cannot begin."""
        settings, config = self._settings, self._settings.config
        runtime = settings.runtime_dir
        server = ControlServer(_ipc(runtime / "control"), _ipc(runtime / "reports"))
        admin_path = runtime / ADMIN_SOCKET
        admin_path.unlink(missing_ok=True)
        admin_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        admin_socket.bind(str(admin_path))
        supervisor = Supervisor(
            server,
            self._listeners,
            Admission(
                settings.authenticator,
                Ruleset(config.policy.rules, revision=1),
                Resolver(config.resolver.nameservers, config.resolver.timeout_s),
                time.time,
            ),
            self._statistics,
            self._worker_settings,
            worker_count=self._worker_count,
        )
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, _refuse_reload)

        def on_serving() -> None:
            self._is_serving = True
            self._announce()

        def metrics() -> bytes:
            by_slot = self._statistics.by_slot()
            snapshots = [
                WorkerSnapshot(
                    slot=slot,
                    generation=supervisor.workers[slot].generation,
                    is_up=is_up,
                    counters=by_slot.get(slot, WorkerCounters()),
                )
                for slot, is_up in sorted(self._worker_states(supervisor).items())
            ]
            return render_metrics(
                snapshots,
                version=__version__,
                engine=self._engine,
                worker_deaths=supervisor.deaths,
            )

        tasks: list[asyncio.Task[Any]] = [
            loop.create_task(supervisor.run(on_serving)),
            loop.create_task(serve_http(admin_app(lambda: self._status(supervisor)), admin_socket)),
            loop.create_task(self._report_to_service_manager(supervisor)),
        ]
        if self._health_socket is not None:
            app = health_app(lambda: self._is_healthy(supervisor), metrics)
            tasks.append(loop.create_task(serve_http(app, self._health_socket)))
        stop_task = loop.create_task(stopping.wait())
        try:
            await asyncio.wait({stop_task, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()  # a part of the gateway failed: say why
            _log.info("gateway stops")
        finally:
            self._is_serving = False
            self._services.stopping()
            await supervisor.stop(_STOP_DEADLINE_S)
            for task in [*tasks, stop_task]:
                task.cancel()
            await asyncio.gather(*tasks, stop_task, return_exceptions=True)
            server.close()
            self._listeners.close()
            for name in (ADMIN_SOCKET, "control.sock", "reports.sock"):
                (runtime / name).unlink(missing_ok=True)

    def _announce(self) -> None:
        config = self._settings.config
        addresses = [f"{host}:{port}" for host, port in self._listeners.addresses]
        _log.info(
            "gateway serves",
            version=__version__,
            engine=self._engine,
            listen=addresses,
            workers=self._worker_count,
        )
        if not self._listeners.is_steered:
            _log.warning("no BPF steering here: the kernel's hash spreads connections")
        if self._engine == "aioquic" and config.quic.engine == "auto":
            _log.warning(SLOW_ENGINE_NOTICE)
        if config.insecure_no_auth and not config.auth.is_configured:
            _log.warning("no authentication: anybody who reaches this address may use it")
        self._services.ready()

    def _worker_settings(self, slot: int, generation: int, secret: str) -> WorkerSettings:
        settings, config = self._settings, self._settings.config
        return WorkerSettings(
            slot=slot,
            generation=generation,
            secret=secret,
            control_address=_ipc(settings.runtime_dir / "control"),
            report_address=_ipc(settings.runtime_dir / "reports"),
            sockets=self._listeners.descriptors(slot),
            names=settings.names,
            proxy_name=config.name,
            engine=self._engine,
            certificate_chain_pem=settings.certificate_chain_pem,
            private_key_pem=settings.private_key_pem,
            reset_key=settings.reset_key,
            token_key=settings.token_key,
            quic=config.quic.model_dump(),
            limits=config.limits.model_dump(),
            log_level=config.log.level,
            log_format=config.log.format,
        )

    def _worker_states(self, supervisor: Supervisor) -> dict[int, bool]:
        return {
            slot: worker.serving.is_set() and worker.process.returncode is None
            for slot, worker in supervisor.workers.items()
        }

    def _is_healthy(self, supervisor: Supervisor) -> bool:
        return self._is_serving and any(self._worker_states(supervisor).values())

    def _status(self, supervisor: Supervisor) -> dict[str, Any]:
        """What ``toppy-gw status --json`` prints."""
        by_slot = self._statistics.by_slot()
        total = self._statistics.total()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "engine": self._engine,
            "since": self._started_at,
            "configuration": self._settings.source,
            "listen": [f"{host}:{port}" for host, port in self._listeners.addresses],
            "health": self._settings.config.listen.health,
            "steered": self._listeners.is_steered,
            "generation": supervisor.generation,
            "worker_deaths": supervisor.deaths,
            "connections": total.connections_open,
            "tunnels": total.tunnels_open,
            "drops": total.drops,
            "admissions": total.admissions,
            "workers": [
                {
                    "slot": slot,
                    "generation": worker.generation,
                    "pid": worker.process.pid,
                    "state": worker.state.name.lower(),
                    "since": worker.started_at,
                    "connections": by_slot[slot].connections_open if slot in by_slot else 0,
                    "tunnels": by_slot[slot].tunnels_open if slot in by_slot else 0,
                    "datagrams_to_target": (
                        by_slot[slot].datagrams_to_target if slot in by_slot else 0
                    ),
                    "datagrams_to_client": (
                        by_slot[slot].datagrams_to_client if slot in by_slot else 0
                    ),
                }
                for slot, worker in sorted(supervisor.workers.items())
            ],
        }

    async def _report_to_service_manager(self, supervisor: Supervisor) -> None:
        watchdog_s = self._services.watchdog_interval_s()
        interval_s = min(_STATUS_INTERVAL_S, watchdog_s or _STATUS_INTERVAL_S)
        while True:
            await asyncio.sleep(interval_s)
            total = self._statistics.total()
            up = sum(self._worker_states(supervisor).values())
            self._services.status(
                f"{up}/{self._worker_count} workers, {total.connections_open} connections, "
                f"{total.tunnels_open} tunnels"
            )
            self._services.watchdog()


def run_gateway(path: Path | None, environ: Mapping[str, str]) -> int:
    """``toppy-gw run``: until a signal; returns the exit code."""
    try:
        settings = load_settings(path, environ)
        config = settings.config
        configure_logging(config.log.level, config.log.format, process="control")
        set_process_title("toppy-gw: control")
        raise_descriptor_limit()
        for warning in settings.warnings:
            _log.warning("configuration", warning=warning)
        uvloop.run(_run(settings))
    except ConfigError as error:
        print(f"toppy-gw: {error}", file=sys.stderr)
        return 1
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        print(f"toppy-gw: {first}", file=sys.stderr)
        return 1
    return 0


def _refuse_reload() -> None:
    _log.warning("SIGHUP: this version cannot reload its configuration; restart it")


async def _run(settings: GatewaySettings) -> None:
    await ControlPlane(settings).run()


def _ipc(path: Path) -> str:
    return f"ipc://{path}.sock"


def _lock_runtime_dir(directory: Path) -> int:
    """Make the runtime directory, mode 0700, and take it for this gateway alone."""
    longest = len(str(directory / "control.sock"))
    if longest > _UNIX_PATH_BYTES:
        raise ConfigError(
            f"runtime_dir: {directory} is too long for unix sockets "
            f"({longest} bytes, at most {_UNIX_PATH_BYTES}); choose a shorter one",
            key="runtime_dir",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"runtime_dir: cannot use {directory}: {error.strerror}; "
            "choose a directory that this user may write",
            key="runtime_dir",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"runtime_dir: another toppy-gw runs in {directory}; stop it first, "
            "or give this one a runtime_dir of its own",
            key="runtime_dir",
        ) from None
    return lock


def _bind_health(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"listen.health: cannot listen on {host}:{port}: {error.strerror}", key="listen.health"
        ) from None
    return sock
