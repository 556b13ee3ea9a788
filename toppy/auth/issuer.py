"""Tokens of an OpenID issuer, as the gateway takes them: which issuer, for whom, with which roles.

Pure: the keys are fetched elsewhere and told with ``use_keys``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jwt

from toppy.auth.jwt import AuthenticationError, JwtVerifier, UnknownKeyError, identity_of
from toppy.model.identity import Identity

ROLE_LIMIT = 64
"""Roles that one token can give; a rule names few."""


class NoKeysError(UnknownKeyError):
    """The issuer's keys are not here yet: nothing can be said about its tokens."""


@dataclass(frozen=True, slots=True)
class RoleMapping:
    """``claim`` (``realm_access.roles`` looks into tables) that is, or has, one of ``values``."""

    role: str
    claim: str
    values: tuple[str, ...]


class IssuerVerifier:
    """Verifies tokens of one issuer, for one audience."""

    def __init__(
        self,
        issuer: str,
        audience: str,
        *,
        leeway_s: float = 60.0,
        roles: Iterable[RoleMapping] = (),
    ) -> None:
        self.issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s
        self._roles = tuple(roles)
        self._verifier: JwtVerifier | None = None

    def __repr__(self) -> str:
        return f"IssuerVerifier({self.issuer!r}, {self._verifier!r})"

    @property
    def has_keys(self) -> bool:
        """Whether any token can be verified."""
        return self._verifier is not None

    def use_keys(self, jwks: str) -> None:
        """From now on these keys, a JWK set as text. Raises ``ConfigError`` for one without any."""
        self._verifier = JwtVerifier(
            jwks=jwks, issuer=self.issuer, audience=self._audience, leeway_s=self._leeway_s
        )

    def claims_to_be_ours(self, token: str) -> bool:
        """Whether a token says that it is this issuer's; nothing is verified."""
        try:
            claims = jwt.decode(token, options={"verify_signature": False})
        except (jwt.PyJWTError, ValueError, RecursionError):
            return False
        return bool(claims.get("iss") == self.issuer)

    def verify(self, token: str, now: float) -> tuple[Identity, float]:
        """Who the token names, with roles, and the Unix time until which it is good.

        Raises ``AuthenticationError``: ``UnknownKeyError`` where newer keys may change that.
        """
        if self._verifier is None:
            raise NoKeysError("the issuer's keys are not known here yet; try again in a moment")
        claims, expires_at = self._verifier.verify_claims(token, now)
        identity = identity_of(claims)
        if identity.subject == "jwt":
            raise AuthenticationError("the token has no subject (sub)")
        return (
            replace(identity, method="oidc", roles=roles_of(claims, self._roles)),
            expires_at,
        )


def roles_of(claims: Mapping[str, Any], mappings: Iterable[RoleMapping]) -> tuple[str, ...]:
    """The roles that ``mappings`` give for ``claims``, each once, at most ``ROLE_LIMIT``."""
    roles = [each.role for each in mappings if _has(claims, each)]
    return tuple(dict.fromkeys(roles))[:ROLE_LIMIT]


def _has(claims: Mapping[str, Any], mapping: RoleMapping) -> bool:
    found: Any = claims.get(mapping.claim)
    if found is None:  # a name with dots may be a claim's own (https://example.com/roles)
        found = claims
        for part in mapping.claim.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    values = found if isinstance(found, list) else [found]
    return any(isinstance(value, str) and value in mapping.values for value in values)
