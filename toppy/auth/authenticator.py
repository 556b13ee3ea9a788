"""Every configured way to prove who one is, tried in turn."""

from __future__ import annotations

from dataclasses import dataclass

from toppy.auth.bearer import StaticToken, parse_authorization
from toppy.auth.issuer import IssuerVerifier
from toppy.auth.jwt import AuthenticationError, JwtVerifier
from toppy.model.identity import Identity


@dataclass(frozen=True, slots=True)
class Authenticated:
    """Who it is, and until when (Unix time; None: no end)."""

    identity: Identity
    expires_at: float | None = None


class Authenticator:
    """Decides on Authorization fields."""

    def __init__(
        self,
        *,
        static_token: StaticToken | None = None,
        jwt: JwtVerifier | None = None,
        oidc: IssuerVerifier | None = None,
        is_open: bool = False,
    ) -> None:
        """``is_open``: let everybody in when nothing else is configured."""
        self._static_token = static_token
        self._jwt = jwt
        self.oidc = oidc
        self._is_open = is_open and static_token is None and jwt is None and oidc is None

    def authenticate(self, authorization: str | None, now: float) -> Authenticated:
        """``now`` is Unix time. Raises ``AuthenticationError``; its text never has the token."""
        if self._is_open:
            return Authenticated(Identity("anonymous", "none"))
        token = parse_authorization(authorization)
        if token is None:
            raise AuthenticationError("a bearer token is required")
        if self._static_token is not None and self._static_token.matches(token):
            return Authenticated(Identity("token", "static"))
        oidc = self.oidc
        if oidc is not None and (self._jwt is None or oidc.claims_to_be_ours(token)):
            return Authenticated(*oidc.verify(token, now))
        if self._jwt is not None:
            return Authenticated(*self._jwt.verify(token, now))
        raise AuthenticationError("the token is wrong")
