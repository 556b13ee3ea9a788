"""Structured logs on standard error: constant event text, values as fields, no secrets.

``FIELDS`` is the one list of field names. Nothing is logged per datagram. Audit is not logging.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Format = Literal["auto", "console", "json"]

FIELDS: Final = frozenset(
    {
        "address",
        "connection",
        "connections",
        "core",
        "count",
        "details",
        "duration_s",
        "engine",
        "error",
        "exit_code",
        "file",
        "gateway",
        "health",
        "generation",
        "has_keys",
        "key",
        "limit",
        "listen",
        "lived_s",
        "name",
        "pid",
        "port",
        "proxy_status",
        "reason",
        "retry_in_s",
        "revision",
        "rule",
        "signal",
        "slot",
        "source",
        "state",
        "status",
        "steered",
        "subject",
        "target",
        "timeout_s",
        "tunnel",
        "tunnels",
        "value",
        "version",
        "warning",
        "workers",
    }
)
"""What a value may be called. ``logger``, ``process``, ``level``, ``time`` and ``exception`` are
added here."""

REDACTED: Final = "[redacted]"

_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|authorization|credential|cookie|jwt|private_key|signing_key|reset_key",
    re.IGNORECASE,
)
# "Bearer …" as in a header, and anything of a JWT's shape, wherever it stands
_SECRET_TEXT = re.compile(
    r"(?i:\bbearer[ \t]+)[^\s\"',;]+|\beyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?", re.ASCII
)
_MAX_DEPTH = 6
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)
}
_LINE_BREAKS = {10: "\\n"}
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger that says who it is. May be made before ``configure_logging``."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


def configure_logging(level: str, format: str, process: str) -> None:
    """Set up logging for this process, libraries included (theirs from WARNING on).

    ``level`` is ``debug``, ``info``, ``warning`` or ``error``. ``format`` is ``console``,
    ``json``, or ``auto``: console on a terminal, JSON otherwise. ``process`` names the role.
    """
    threshold = _LEVELS[level.lower()]
    is_json = format == "json" or (format == "auto" and not _is_terminal())
    shared: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _AddProcess(process),
        structlog.processors.format_exc_info,
        redact,
    ]
    render: list[Processor]
    if is_json:
        render = [structlog.processors.JSONRenderer(default=str)]
    else:
        render = [
            escape_controls,
            structlog.dev.ConsoleRenderer(
                colors=_is_terminal(),
                timestamp_key="time",
                # never the rich one: it shows local variables, and so secrets
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_Output,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(cast(Any, _STDERR))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(threshold, logging.WARNING))


class _Stderr:
    """Standard error as it is at the time of writing. A reader that has gone away, or a full disk,
    costs log lines and not the process.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


_STDERR = _Stderr()


class _Output:
    """Where structlog's lines go, under a logger's name: whole lines, one write each."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, line: str) -> None:
        _STDERR.write(line + "\n")
        _STDERR.flush()

    debug = info = warning = error = critical = exception = msg


class _AddProcess:
    """Adds the role of this process."""

    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = self._process
        return event


def redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Hide values whose name says that they are secret, and secrets inside texts."""
    return {name: _redacted(name, value, 0) for name, value in event.items()}


def _redacted(name: str, value: object, depth: int) -> object:
    if name.startswith("_"):  # structlog's own, such as the record of a library's line
        return value
    if _SECRET_NAME.search(name) and value is not None and not isinstance(value, bool):
        return REDACTED
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return _SECRET_TEXT.sub(REDACTED, value)
    if isinstance(value, int | float | None):
        return value
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {str(key): _redacted(str(key), item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted("", item, depth + 1) for item in value]
    return _SECRET_TEXT.sub(REDACTED, str(value))


def escape_controls(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Show control characters instead of sending them to a terminal; a peer may have chosen them.

    Only a traceback keeps its line breaks: elsewhere one would fake a line of log.
    """
    return {
        str(_escaped(name)): (
            value if name.startswith("_") else _escaped(value, breaks=name == "exception")
        )
        for name, value in event.items()
    }


def _escaped(value: object, *, breaks: bool = False) -> object:
    if isinstance(value, str):
        escaped = value.translate(_CONTROLS)
        return escaped if breaks else escaped.translate(_LINE_BREAKS)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return value


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except ValueError:  # closed
        return False
