"""Every configured way to prove who one is, tried in turn."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from toppy.auth.bearer import StaticToken, parse_authorization
from toppy.auth.client_certificate import (
    SUBJECT_PREFIX,
    CertificateTrust,
    NameFrom,
    subject_of,
)
from toppy.auth.issuer import IssuerVerifier
from toppy.auth.jwt import NO_SUBJECT, AuthenticationError, JwtVerifier
from toppy.model.client_certificate import ClientCertificate
from toppy.model.identity import Identity


@dataclass(frozen=True, slots=True)
class Authenticated:
    """Who it is, and until when (Unix time; None: no end)."""

    identity: Identity
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class SubjectPrefixes:
    """What stands before ``sub`` of each kind of token, so that no two issuers share a name.

    Where both kinds are configured they differ, and none that is not empty begins the other.
    """

    jwt: str = ""
    oidc: str = ""


class Authenticator:
    """Decides on Authorization fields."""

    def __init__(
        self,
        *,
        static_token: StaticToken | None = None,
        jwt: JwtVerifier | None = None,
        oidc: IssuerVerifier | None = None,
        is_open: bool = False,
        prefixes: SubjectPrefixes = SubjectPrefixes(),
        trust: CertificateTrust | None = None,
        certificate_name: NameFrom | None = None,
    ) -> None:
        """``is_open``: let everybody in when nothing else is configured. ``certificate_name``: what
        names a client that shows a certificate and no token; None: it needs a token.
        """
        self._static_token = static_token
        self._jwt = jwt
        self.oidc = oidc
        self.trust = trust or CertificateTrust()
        self._certificate_name = certificate_name
        methods = (static_token, jwt, oidc, certificate_name)
        self._prefixes = prefixes
        self._is_open = is_open and all(method is None for method in methods)

    def trusting(self, trust: CertificateTrust) -> Authenticator:
        """The same with other client certificates."""
        if trust == self.trust:
            return self
        changed = copy.copy(self)
        changed.trust = trust
        return changed

    def authenticate(
        self,
        authorization: str | None,
        now: float,
        certificate: ClientCertificate | None = None,
    ) -> Authenticated:
        """``now`` is Unix time; ``certificate`` the connection's, whose chain was verified. A token
        decides who it is; a certificate does where there is none. Raises ``AuthenticationError``;
        its text never has the token.
        """
        current = self.trust.current(certificate, now)
        if self.trust.is_required and current is None:
            raise AuthenticationError(
                "a client certificate is required"
                if certificate is None
                else "the client certificate has expired, or its CA is not trusted any more"
            )
        if authorization is None and current is not None and self._certificate_name is not None:
            subject = subject_of(current, self._certificate_name)
            if subject is None:
                raise AuthenticationError("the client certificate has no name that can be used")
            return Authenticated(Identity(subject, "certificate"), current.not_after)
        who = self._by_token(authorization, now)
        if who.identity.subject.startswith(SUBJECT_PREFIX):
            raise AuthenticationError(f"a token's subject must not begin with {SUBJECT_PREFIX}")
        if self.trust.is_required and current is not None:
            ends = current.not_after
            who = replace(who, expires_at=min(ends, who.expires_at or ends))
        return who

    def _by_token(self, authorization: str | None, now: float) -> Authenticated:
        if self._is_open:
            return Authenticated(Identity("anonymous", "none"))
        token = parse_authorization(authorization)
        if token is None:
            raise AuthenticationError(
                "a bearer token is required"
                if self._certificate_name is None
                else "a client certificate or a bearer token is required"
            )
        if self._static_token is not None and self._static_token.matches(token):
            return Authenticated(Identity("token", "static"))
        oidc, prefixes = self.oidc, self._prefixes
        if oidc is not None and (self._jwt is None or oidc.claims_to_be_ours(token)):
            identity, until = oidc.verify(token, now)
            other = prefixes.jwt if self._jwt is not None else ""
            return Authenticated(_prefixed(identity, prefixes.oidc, other), until)
        if self._jwt is not None:
            identity, until = self._jwt.verify(token, now)
            other = prefixes.oidc if oidc is not None else ""
            return Authenticated(_prefixed(identity, prefixes.jwt, other), until)
        raise AuthenticationError("the token is wrong")


def _prefixed(identity: Identity, own: str, other: str) -> Identity:
    """``identity`` as rules name it. Raises ``AuthenticationError`` for a name of the other's."""
    if identity.subject == NO_SUBJECT:
        return identity
    subject = own + identity.subject
    if other and subject.startswith(other):
        raise AuthenticationError(
            f"the token's subject begins with {other}, which stands for another issuer"
        )
    return replace(identity, subject=subject)
