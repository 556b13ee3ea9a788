"""From the gateway's ``[audit]`` table to what writes and ships the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toppy.config.audit import AuditSection
from toppy.config.gateway import resolve_path
from toppy.errors import ConfigError
from toppy.observe.audit_log import AuditLogOptions
from toppy.observe.audit_position import shipped_path
from toppy.observe.audit_reader import checkpoint_path
from toppy.observe.audit_shipper import CollectorOptions
from toppy.wire.audit_entry import AuditError, Signer, parse_signing_key

_NAME = "audit.jsonl"
SYSTEM_STATE_DIRECTORY = "/var/lib/toppy-gw"
"""What ``systemd/toppy-gw.service`` gives the gateway as ``$STATE_DIRECTORY``."""

ReadSecret = Callable[[str, str], str]
"""The text of a file that a key of the configuration names; raises ``ConfigError``."""


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """A log and its collector. ``path`` None: there is no log."""

    path: Path | None = None
    options: AuditLogOptions = field(default_factory=AuditLogOptions, repr=False)
    collector: CollectorOptions | None = None
    queue_events: int = 10_000
    refuses_when_full: bool = True
    repeat_interval_s: float = 60.0


def audit_paths(
    section: AuditSection, base: str, environ: Mapping[str, str]
) -> tuple[Path, Path] | None:
    """The log and its checkpoints; None: there is no log."""
    if section.path:
        path = Path(resolve_path(base, section.path))
    elif environ.get("STATE_DIRECTORY"):
        # several are separated by colons, systemd.exec(5)
        path = Path(environ["STATE_DIRECTORY"].partition(":")[0]) / _NAME
    else:
        return None
    if section.checkpoint_path:
        return path, Path(resolve_path(base, section.checkpoint_path))
    return path, checkpoint_path(path)


def signing_key(section: AuditSection, read: ReadSecret) -> str:
    """The key's text; empty: none. Raises ``ConfigError``."""
    if section.signing_key is not None:
        return section.signing_key.get_secret_value()
    if section.signing_key_file:
        return read(section.signing_key_file, "audit.signing_key_file")
    return ""


def collector_options(section: AuditSection, read: ReadSecret) -> CollectorOptions | None:
    """None: nothing is shipped. Raises ``ConfigError``."""
    if not section.ship_url:
        return None
    token = section.ship_token.get_secret_value() if section.ship_token is not None else ""
    if section.ship_token_file:
        token = read(section.ship_token_file, "audit.ship_token_file")
    return CollectorOptions(
        url=section.ship_url,
        token=token,
        timeout_s=section.ship_timeout_s,
        retries=section.ship_retries,
        backoff_s=section.ship_backoff_ms / 1000,
        batch_size=section.ship_batch_size,
    )


def audit_settings(
    section: AuditSection, base: str, environ: Mapping[str, str], read: ReadSecret
) -> AuditSettings:
    """Raises ``ConfigError`` for a key or file that is no use."""
    paths = audit_paths(section, base, environ)
    if paths is None:
        return AuditSettings()
    path, checkpoints = paths
    collector = collector_options(section, read)
    return AuditSettings(
        path=path,
        options=AuditLogOptions(
            signer=_signer(signing_key(section, read)),
            fsync=section.fsync,
            rotate_bytes=section.rotate_bytes,
            rotate_interval_s=section.rotate_interval_s,
            checkpoints=checkpoints,
            checkpoint_entries=section.checkpoint_entries,
            checkpoint_interval_s=section.checkpoint_interval_s,
            keep_files=section.keep_files,
            keep_days=section.keep_days,
            shipped=shipped_path(path) if collector is not None else None,
        ),
        collector=collector,
        queue_events=section.queue_events,
        refuses_when_full=section.when_full == "refuse",
        repeat_interval_s=section.repeat_interval_s,
    )


def _signer(key: str) -> Signer | None:
    if not key:
        return None
    try:
        return parse_signing_key(key)
    except AuditError as error:
        raise ConfigError(f"audit.signing_key: {error}", key="audit.signing_key") from None
