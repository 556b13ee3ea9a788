"""May this client open this tunnel: authentication, policy, resolution, policy on addresses.

In this order, so that nobody unauthenticated makes the gateway resolve a name. The addresses in
the grant are the checked ones; the worker connects to nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable
from typing import Literal, cast

from toppy.auth.authenticator import Authenticated, Authenticator
from toppy.auth.issuer import NoKeysError
from toppy.auth.jwt import AuthenticationError, UnknownKeyError
from toppy.control.authorization import Authorization, Authorizer, OwnService
from toppy.control.issuer_keys import IssuerKeys
from toppy.errors import TargetError
from toppy.model.client_certificate import ClientCertificate
from toppy.model.grant import Denial, Grant
from toppy.model.target import Target
from toppy.net.resolver import Resolver
from toppy.policy.ruleset import Ruleset
from toppy.wire.ipc_message import AdmissionRequest, LiveTunnel

ECHO_RULE = "built-in echo"


class Admission:
    """Decides with the configuration of one revision."""

    def __init__(
        self,
        authenticator: Authenticator,
        ruleset: Ruleset,
        resolver: Resolver,
        clock: Callable[[], float],
        issuer_keys: IssuerKeys | None = None,
        *,
        own_services: Collection[OwnService] = (),
    ) -> None:
        self._authenticator = authenticator
        self._ruleset = ruleset
        self._authorizer = Authorizer(ruleset, resolver, clock, own_services)
        self._clock = clock
        self._issuer_keys = issuer_keys

    def is_valid(
        self, authorization: str | None, certificate: ClientCertificate | None = None
    ) -> bool:
        """Whether a credential is good, whatever it would be used for."""
        try:
            self._authenticator.authenticate(authorization, self._clock(), certificate)
        except AuthenticationError as error:
            if isinstance(error, UnknownKeyError) and self._issuer_keys is not None:
                self._issuer_keys.want()
            return False
        return True

    async def decide(self, request: AdmissionRequest) -> Grant | Denial:
        """Grant or denial; never raises for what a client or a target did."""
        try:
            who = await self._authenticate(request.authorization, request.certificate)
        except AuthenticationError as error:
            return Denial(401, "http_request_denied", str(error))
        identity = who.identity
        if request.is_echo:
            return Grant(
                addresses=(),
                port=request.port,
                subject=identity.subject,
                rule=ECHO_RULE,
                revision=self._ruleset.revision,
                is_echo=True,
                expires_at=who.expires_at,
            )
        target = Target(request.host, request.port, cast(Literal["udp", "tcp"], request.protocol))
        try:
            found = await self._authorizer.authorize(identity, target, request.address)
        except TargetError as error:
            return Denial(error.status, error.proxy_status, str(error), subject=identity.subject)
        decision = found.decision
        if not decision.is_allowed:
            return _denial(found, subject=identity.subject)
        ends = [end for end in (who.expires_at, decision.until) if end is not None]
        return Grant(
            addresses=decision.addresses,
            port=target.port,
            subject=identity.subject,
            rule=decision.rule,
            revision=self._ruleset.revision,
            expires_at=min(ends, default=None),
            ends_with_rule=decision.until is not None and min(ends) == decision.until,
            proxy_protocol=target.protocol == "tcp" and decision.proxy_protocol,
        )

    async def _authenticate(
        self, authorization: str | None, certificate: ClientCertificate | None
    ) -> Authenticated:
        try:
            return self._authenticator.authenticate(authorization, self._clock(), certificate)
        except UnknownKeyError:
            # the issuer may have changed its keys since they were fetched
            if self._issuer_keys is None or not await self._issuer_keys.wait_for_newer():
                raise
        return self._authenticator.authenticate(authorization, self._clock(), certificate)

    def recheck(self, tunnel: LiveTunnel) -> Denial | None:
        """Why a live tunnel would not be granted any more; None: it would. Nothing is resolved
        anew: a tunnel stays with the address that it has.
        """
        try:
            who = self._authenticator.authenticate(
                tunnel.authorization, self._clock(), tunnel.certificate
            )
        except NoKeysError:
            return None  # the grant ends with the token; until then it was good
        except AuthenticationError as error:
            return Denial(401, "http_request_denied", str(error))
        if not tunnel.address:
            return None
        target = Target(tunnel.host, tunnel.port, cast(Literal["udp", "tcp"], tunnel.protocol))
        try:
            # one that is being reached may come to have any of its addresses
            for address in tunnel.candidates or (tunnel.address,):
                found = self._authorizer.authorize_address(who.identity, target, address)
                if not found.decision.is_allowed:
                    return _denial(found)
        except TargetError as error:
            return Denial(error.status, error.proxy_status, str(error))
        return None

    def rule_of(self, tunnel: LiveTunnel) -> str:
        """The rule by which a live tunnel would be granted now; the one that it has, where that
        cannot be told.
        """
        try:
            who = self._authenticator.authenticate(
                tunnel.authorization, self._clock(), tunnel.certificate
            )
            if not tunnel.address:
                return tunnel.rule
            protocol = cast(Literal["udp", "tcp"], tunnel.protocol)
            target = Target(tunnel.host, tunnel.port, protocol)
            found = self._authorizer.authorize_address(who.identity, target, tunnel.address)
        except (AuthenticationError, TargetError):
            return tunnel.rule
        return found.decision.rule if found.decision.is_allowed else tunnel.rule

    def open_windows(self) -> tuple[bool, ...]:
        """Which rules with times hold now: when this changes, live tunnels are to be rechecked."""
        return self._ruleset.open_windows(self._clock())

    @property
    def revision(self) -> int:
        """Of the policy."""
        return self._ruleset.revision


def own_services(
    quic: Iterable[tuple[str, int]], health: socket.socket | None
) -> tuple[OwnService, ...]:
    """Of a gateway that listens on these addresses, and on this socket for health and metrics."""
    found = [OwnService("udp", host, port) for host, port in quic]
    if health is not None:
        host, port, *_ = health.getsockname()
        found.append(OwnService("tcp", host, port))
    return tuple(found)


def _denial(found: Authorization, subject: str = "") -> Denial:
    decision = found.decision
    if found.is_loop:  # RFC 9209 section 2.3.25; only whom the rules allow it learns of this
        return Denial(508, "proxy_loop_detected", decision.reason, subject=subject)
    kind = "destination_ip_prohibited" if decision.category else "http_request_denied"
    return Denial(403, kind, decision.reason, decision.rule, subject=subject)
