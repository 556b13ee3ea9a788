"""One exception tree: who failed, may the caller retry, what a person can do now.

``str(error)`` is one sentence that a person can act on. The class says who was wrong.
"""

from __future__ import annotations

from typing import ClassVar


class ToppyError(Exception):
    """Base of every error that toppy raises on purpose."""

    retryable: ClassVar[bool] = False


class LocalError(ToppyError):
    """Our own caller broke an interface: an illegal state or argument."""


class PeerError(ToppyError):
    """The other end broke a protocol rule.

    ``h3_error_code`` is what the stream or connection is closed with (RFC 9114 section 8.1,
    RFC 9297 section 5.2).
    """

    h3_error_code: ClassVar[int] = 0x010E  # H3_MESSAGE_ERROR


class DatagramError(PeerError):
    """An HTTP Datagram or DATAGRAM capsule is malformed (RFC 9297 section 2.1)."""

    h3_error_code = 0x33  # H3_DATAGRAM_ERROR


class TargetError(ToppyError):
    """The target could not be reached.

    ``status`` is the HTTP status of the answer, ``proxy_status`` the error type of RFC 9209
    section 2.3 that names the reason.
    """

    status: int = 502
    proxy_status: str = "destination_unavailable"
    retryable = True

    def __init__(self, message: str, *, status: int = 502, proxy_status: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        if proxy_status is not None:
            self.proxy_status = proxy_status


class DeniedError(ToppyError):
    """Authentication or policy said no. ``rule`` names the policy rule, if one did."""

    def __init__(self, message: str, *, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class ConfigError(ToppyError):
    """A configuration value is wrong: names the file, the key, the value and what is allowed."""

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ResourceLimitError(ToppyError):
    """A stated bound was reached; trying again later may work."""

    retryable = True
