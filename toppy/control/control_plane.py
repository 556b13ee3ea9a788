"""The control plane: one gateway's configuration, sockets, generations and operators."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toppy import __version__
from toppy.config.address import parse_host_port
from toppy.config.changes import changed_settings
from toppy.control import operators
from toppy.control.admin import ADMIN_SOCKET, AdminError, admin_app
from toppy.control.admission import Admission
from toppy.control.health import health_app, serve_http
from toppy.control.listeners import Listeners, close_all, named
from toppy.control.rollouts import Outcome, Plan, Rollouts
from toppy.control.runtime import (
    Keys,
    bind_admin,
    bind_health,
    lock_runtime_dir,
    socket_address,
)
from toppy.control.saved_state import (
    FORMAT,
    SavedState,
    SavedWorker,
    read_state,
    remove_state,
    write_state,
)
from toppy.control.settings import GatewaySettings, load_settings
from toppy.control.statistics import Statistics
from toppy.control.supervisor import (
    Supervisor,
    find_saved_worker,
)
from toppy.control.upgrade import become_new_code, try_new_code
from toppy.errors import ConfigError, ResourceLimitError, ToppyError
from toppy.ipc.control_channel import ControlServer
from toppy.model.counters import WorkerCounters
from toppy.model.target import Target
from toppy.net.resolver import Resolver
from toppy.observe.log import configure_logging, get_logger
from toppy.observe.metrics import WorkerSnapshot, render_metrics
from toppy.policy.ruleset import Ruleset
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.system.descriptors import hand_over, inherited_sockets
from toppy.system.processes import Process, usable_cores
from toppy.system.service_manager import ServiceManager
from toppy.wire.connection_id import MAX_SLOTS
from toppy.wire.ipc_message import WorkerSettings

_STOP_DEADLINE_S = 4.0
"""Below the 5 s in which SIGTERM must have done its work."""
_STATUS_INTERVAL_S = 5.0
_HEALTH = "health"

_log = get_logger("control")


class ControlPlane:
    """One gateway. ``path`` and ``environ`` are where its configuration is read again from."""

    def __init__(
        self, settings: GatewaySettings, path: Path | None, environ: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._path = path
        self._environ = dict(environ)
        self._revision = 1
        self._started_at = time.time()
        self._is_serving = False
        self._is_upgrading = False
        self._last_reload: dict[str, Any] | None = None
        self._services = ServiceManager()
        self._stopping = asyncio.Event()
        self._save_is_due = False
        self._signal_tasks: set[asyncio.Task[None]] = set()
        runtime = settings.runtime_dir
        self._lock = lock_runtime_dir(runtime)
        saved = read_state(runtime)
        inherited = inherited_sockets(os.environ)
        adopted: list[tuple[SavedWorker, Process, socket.socket]] = []
        if saved is not None:
            adopted = _find_workers(saved, str(runtime), inherited)
            if saved.generation_active not in {g.number for g in saved.generations}:
                # it died before any generation served: there is nothing to go on with
                for _, process, line in adopted:
                    process.kill()
                    line.close()
                adopted = []
            self._revision = saved.revision
            self._started_at = saved.started_at
        self._saved = saved if adopted else None
        self._adopted = adopted
        self._keys = Keys.of(settings, saved)
        if saved is not None and not settings.config.tls.certificate:
            self._settings = self._load()
        try:
            self._bind(inherited)
        except BaseException:
            close_all(inherited)
            for _, process, line in adopted:
                process.forget()
                line.close()
            raise
        self._statistics = Statistics()
        if saved is not None:
            self._statistics = Statistics(saved.past, saved.latest)
            for slot in saved.latest.keys() - {worker.slot for worker, _, _ in adopted}:
                self._statistics.worker_gone(slot)
        self._server = ControlServer(
            socket_address(runtime, "control"), socket_address(runtime, "reports")
        )
        self._admin_socket = bind_admin(runtime)
        self._supervisor = Supervisor(
            self._server,
            self._listeners,
            self._admission_for(self._settings),
            self._statistics,
            runtime_dir=str(runtime),
            slot_count=self._slot_count,
            on_change=self._save_soon,
        )
        if saved is not None:
            self._supervisor.deaths = saved.worker_deaths
            self._supervisor.newest = saved.generation
        self._rollouts = Rollouts(self._supervisor, self._listeners, self._prepare)

    def _bind(self, inherited: dict[str, socket.socket]) -> None:
        config = self._settings.config
        self._slot_count = min(config.worker_count * config.reload.generations, MAX_SLOTS)
        health = inherited.pop(_HEALTH, None)
        self._listeners = Listeners(
            [parse_host_port(text) for text in config.listen.quic],
            self._slot_count,
            config.worker_count,
            buffer_bytes=config.listen.socket_buffer_bytes,
            is_steered=config.listen.steering,
            inherited=inherited,
        )
        if self._listeners.is_steered:
            self._slot_count = self._listeners.slot_count
        taken = set(self._listeners.by_name().values()) if self._listeners.is_inherited else set()
        close_all({name: sock for name, sock in inherited.items() if sock not in taken})
        self._health_socket: socket.socket | None = None
        try:
            if config.listen.health:
                host, port = parse_host_port(config.listen.health)
                self._health_socket = bind_health(host, port, health)
        except ConfigError:
            self._listeners.close()
            raise

    def stop(self) -> dict[str, Any]:
        """Begin to end; ``run`` returns within five seconds."""
        self._stopping.set()
        return {"stopping": True}

    async def run(self, *, until_serving: bool = False) -> None:
        """Serve until SIGTERM or SIGINT. Raises ``ToppyError`` when it cannot begin.

        ``until_serving``: stop as soon as a generation serves; for a trial.
        """
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._stopping.set)
        tasks: list[asyncio.Task[Any]] = [
            loop.create_task(serve_http(admin_app(self), self._admin_socket, is_public=False)),
            loop.create_task(self._report_to_service_manager()),
        ]
        begun = asyncio.Event()

        def begin() -> None:
            self._adopt()
            begun.set()

        supervising = loop.create_task(self._supervisor.run(begin))
        tasks.append(supervising)
        if self._health_socket is not None:
            app = health_app(self._is_healthy, self._metrics)
            # uvicorn closes what it serves; an upgrade hands the original over
            tasks.append(loop.create_task(serve_http(app, self._health_socket.dup())))
        beginning = loop.create_task(self._begin(begun))
        tasks.append(beginning)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._reload_on_signal(beginning))
        stop_task = loop.create_task(self._stopping.wait())
        try:
            waited_for = {stop_task, *tasks}
            while not stop_task.done():
                done, waited_for = await asyncio.wait(
                    waited_for, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done - {stop_task}:
                    task.result()  # a part of the gateway failed: say why
                    if task is not beginning or until_serving:
                        self._stopping.set()
            if not self._is_upgrading:
                _log.info("gateway stops")
        finally:
            self._is_serving = False
            if self._is_upgrading:
                self._supervisor.let_go()
            else:
                self._services.stopping()
                await self._rollouts.stop()
                await self._supervisor.stop(_STOP_DEADLINE_S)
            for task in [*tasks, stop_task]:
                task.cancel()
            await asyncio.gather(*tasks, stop_task, return_exceptions=True)
            self._server.close()
            self._admin_socket.close()
            if not self._is_upgrading:
                self._clean_up()
        if self._is_upgrading:
            self._become_new_code()

    def _clean_up(self) -> None:
        self._listeners.close()
        runtime = self._settings.runtime_dir
        remove_state(runtime)
        for name in (ADMIN_SOCKET, "control.sock", "reports.sock"):
            (runtime / name).unlink(missing_ok=True)

    # beginning

    def _adopt(self) -> None:
        if self._saved is not None:
            self._supervisor.adopt(
                self._adopted,
                self._saved.generations,
                self._saved.generation_active,
                self._worker_settings_for(self._settings),
            )

    async def _begin(self, begun: asyncio.Event) -> None:
        await begun.wait()
        saved, supervisor = self._saved, self._supervisor
        self._services.keep(self._listeners.by_name())
        if supervisor.active is not None:
            try:
                await supervisor.wait_until_serving(supervisor.active)
            except ResourceLimitError as error:
                # the others relay; the supervisor replaces the one that does not
                _log.error("a worker could not be taken over", reason=str(error))
        else:
            slots = supervisor.free_slots()[: self._settings.config.worker_count]
            # before the workers read: what arrives meanwhile waits where it will be read
            self._listeners.steer(slots, slots)
            generation = supervisor.start_generation(
                self._revision, slots, self._worker_settings_for(self._settings)
            )
            await supervisor.wait_until_serving(generation)
            supervisor.activate(generation)
        self._is_serving = True
        self._save()
        self._announce()
        if saved is not None and saved.is_upgrading:
            await self._reload_after_upgrade()
        elif saved is not None:
            await self._recheck()
        self._services.ready()

    def _announce(self) -> None:
        config = self._settings.config
        addresses = [str(Target(host, port)) for host, port in self._listeners.addresses]
        _log.info(
            "gateway serves",
            version=__version__,
            engine=self._engine_of(self._settings),
            listen=addresses,
            workers=config.worker_count,
        )
        if not self._listeners.is_steered:
            _log.warning("no BPF steering here: workers hand packets on to each other")
        if self._engine_of(self._settings) == "aioquic" and config.quic.engine == "auto":
            _log.warning(SLOW_ENGINE_NOTICE)
        if config.insecure_no_auth and not config.auth.is_configured:
            _log.warning("no authentication: anybody who reaches this address may use it")

    def _worker_settings_for(self, settings: GatewaySettings) -> Any:
        config, runtime = settings.config, settings.runtime_dir
        workers = config.worker_count
        engine = self._engine_of(settings)
        cores = usable_cores() if config.pin_workers else []

        def settings_for(slot: int, generation: int, place: int, secret: str) -> WorkerSettings:
            return WorkerSettings(
                slot=slot,
                generation=generation,
                secret=secret,
                control_address=socket_address(runtime, "control"),
                report_address=socket_address(runtime, "reports"),
                runtime_dir=str(runtime),
                sockets=self._listeners.descriptors(),
                read=self._listeners.read_by(slot, place, workers),
                is_steered=self._listeners.is_steered,
                names=settings.names,
                proxy_name=config.name,
                engine=engine,
                certificate_chain_pem=settings.certificate_chain_pem,
                private_key_pem=settings.private_key_pem,
                reset_key=self._keys.reset_key,
                token_key=self._keys.token_key,
                quic=config.quic.model_dump(),
                limits=config.limits.model_dump(),
                orphan_timeout_s=config.reload.orphan_timeout_s,
                log_level=self._settings.config.log.level,
                log_format=config.log.format,
                core=cores[place % len(cores)] if cores else None,
            )

        return settings_for

    def _engine_of(self, settings: GatewaySettings) -> str:
        return choose_engine(settings.config.quic.engine)

    def _admission_for(self, settings: GatewaySettings) -> Admission:
        config = settings.config
        return Admission(
            settings.authenticator,
            Ruleset(config.policy.rules, revision=self._revision),
            Resolver(config.resolver.nameservers, config.resolver.timeout_s),
            time.time,
        )

    # reload

    def _load(self) -> GatewaySettings:
        return load_settings(self._path, self._environ, self_signed=self._keys.self_signed)

    def _prepare(self) -> Plan:
        settings = self._load()
        config = settings.config
        self._engine_of(settings)
        warnings = self._warnings(settings, ("restart",))
        wanted = config.worker_count * self._settings.config.reload.generations
        if wanted > self._supervisor.slot_count:
            self._grow(wanted)
        planned_at = self._revision

        def commit() -> int:
            adopted = settings
            if self._revision != planned_at:
                # a policy was pushed while the workers came up: it is the newer one
                adopted = settings.with_hot(self._settings)
            self._revision += 1
            self._adopt_settings(adopted)
            return self._revision

        return Plan(
            revision=planned_at + 1,
            workers=config.worker_count,
            settings_for=self._worker_settings_for(settings),
            drain_timeout_s=config.reload.drain_timeout_s,
            waits_for_slots=config.reload.when_full == "wait",
            warnings=warnings,
            commit=commit,
        )

    def _grow(self, slot_count: int) -> None:
        slot_count = min(slot_count, MAX_SLOTS)
        if self._listeners.is_steered:
            try:
                self._listeners.grow(slot_count)
            except OSError as error:
                raise ConfigError(
                    f"workers: no more sockets on the listen addresses: {error.strerror}",
                    key="workers",
                ) from None
            self._services.keep(self._listeners.by_name())
        self._supervisor.slot_count = slot_count

    def _warnings(self, settings: GatewaySettings, not_now: tuple[str, ...]) -> tuple[str, ...]:
        changed = changed_settings(self._settings.config, settings.config)
        return settings.warnings + tuple(
            f"{key} changed: applies at the next {applies}"
            for key, applies in changed.items()
            if applies in not_now
        )

    def _adopt_settings(self, settings: GatewaySettings) -> None:
        """From here on, ``settings`` hold: whatever is hot in them at once."""
        self._settings = settings
        self._supervisor.admission = self._admission_for(settings)
        level = settings.config.log.level
        configure_logging(level, settings.config.log.format, process="control")
        self._supervisor.set_log_level(level)

    async def reload(self, *, policy_only: bool) -> dict[str, Any]:
        """See ``Operations``. Raises ``ToppyError`` when nothing has changed."""
        began = time.monotonic()
        self._services.reloading()
        try:
            if policy_only:
                outcome = self._reload_policy(began)
            else:
                outcome = await self._rollouts.request()
            await self._recheck()
        except ToppyError as error:
            self._conclude_reload(False, str(error), began)
            raise
        for warning in outcome.warnings:
            _log.warning("configuration", warning=warning)
        self._save()
        self._conclude_reload(True, f"revision {outcome.revision} serves", began)
        return {
            "generation": outcome.generation,
            "revision": outcome.revision,
            "warnings": list(outcome.warnings),
            "duration_s": round(time.monotonic() - began, 3),
        }

    def _reload_policy(self, began: float) -> Outcome:
        settings = self._load()
        warnings = self._warnings(settings, ("reload", "restart"))
        self._revision += 1
        # what is not hot stays as it is until a reload reads it again
        self._adopt_settings(self._settings.with_hot(settings))
        active = self._supervisor.active
        if active is not None:
            active.revision = self._revision
        return Outcome(
            active.number if active is not None else 0,
            self._revision,
            warnings,
            time.monotonic() - began,
        )

    def _conclude_reload(self, ok: bool, message: str, began: float) -> None:
        duration_s = round(time.monotonic() - began, 3)
        self._last_reload = {
            "at": time.time(),
            "ok": ok,
            "message": message,
            "duration_s": duration_s,
        }
        if ok:
            _log.info("reloaded", revision=self._revision, duration_s=duration_s)
        else:
            _log.error("reload failed, nothing has changed", reason=message)
        self._services.status(self._status_text())
        if self._is_serving:
            self._services.ready()

    def _reload_on_signal(self, beginning: asyncio.Task[Any]) -> None:
        async def reload() -> None:
            await asyncio.wait({beginning})
            try:
                await self.reload(policy_only=False)
            except ToppyError:
                pass  # it has been logged
            except asyncio.CancelledError:
                return

        task = asyncio.get_running_loop().create_task(reload())
        self._signal_tasks.add(task)
        task.add_done_callback(self._signal_tasks.discard)

    async def _recheck(self) -> None:
        """Apply the policy that holds now to the tunnels that are open."""
        admission = self._supervisor.admission
        live = await self._supervisor.live_tunnels(with_authorization=True)
        for index, (worker, tunnel) in enumerate(live):
            denial = admission.recheck(tunnel)
            if denial is not None:
                _log.info(
                    "tunnel cut: the policy denies it now",
                    tunnel=operators.tunnel_name(worker, tunnel),
                    subject=tunnel.subject,
                    rule=denial.rule,
                    reason=denial.details,
                )
                self._supervisor.close_tunnels(worker, [tunnel], denial)
            if index % 100 == 99:
                await asyncio.sleep(0)

    # upgrade

    async def upgrade(self) -> dict[str, Any]:
        """See ``Operations``: try the new code, then become it."""
        if self._rollouts.state.value != "idle" or not self._is_serving:
            raise AdminError("a reload is under way; try again when it is over")
        version = await try_new_code(self._environ)
        if self._rollouts.state.value != "idle" or not self._is_serving:
            raise AdminError("a reload is under way; try again when it is over")
        _log.info("upgrade: the new code serves in a trial, becoming it", version=version)
        # the answer goes out first
        asyncio.get_running_loop().call_later(0.1, self._begin_upgrade)
        return {"pid": os.getpid(), "from": __version__, "to": version}

    def _begin_upgrade(self) -> None:
        self._is_upgrading = True
        self._services.reloading()
        self._save()
        self._stopping.set()

    def _become_new_code(self) -> None:
        sockets = dict(self._listeners.by_name())
        if self._health_socket is not None:
            sockets[_HEALTH] = self._health_socket
        environ = dict(os.environ)
        hand_over(sockets, environ)
        become_new_code(environ)

    async def _reload_after_upgrade(self) -> None:
        try:
            await self.reload(policy_only=False)
        except ToppyError as error:
            _log.error("the earlier workers go on after the upgrade", reason=str(error))

    # what the next control plane needs

    def _save_soon(self) -> None:
        if not self._save_is_due:
            self._save_is_due = True
            asyncio.get_running_loop().call_soon(self._save)

    def _save(self) -> None:
        self._save_is_due = False
        supervisor, keys = self._supervisor, self._keys
        if self._stopping.is_set() and not self._is_upgrading:
            return
        chain, key = keys.self_signed or (b"", b"")
        state = SavedState(
            format=FORMAT,
            reset_key=keys.reset_key,
            token_key=keys.token_key,
            certificate_chain_pem=chain,
            private_key_pem=key,
            generation=supervisor.newest,
            generation_active=supervisor.active.number if supervisor.active is not None else 0,
            revision=self._revision,
            started_at=self._started_at,
            worker_deaths=supervisor.deaths,
            socket_rows=tuple(len(row) for row in self._listeners.descriptors()),
            past=self._statistics.past,
            latest=self._statistics.latest,
            workers=supervisor.saved_workers(),
            generations=supervisor.saved_generations(),
            is_upgrading=self._is_upgrading,
        )
        try:
            write_state(self._settings.runtime_dir, state)
        except OSError as error:
            _log.error("the state for a next control plane cannot be saved", reason=str(error))

    # what operators ask

    def drain(self, what: str, timeout_s: float | None) -> dict[str, Any]:
        """See ``Operations``."""
        if timeout_s is None:
            timeout_s = self._settings.config.reload.drain_timeout_s
        return operators.drain(self._supervisor, what, timeout_s)

    async def connections(self) -> dict[str, Any]:
        """See ``Operations``."""
        return await operators.connections(self._supervisor)

    async def tunnels(self) -> dict[str, Any]:
        """See ``Operations``."""
        return await operators.tunnels(self._supervisor)

    async def kick(self, what: str) -> dict[str, Any]:
        """See ``Operations``."""
        return await operators.kick(self._supervisor, what)

    def status(self) -> dict[str, Any]:
        """See ``Operations``."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "engine": self._engine_of(self._settings),
            "since": self._started_at,
            "configuration": self._settings.source,
            "revision": self._revision,
            "listen": [str(Target(host, port)) for host, port in self._listeners.addresses],
            "health": self._settings.config.listen.health,
            "steered": self._listeners.is_steered,
            "rollout": self._rollouts.state.value,
            "last_reload": self._last_reload,
        } | operators.worker_facts(self._supervisor, self._statistics)

    # how it is

    def _is_healthy(self) -> bool:
        return self._is_serving and self._up_workers() > 0

    def _up_workers(self) -> int:
        supervisor = self._supervisor
        return sum(
            worker.is_serving and worker.generation is supervisor.active
            for worker in supervisor.workers.values()
        )

    def _metrics(self) -> bytes:
        supervisor = self._supervisor
        workers = supervisor.workers
        snapshots = [
            WorkerSnapshot(
                slot=slot,
                generation=workers[slot].generation.number if slot in workers else 0,
                is_up=slot in workers and workers[slot].is_serving,
                counters=counters,
            )
            for slot, counters in (
                {slot: WorkerCounters() for slot in sorted(workers)} | self._statistics.by_slot()
            ).items()
        ]
        return render_metrics(
            snapshots,
            version=__version__,
            engine=self._engine_of(self._settings),
            worker_deaths=supervisor.deaths,
        )

    async def _report_to_service_manager(self) -> None:
        watchdog_s = self._services.watchdog_interval_s()
        interval_s = min(_STATUS_INTERVAL_S, watchdog_s or _STATUS_INTERVAL_S)
        while True:
            self._services.watchdog()
            await asyncio.sleep(interval_s)
            self._services.status(self._status_text())

    def _status_text(self) -> str:
        total = self._statistics.total()
        generations = len(self._supervisor.generations)
        text = (
            f"{self._up_workers()}/{self._settings.config.worker_count} workers, "
            f"{total.connections_open} connections, {total.tunnels_open} tunnels"
        )
        if generations > 1:
            text += f", {generations - 1} generations draining"
        if self._last_reload is not None and not self._last_reload["ok"]:
            text += f"; last reload failed: {self._last_reload['message']}"
        return text


def _find_workers(
    saved: SavedState, runtime_dir: str, inherited: dict[str, socket.socket]
) -> list[tuple[SavedWorker, Process, socket.socket]]:
    """Workers that an earlier control plane left; their copies of the sockets, where we have none,
    go to ``inherited``.
    """
    found = []
    for each in saved.workers:
        taken = find_saved_worker(each, runtime_dir)
        if taken is None:
            continue
        process, line, descriptors = taken
        found.append((each, process, line))
        rows, at = [], 0
        for count in saved.socket_rows:
            rows.append(descriptors[at : at + count])
            at += count
        theirs = named(rows) if at == len(descriptors) else {}
        for name, sock in theirs.items():
            if name in inherited:
                sock.close()
            else:
                inherited[name] = sock
        if not theirs:  # it is from before the sockets became more
            close_all({str(d): socket.socket(fileno=d) for d in descriptors})
    return found
