"""The control plane: one gateway's configuration, sockets, generations and operators."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toppy import __version__
from toppy.config.address import parse_host_port
from toppy.config.changes import changed_settings
from toppy.control import operators
from toppy.control.admin import ADMIN_SOCKET, AdminError, admin_app
from toppy.control.admission import Admission, own_services
from toppy.control.audit_writer import OPERATOR, AuditWriter
from toppy.control.certificate_watch import CertificateWatch
from toppy.control.found_workers import as_it_listens, find_workers
from toppy.control.generation import SettingsFor
from toppy.control.health import health_app, serve_http
from toppy.control.issuer_keys import IssuerKeys
from toppy.control.leftovers import end_leftovers, usable_state
from toppy.control.listeners import Listeners, close_all
from toppy.control.rate_keeper import RateKeeper
from toppy.control.rates import Rates
from toppy.control.recheck import Recheck
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
    digest_of,
    remove_state,
    write_state,
)
from toppy.control.settings import GatewaySettings, load_settings
from toppy.control.statistics import Statistics
from toppy.control.supervisor import Supervisor
from toppy.control.tunnel_audit import TunnelAudit
from toppy.control.upgrade import (
    Upgrade,
    become_new_code,
    check_nothing_needs_a_restart,
    try_new_code,
)
from toppy.control.worker_settings import worker_settings
from toppy.errors import ConfigError, ResourceLimitError, ToppyError
from toppy.ipc.control_channel import ControlServer
from toppy.model.audit_event import AuditAction
from toppy.model.target import Target
from toppy.net.resolver import Resolver
from toppy.observe.log import configure_logging, get_logger
from toppy.observe.metrics import render_metrics
from toppy.policy.ruleset import Ruleset
from toppy.protocol.rollout import RolloutState
from toppy.quic.choose import SLOW_ENGINE_NOTICE, choose_engine
from toppy.system.descriptors import hand_over, inherited_sockets
from toppy.system.processes import Process
from toppy.system.service_manager import ServiceManager
from toppy.system.stop_signals import release_stop_signals
from toppy.wire.connection_id import MAX_SLOTS

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
        self._upgrade = Upgrade()
        self._is_stop_wanted = False
        self._last_reload: dict[str, Any] | None = None
        self._services = ServiceManager()
        self._stopping = asyncio.Event()
        self._save_is_due = False
        self._hangup = asyncio.Event()
        runtime = settings.runtime_dir
        self._lock = lock_runtime_dir(runtime)
        saved = usable_state(runtime)
        inherited = inherited_sockets(os.environ)
        adopted: list[tuple[SavedWorker, Process, socket.socket]] = []
        if saved is not None:
            adopted = find_workers(saved, str(runtime), inherited)
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
        if saved is not None and adopted:
            wanted = self._settings.config
            config = as_it_listens(wanted, saved, inherited)
            self._settings = replace(self._settings, config=config)
            for key in changed_settings(config, wanted):
                _log.warning("configuration", warning=f"{key} changed: applies at the next restart")
        self._audit = AuditWriter(settings.audit)
        self._tunnel_audit = TunnelAudit(self._audit)
        try:
            if not adopted:  # what runs already goes on; the log is tried again and again
                self._audit.open()
            end_leftovers(runtime, except_slots={worker.slot for worker, _, _ in adopted})
            self._bind(inherited)
        except BaseException:
            close_all(inherited)
            for _, process, line in adopted:
                process.forget()
                line.close()
            raise
        self._issuer_keys = IssuerKeys(runtime)
        self._certificates = CertificateWatch(lambda: self._settings)
        self._rates = Rates()
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
            self._tunnel_audit,
            runtime_dir=str(runtime),
            slot_count=self._slot_count,
            rates=self._rates,
            on_change=self._save_soon,
        )
        self._recheck = Recheck(self._supervisor, self._tunnel_audit)
        self._rate_keeper = RateKeeper(
            self._supervisor, self._rates, self._tunnel_audit, self._settings.runtime_dir
        )
        self._told = self._digest(self._settings)
        """What the workers of the active generation were told."""
        self._needs_reload = False
        if self._saved is not None:
            # what is new in the configuration since then takes new workers
            self._needs_reload = self._saved.is_upgrading or self._saved.told != self._told
            self._told = self._saved.told
        if saved is not None:
            self._supervisor.deaths = saved.worker_deaths
            self._supervisor.newest = saved.generation
        self._rollouts = Rollouts(self._supervisor, self._listeners, self._prepare)

    def _bind(self, inherited: dict[str, socket.socket]) -> None:
        config = self._settings.config
        self._slot_count = min(config.worker_count * config.reload.generations, MAX_SLOTS)
        if self._saved is not None:
            self._slot_count = max(self._slot_count, *self._saved.socket_rows)
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
        self._audit.record(AuditAction.ADMIN_STOP, "gateway", actor=OPERATOR)
        self._want_stop()
        return {"stopping": True}

    def _want_stop(self) -> None:
        self._is_stop_wanted = True
        self._stopping.set()

    async def run(self, *, until_serving: bool = False) -> None:
        """Serve until SIGTERM or SIGINT. Raises ``ToppyError`` when it cannot begin.

        ``until_serving``: stop as soon as a generation serves; for a trial.
        """
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, self._want_stop)
        tasks: list[asyncio.Task[Any]] = [
            loop.create_task(serve_http(admin_app(self), self._admin_socket, is_public=False)),
            loop.create_task(self._report_to_service_manager()),
            loop.create_task(self._issuer_keys.run()),
            loop.create_task(self._certificates.run()),
            loop.create_task(self._recheck.watch()),
            loop.create_task(self._rate_keeper.run()),
        ]
        self._audit.start()
        tasks += self._audit.tasks
        begun = asyncio.Event()

        def begin() -> None:
            self._adopt()
            begun.set()

        supervising = loop.create_task(self._supervisor.run(begin))
        tasks.append(supervising)
        if self._health_socket is not None:
            app = health_app(self._is_healthy, self._metrics, self._certificates.days_left)
            # uvicorn closes what it serves; an upgrade hands the original over
            tasks.append(loop.create_task(serve_http(app, self._health_socket.dup())))
        beginning = loop.create_task(self._begin(begun))
        tasks.append(beginning)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        tasks.append(loop.create_task(self._reload_on_signals(beginning)))
        release_stop_signals()
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
            if not self._upgrade.is_decided:
                _log.info("gateway stops")
        finally:
            self._is_serving = False
            is_upgrading = self._upgrade.is_decided
            if is_upgrading:
                self._supervisor.let_go()
            else:
                self._services.stopping()
                await self._rollouts.stop()
                await self._supervisor.stop(_STOP_DEADLINE_S)
                self._audit.record(AuditAction.GATEWAY_STOPPED, "gateway")
            await self._recheck.stop()
            await self._audit.close()
            for task in [*tasks, stop_task]:
                task.cancel()
            await asyncio.gather(*tasks, stop_task, return_exceptions=True)
            self._server.close()
            self._admin_socket.close()
            if not is_upgrading:
                self._clean_up()
        if is_upgrading:
            self._become_new_code()

    def _clean_up(self) -> None:
        self._listeners.close()
        runtime = self._settings.runtime_dir
        end_leftovers(runtime)
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
        self._audit.record(
            AuditAction.GATEWAY_STARTED, "gateway", version=__version__, pid=os.getpid()
        )
        if self._needs_reload:
            await self._reload_adopted()
        elif saved is not None:
            await self._recheck.apply()
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

    def _worker_settings_for(self, settings: GatewaySettings) -> SettingsFor:
        return worker_settings(
            settings,
            self._keys,
            self._listeners,
            engine=self._engine_of(settings),
            refuses_unrecorded=self._audit.refuses,
            log_level=lambda: self._settings.config.log.level,
        )

    def _digest(self, settings: GatewaySettings) -> bytes:
        told = self._worker_settings_for(settings)(0, 0, 0, "")
        return digest_of(told, settings.config.worker_count)

    def _engine_of(self, settings: GatewaySettings) -> str:
        return choose_engine(settings.config.quic.engine)

    def _admission_for(self, settings: GatewaySettings) -> Admission:
        config = settings.config
        per_s = config.limits.max_tunnels_per_subject_per_s
        self._rates.configure(config.rates, config.policy.rules, per_s)
        self._issuer_keys.follow(settings.authenticator.oidc, config.auth.oidc.refresh_s)
        return Admission(
            settings.authenticator,
            Ruleset(config.policy.rules, roles=config.policy.roles, revision=self._revision),
            Resolver(config.resolver.nameservers, config.resolver.timeout_s),
            time.time,
            self._issuer_keys,
            own_services=own_services(self._listeners.addresses, self._health_socket),
        )

    # reload

    def _load(self) -> GatewaySettings:
        return load_settings(self._path, self._environ, self_signed=self._keys.self_signed)

    def _prepare(self) -> Plan:
        loaded = self._load()
        warnings = self._warnings(loaded, ("restart",))
        settings = loaded.with_running(self._settings)
        config = settings.config
        self._engine_of(settings)
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
            self._told = self._digest(settings)
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
        if self._upgrade.is_under_way and not policy_only:
            raise AdminError("an upgrade is under way, and reloads too; try again when it is over")
        began = time.monotonic()
        self._services.reloading()
        try:
            if policy_only:
                outcome = self._reload_policy(began)
            else:
                outcome = await self._rollouts.request()
            unconfirmed = await self._recheck.apply()
        except ToppyError as error:
            self._conclude_reload(False, str(error), began)
            raise
        warnings = list(outcome.warnings)
        for warning in warnings:
            _log.warning("configuration", warning=warning)
        if unconfirmed:
            warnings.append(
                f"{', '.join(unconfirmed)} did not answer: tunnels there that are denied now may "
                "still be open; each is asked again until it answers, or is replaced"
            )
        self._save()
        self._conclude_reload(True, f"revision {outcome.revision} serves", began)
        return {
            "generation": outcome.generation,
            "revision": outcome.revision,
            "warnings": warnings,
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
        self._audit.record(AuditAction.RELOAD, self._settings.source, allowed=ok, reason=message)
        if ok:
            _log.info("reloaded", revision=self._revision, duration_s=duration_s)
        else:
            _log.error("reload failed, nothing has changed", reason=message)
        self._services.status(self._status_text())
        if self._is_serving:
            self._services.ready()

    async def _reload_on_signals(self, beginning: asyncio.Task[Any]) -> None:
        """One at a time; signals that come meanwhile are one."""
        await asyncio.wait({beginning})
        while True:
            await self._hangup.wait()
            await self._upgrade.wait_until_over()
            self._hangup.clear()
            with contextlib.suppress(ToppyError):  # it has been logged
                await self.reload(policy_only=False)

    # upgrade

    async def upgrade(self) -> dict[str, Any]:
        """See ``Operations``: try the new code, then become it."""
        self._upgrade.begin()
        try:
            self._check_upgrade()
            version = await try_new_code(self._environ)
            self._check_upgrade()
        except BaseException:
            self._upgrade.give_up()
            raise
        _log.info("upgrade: the new code serves in a trial, becoming it", version=version)
        self._audit.record(AuditAction.ADMIN_UPGRADE, "gateway", actor=OPERATOR, version=version)
        # the answer goes out first
        asyncio.get_running_loop().call_later(0.1, self._begin_upgrade)
        return {"pid": os.getpid(), "from": __version__, "to": version}

    def _check_upgrade(self) -> None:
        """Raises ``ToppyError`` that says why it cannot be now."""
        if self._stopping.is_set() or not self._is_serving:
            raise AdminError("the gateway starts or stops; nothing has changed")
        if self._rollouts.state is not RolloutState.IDLE:
            raise AdminError("a reload is under way; try again when it is over")
        check_nothing_needs_a_restart(self._settings.config, self._load().config)
        if not self._save():
            raise AdminError("what new code must know cannot be saved; the gateway's log says why")

    def _begin_upgrade(self) -> None:
        if self._stopping.is_set() or not self._save(is_upgrading=True):
            self._upgrade.give_up()
            return
        self._upgrade.decide()
        self._services.reloading()
        self._stopping.set()

    def _become_new_code(self) -> None:
        sockets = dict(self._listeners.by_name())
        if self._health_socket is not None:
            sockets[_HEALTH] = self._health_socket
        environ = dict(os.environ)
        hand_over(sockets, environ)
        become_new_code(environ, to_stop=self._is_stop_wanted)

    async def _reload_adopted(self) -> None:
        try:
            await self.reload(policy_only=False)
        except ToppyError as error:
            _log.error("the earlier workers go on as they are", reason=str(error))

    # what the next control plane needs

    def _save_soon(self) -> None:
        if not self._save_is_due:
            self._save_is_due = True
            asyncio.get_running_loop().call_soon(self._save)

    def _save(self, *, is_upgrading: bool = False) -> bool:
        """Whether the next control plane will know what holds now."""
        self._save_is_due = False
        supervisor, keys = self._supervisor, self._keys
        if self._stopping.is_set() and not self._upgrade.is_decided:
            return False
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
            is_upgrading=is_upgrading or self._upgrade.is_decided,
            is_steered=self._listeners.is_steered,
            told=self._told,
        )
        try:
            write_state(self._settings.runtime_dir, state)
        except OSError as error:
            _log.error("the state for a next control plane cannot be saved", reason=str(error))
            return False
        return True

    # what operators ask

    def drain(self, what: str, timeout_s: float | None) -> dict[str, Any]:
        """See ``Operations``."""
        if timeout_s is None:
            timeout_s = self._settings.config.reload.drain_timeout_s
        self._audit.record(AuditAction.ADMIN_DRAIN, what, actor=OPERATOR, timeout_s=timeout_s)
        return operators.drain(self._supervisor, what, timeout_s)

    async def connections(self) -> dict[str, Any]:
        """See ``Operations``."""
        return await operators.connections(self._supervisor)

    async def tunnels(self) -> dict[str, Any]:
        """See ``Operations``."""
        return await operators.tunnels(self._supervisor)

    async def kick(self, what: str) -> dict[str, Any]:
        """See ``Operations``."""
        self._audit.record(AuditAction.ADMIN_KICK, what, actor=OPERATOR)
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
            "audit": self._audit.facts(),
            "certificates": self._certificates.facts(),
        } | operators.worker_facts(self._supervisor, self._statistics)

    # how it is

    def _is_healthy(self) -> bool:
        return self._is_serving and operators.serving_workers(self._supervisor) > 0

    def _metrics(self) -> bytes:
        return render_metrics(
            operators.worker_snapshots(self._supervisor, self._statistics),
            version=__version__,
            engine=self._engine_of(self._settings),
            worker_deaths=self._supervisor.deaths,
            audit=self._audit.metrics(),
            certificates=self._certificates.ends(),
        )

    async def _report_to_service_manager(self) -> None:
        watchdog_s = self._services.watchdog_interval_s()
        interval_s = min(_STATUS_INTERVAL_S, watchdog_s or _STATUS_INTERVAL_S)
        while True:
            self._services.watchdog()
            await asyncio.sleep(interval_s)
            self._services.status(self._status_text())

    def _status_text(self) -> str:
        wanted = self._settings.config.worker_count
        text = operators.summary(self._supervisor, self._statistics, wanted)
        if self._last_reload is not None and not self._last_reload["ok"]:
            text += f"; last reload failed: {self._last_reload['message']}"
        return text
