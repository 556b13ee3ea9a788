"""Bearer credentials (RFC 6750) and the static token."""

from __future__ import annotations

import hmac

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
    """One shared secret, compared in constant time."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def __repr__(self) -> str:
        return "StaticToken(…)"

    def matches(self, token: str) -> bool:
        """Whether ``token`` is the secret."""
        return hmac.compare_digest(self._token, token.encode("utf-8", "surrogatepass"))
