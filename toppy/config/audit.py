"""The gateway's ``[audit]`` table, and what both ends check in theirs."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator, model_validator

from toppy.config.section import Section, check_token, setting


def check_collector_url(url: str) -> None:
    """Raise ``ValueError`` unless ``url`` can be posted to."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError("must be an http or https URL")


class AuditSection(Section):
    """The audit log: hash-chained JSON lines, written by the control plane alone."""

    path: str = setting(
        "",
        "The log, such as `/var/lib/toppy-gw/audit.jsonl`. Empty: `audit.jsonl` in the state "
        "directory that systemd gives (`$STATE_DIRECTORY`), and where there is none, no log.",
    )
    signing_key: SecretStr | None = setting(
        None, "Signs every entry: an HMAC secret. A new key begins a new log: change `path` too."
    )
    signing_key_file: str = setting(
        "", "File with the HMAC secret, or with an Ed25519 private key in PEM; mode 0600."
    )
    fsync: Literal["always", "interval", "never"] = setting(
        "interval",
        "Bring entries to the disk after each batch, once a second, or when the system wants.",
    )
    rotate_bytes: int = setting(
        64 << 20,
        "A file of so many bytes is put away as `audit.000000000001.jsonl`; the chain goes on in "
        "the next. 0: never.",
        ge=0,
    )
    rotate_interval_s: float = setting(
        86_400.0, "The same once its first entry is so old. 0: never.", ge=0
    )
    keep_files: int = setting(
        0,
        "Of the files that were put away, the newest so many are kept; older ones are deleted. "
        "0: all. What the collector of `ship_url` does not have is never deleted.",
        ge=0,
    )
    keep_days: float = setting(
        0.0,
        "A file that was put away is deleted once its last entry is so old. 0: never. See "
        "`keep_files`.",
        ge=0,
    )
    checkpoint_path: str = setting(
        "",
        "Where signed counts are kept that show when the log's end was cut off: better on another "
        "disk. Empty: beside the log.",
    )
    checkpoint_entries: int = setting(1000, "A checkpoint after so many entries,", ge=1)
    checkpoint_interval_s: float = setting(300.0, "or so long after a new one.", gt=0, le=86_400)
    queue_events: int = setting(
        10_000, "Events that wait while the log cannot be written.", ge=100, le=1_000_000
    )
    when_full: Literal["refuse", "drop"] = setting(
        "refuse",
        "When so many wait: open no new tunnels (503), or go on and write how many were lost.",
    )
    repeat_interval_s: float = setting(
        60.0,
        "Failed authentications, and requests that are refused unread, are recorded once per "
        "source and reason at once, and from then on once in so long with their count.",
        ge=1,
        le=3600,
    )
    ship_url: str = setting("", "Entries are sent there too, by HTTP POST. Empty: nowhere.")
    ship_token: SecretStr | None = setting(None, "Bearer token for it.")
    ship_token_file: str = setting("", "File with that token; mode 0600.")
    ship_timeout_s: float = setting(3.0, "For one request.", gt=0, le=300)
    ship_retries: int = setting(2, "After a first attempt; then after a longer pause.", ge=0, le=20)
    ship_backoff_ms: int = setting(
        250, "Before the first retry; doubles from then on.", ge=1, le=60_000
    )
    ship_batch_size: int = setting(
        100, "Entries of one request, as a JSON array; 1: one, as an object.", ge=1, le=10_000
    )

    @field_validator("signing_key")
    @classmethod
    def _has_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            raise ValueError("must not be empty")
        return value

    @field_validator("ship_url")
    @classmethod
    def _url(cls, value: str) -> str:
        if value:
            check_collector_url(value)
        return value

    @field_validator("ship_token")
    @classmethod
    def _sendable(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _one_of_each(self) -> AuditSection:
        if self.signing_key is not None and self.signing_key_file:
            raise ValueError("give signing_key or signing_key_file, not both")
        if self.ship_token is not None and self.ship_token_file:
            raise ValueError("give ship_token or ship_token_file, not both")
        if (self.keep_files or self.keep_days) and not (
            self.rotate_bytes or self.rotate_interval_s
        ):
            raise ValueError(
                "keep_files and keep_days delete files that rotation has put away: set "
                "rotate_bytes or rotate_interval_s, too"
            )
        return self
