"""The client's audit log: each command appends what it did (T-100, T-107).

Several commands may run at once, so the log is locked for one append, not for a command's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from toppy.client.settings import load_client_config
from toppy.config.client import ClientConfig, parse_client_config
from toppy.errors import ConfigError, ToppyError
from toppy.model.audit_event import AuditAction, AuditEvent, Fact, reason_with_facts
from toppy.observe.audit_log import AuditLog, AuditLogOptions
from toppy.observe.audit_reader import checkpoint_path
from toppy.observe.audit_shipper import AuditShipper, Collector, CollectorOptions
from toppy.observe.log import get_logger
from toppy.wire.audit_entry import AuditError, Signer, parse_signing_key

_LOCK_TIMEOUT_S = 2.0
_CHECKPOINT_INTERVAL_S = 300.0
_MOST_SHIPPED = 100
"""By one command as it ends; `toppy audit ship` sends the rest."""

_log = get_logger("audit")


def default_log_path(environ: Mapping[str, str]) -> Path:
    """Where the log is when nothing else is said; without HOME in the working directory."""
    if environ.get("XDG_DATA_HOME"):
        return Path(environ["XDG_DATA_HOME"]) / "toppy" / "audit.jsonl"
    if environ.get("HOME"):
        return Path(environ["HOME"]) / ".local" / "share" / "toppy" / "audit.jsonl"
    return Path("toppy-audit.jsonl")


def log_path(config: ClientConfig, config_file: Path | None, environ: Mapping[str, str]) -> Path:
    """``TOPPY_AUDIT_LOG``, ``audit_log_path`` (relative to its file), or the default."""
    if environ.get("TOPPY_AUDIT_LOG"):
        return Path(environ["TOPPY_AUDIT_LOG"])
    if config.audit_log_path is not None:
        base = config_file.absolute().parent if config_file is not None else Path()
        return base / Path(config.audit_log_path).expanduser()
    return default_log_path(environ)


def actor_of(environ: Mapping[str, str]) -> str:
    """Who runs the command (T-101)."""
    return environ.get("USER") or environ.get("USERNAME") or "unknown"


def signer_of(config: ClientConfig) -> Signer | None:
    """Raises ``AuditError`` for a key that is none."""
    key = _secret(config.audit_signing_key)
    return parse_signing_key(key) if key else None


def ship_options(config: ClientConfig) -> CollectorOptions | None:
    """Where entries are sent, if anywhere."""
    if config.audit_ship_url is None:
        return None
    return CollectorOptions(
        url=config.audit_ship_url,
        token=_secret(config.audit_ship_token),
        timeout_s=config.audit_ship_timeout_secs,
        retries=config.audit_ship_retries,
        backoff_s=config.audit_ship_backoff_ms / 1000,
        batch_size=config.audit_ship_batch_size,
    )


def verify_options(config: ClientConfig) -> CollectorOptions | None:
    """Who verifies the log remotely, if anybody."""
    if config.audit_verify_url is None:
        return None
    return CollectorOptions(
        url=config.audit_verify_url,
        token=_secret(config.audit_verify_token),
        timeout_s=config.audit_verify_timeout_secs,
        retries=config.audit_verify_retries,
        backoff_s=config.audit_verify_backoff_ms / 1000,
    )


def _secret(value: SecretStr | None) -> str:
    return value.get_secret_value() if value is not None else ""


def environment_config(environ: Mapping[str, str]) -> ClientConfig:
    """The environment's audit settings, where there is no file. Raises ``ConfigError``."""
    return parse_client_config('gateway = "localhost"\n', "environment", environ)


def record_command(
    flag: str | None,
    environ: Mapping[str, str],
    action: AuditAction,
    target: str,
    *,
    allowed: bool,
    reason: str = "",
) -> None:
    """Record a command that has ended, and ship; ``flag`` is its ``--config``. What goes wrong is
    warned about. Not to be called on an event loop.
    """
    try:
        try:
            loaded = load_client_config(flag, environ)
        except ConfigError:
            audit = ClientAudit.of(environment_config(environ), None, environ)
        else:
            audit = ClientAudit.of(loaded.config, loaded.path, environ)
    except (ConfigError, AuditError) as error:
        _log.warning("the audit log cannot be written", reason=str(error))
        return
    audit.record_and_ship(action, target, allowed=allowed, reason=reason)


@dataclass(frozen=True, slots=True)
class ClientAudit:
    """Appends to one log. A log that cannot be written is warned about; the command goes on."""

    path: Path
    actor: str
    signer: Signer | None = field(repr=False)
    collector: CollectorOptions | None

    @classmethod
    def of(
        cls, config: ClientConfig, config_file: Path | None, environ: Mapping[str, str]
    ) -> ClientAudit:
        """Raises ``AuditError`` for a signing key that is none."""
        return cls(
            path=log_path(config, config_file, environ),
            actor=actor_of(environ),
            signer=signer_of(config),
            collector=ship_options(config),
        )

    def record(
        self,
        action: AuditAction,
        target: str,
        *,
        allowed: bool,
        subject: str | None = None,
        reason: str = "",
        lock_timeout_s: float = _LOCK_TIMEOUT_S,
        **facts: Fact,
    ) -> bool:
        """Append one event; False when it could not be written, which has been said."""
        event = AuditEvent(
            actor=self.actor,
            action=action.value,
            target=target,
            allowed=allowed,
            auth_subject=subject,
            reason=reason_with_facts(reason, facts) or None,
        )
        try:
            log = AuditLog(
                self.path,
                AuditLogOptions(
                    signer=self.signer, fsync="never", checkpoint_interval_s=_CHECKPOINT_INTERVAL_S
                ),
                actor=self.actor,
                lock_timeout_s=lock_timeout_s,
            )
            try:
                log.append([(int(time.time() * 1000), event)])
            finally:
                log.close()
        except OSError as error:
            _log.warning(
                "the audit log cannot be written",
                file=str(self.path),
                reason=error.strerror or str(error),
            )
        except AuditError as error:
            _log.warning("the audit log cannot be written", file=str(self.path), reason=str(error))
        else:
            return True
        return False

    async def ship(self) -> None:
        """Send what is new to the collector, one request each, as far as it takes them now. What it
        does not take stays in the log for the next time (T-105).
        """
        if self.collector is None:
            return
        options = CollectorOptions(
            url=self.collector.url,
            token=self.collector.token,
            timeout_s=self.collector.timeout_s,
            retries=0,
            batch_size=1,
        )
        try:
            async with Collector(options) as collector:
                shipper = AuditShipper(
                    self.path, collector, batch_size=1, checkpoints=checkpoint_path(self.path)
                )
                async with asyncio.timeout(2 * options.timeout_s):
                    await shipper.ship_new(most=_MOST_SHIPPED)
        except TimeoutError:
            _log.warning("audit entries are not shipped", reason="the collector is too slow")
        except (ToppyError, OSError) as error:
            _log.warning("audit entries are not shipped", reason=str(error))

    def record_and_ship(
        self, action: AuditAction, target: str, *, allowed: bool, reason: str = ""
    ) -> None:
        """For a command that has no event loop of its own."""
        self.record(action, target, allowed=allowed, reason=reason)
        if self.collector is not None:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(self.ship())
