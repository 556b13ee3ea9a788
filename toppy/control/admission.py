"""May this client open this tunnel: authentication, policy, resolution, policy on addresses.

In this order, so that nobody unauthenticated makes the gateway resolve a name. The addresses in
the grant are the checked ones; the worker connects to nothing else.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Literal, cast

from toppy.auth.authenticator import Authenticated, Authenticator
from toppy.auth.issuer import NoKeysError
from toppy.auth.jwt import AuthenticationError, UnknownKeyError
from toppy.control.issuer_keys import IssuerKeys
from toppy.errors import TargetError
from toppy.model.grant import Denial, Grant
from toppy.model.target import Target
from toppy.net.resolver import Resolver
from toppy.policy.address_guard import embedded_address
from toppy.policy.ruleset import Ruleset
from toppy.wire.ipc_message import AdmissionRequest, LiveTunnel

ECHO_RULE = "built-in echo"
_DISCARD_PORT = 9
"""Connecting a UDP socket sends nothing; the port does not matter."""
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


class Admission:
    """Decides with the configuration of one revision."""

    def __init__(
        self,
        authenticator: Authenticator,
        ruleset: Ruleset,
        resolver: Resolver,
        clock: Callable[[], float],
        issuer_keys: IssuerKeys | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._ruleset = ruleset
        self._resolver = resolver
        self._clock = clock
        self._issuer_keys = issuer_keys

    def is_valid(self, authorization: str | None) -> bool:
        """Whether a credential is good, whatever it would be used for."""
        try:
            self._authenticator.authenticate(authorization, self._clock())
        except AuthenticationError as error:
            if isinstance(error, UnknownKeyError) and self._issuer_keys is not None:
                self._issuer_keys.want()
            return False
        return True

    async def decide(self, request: AdmissionRequest) -> Grant | Denial:
        """Grant or denial; never raises for what a client or a target did."""
        try:
            who = await self._authenticate(request.authorization)
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
        early = self._ruleset.may_resolve(identity, target)
        if not early.is_allowed:
            return Denial(
                403, "http_request_denied", early.reason, early.rule, subject=identity.subject
            )
        try:
            if request.address:
                addresses: tuple[str, ...] = (request.address,)
            else:
                addresses = await self._addresses(target.host)
            own = frozenset(form for address in addresses for form in _own_forms(address))
        except TargetError as error:
            return Denial(error.status, error.proxy_status, str(error), subject=identity.subject)
        decision = self._ruleset.decide(identity, target, addresses, own_addresses=own)
        if not decision.is_allowed:
            kind = "destination_ip_prohibited" if decision.category else "http_request_denied"
            return Denial(403, kind, decision.reason, decision.rule, subject=identity.subject)
        return Grant(
            addresses=decision.addresses,
            port=target.port,
            subject=identity.subject,
            rule=decision.rule,
            revision=self._ruleset.revision,
            expires_at=who.expires_at,
        )

    async def _authenticate(self, authorization: str | None) -> Authenticated:
        try:
            return self._authenticator.authenticate(authorization, self._clock())
        except UnknownKeyError:
            # the issuer may have changed its keys since they were fetched
            if self._issuer_keys is None or not await self._issuer_keys.wait_for_newer():
                raise
        return self._authenticator.authenticate(authorization, self._clock())

    def recheck(self, tunnel: LiveTunnel) -> Denial | None:
        """Why a live tunnel would not be granted any more; None: it would. Nothing is resolved
        anew: a tunnel stays with the address that it has.
        """
        try:
            who = self._authenticator.authenticate(tunnel.authorization, self._clock())
        except NoKeysError:
            return None  # the grant ends with the token; until then it was good
        except AuthenticationError as error:
            return Denial(401, "http_request_denied", str(error))
        if not tunnel.address:
            return None
        target = Target(tunnel.host, tunnel.port, cast(Literal["udp", "tcp"], tunnel.protocol))
        try:
            own = frozenset(_own_forms(tunnel.address))
        except TargetError as error:
            return Denial(error.status, error.proxy_status, str(error))
        decision = self._ruleset.decide(who.identity, target, (tunnel.address,), own_addresses=own)
        if decision.is_allowed:
            return None
        return Denial(403, "http_request_denied", decision.reason, decision.rule)

    @property
    def revision(self) -> int:
        """Of the policy."""
        return self._ruleset.revision

    async def _addresses(self, host: str) -> tuple[str, ...]:
        try:
            return (str(ipaddress.ip_address(host)),)
        except ValueError:
            return await self._resolver.resolve(host)


def _own_forms(address: str) -> list[str]:
    """``address``, and the IPv4 address that it embeds, where they are this host's."""
    forms = [address]
    embedded = embedded_address(ipaddress.ip_address(address))
    if embedded is not None:
        forms.append(str(embedded))
    return [form for form in forms if _is_own(form)]


def _is_own(address: str) -> bool:
    """Whether ``address`` belongs to this host now: the kernel then talks to it from itself.

    Raises ``TargetError`` when that cannot be found out: what cannot be checked is not allowed.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        probe = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        raise TargetError(
            f"the gateway cannot check the target's address: {error.strerror}",
            proxy_status="proxy_internal_error",
        ) from None
    with probe:
        try:
            probe.connect((address, _DISCARD_PORT))
        except OSError:
            return False  # there is no way to it, or it is no single host's address
        return bool(probe.getsockname()[0] == address)
