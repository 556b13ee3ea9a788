"""Bearer credentials (RFC 6750) and the static token."""

from __future__ import annotations

import hashlib
import hmac

from toppy.errors import ConfigError

MAX_TOKEN_BYTES = 8192


def parse_authorization(value: str | None) -> str | None:
    """The token of an Authorization field: ``Bearer x``, or a bare value (T-065).

    None when there is none, when it is of another scheme, or when it is too long.
    """
    if value is None or len(value) > MAX_TOKEN_BYTES:
        return None
    scheme, space, token = value.strip().partition(" ")
    if scheme.lower() == "bearer":
        return token.strip() or None
    return None if space else scheme or None


class StaticToken:
    """One shared secret, compared in constant time.

    Keeps only its digest, so that all comparisons are of one length.
    Raises ``ConfigError`` for a token that no client can send.
    """

    __slots__ = ("_digest",)

    def __init__(self, token: str) -> None:
        is_sendable = token.isascii() and token.isprintable() and token == token.strip()
        if not token or not is_sendable or len(token) > MAX_TOKEN_BYTES - len("Bearer "):
            raise ConfigError(
                "auth.token must be printable ASCII without spaces around it, at most 8 KiB",
                key="auth.token",
            )
        self._digest = _digest(token)

    def __repr__(self) -> str:
        return "StaticToken(…)"

    def matches(self, token: str) -> bool:
        """Whether ``token`` is the secret."""
        return hmac.compare_digest(self._digest, _digest(token))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
