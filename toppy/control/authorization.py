"""May this identity reach this target now: policy by name, resolution, policy by address.

In this order, so that nobody without a rule makes the gateway resolve a name.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass

from toppy.errors import TargetError
from toppy.model.identity import Identity
from toppy.model.target import Protocol, Target
from toppy.net.resolver import Resolver
from toppy.policy.address_guard import OWN, embedded_address, unmapped
from toppy.policy.ruleset import DEFAULT_RULE, Decision, Ruleset

_DISCARD_PORT = 9
"""Connecting a UDP socket sends nothing; the port does not matter."""


@dataclass(frozen=True, slots=True)
class OwnService:
    """Where the gateway itself listens. No tunnel leads there, whatever the rules say: it would go
    round in circles, or reach what is meant for operators.
    """

    protocol: Protocol
    host: str
    """An address; an unspecified one stands for all."""
    port: int

    def is_at(self, target: Target, address: str, *, is_own: bool) -> bool:
        """Whether ``target`` at ``address`` is this one."""
        if (target.protocol, target.port) != (self.protocol, self.port):
            return False
        found = ipaddress.ip_address(address)
        innermost = embedded_address(found) or found
        bound = unmapped(ipaddress.ip_address(self.host))
        if bound.is_unspecified:
            # every address of 127.0.0.0/8 and 0.0.0.0 are this host's, too
            return is_own or innermost.is_loopback or innermost.is_unspecified
        # to the kernel, 0.0.0.0 and :: as a target are loopback
        is_local = innermost.is_unspecified and innermost.version == bound.version
        return innermost == bound or (is_local and bound.is_loopback)


@dataclass(frozen=True, slots=True)
class Authorization:
    """What was decided, and on what."""

    decision: Decision
    addresses: tuple[str, ...] = ()
    """Every one that was looked at."""
    own_addresses: frozenset[str] = frozenset()
    """Those among them, or embedded in them, that are this host's."""
    is_loop: bool = False
    """The rules allow it, and it is denied all the same: the gateway itself listens there."""


class Authorizer:
    """Decides with the rules of one revision."""

    def __init__(
        self,
        ruleset: Ruleset,
        resolver: Resolver,
        clock: Callable[[], float],
        own_services: Collection[OwnService] = (),
    ) -> None:
        """``clock`` gives Unix time."""
        self.ruleset = ruleset
        self._own_services = own_services
        self._resolver = resolver
        self._clock = clock

    async def authorize(
        self, identity: Identity, target: Target, pinned: str = ""
    ) -> Authorization:
        """``pinned`` is the address of a live tunnel, which stays with it: nothing is resolved.

        Raises ``TargetError`` for a name without an address, and where it cannot be checked.
        """
        early = self.ruleset.may_resolve(identity, target, now=self._clock())
        if not early.is_allowed:
            return Authorization(early)
        addresses = (pinned,) if pinned else await self._addresses(target.host)
        return self._authorize_addresses(identity, target, addresses)

    def authorize_address(self, identity: Identity, target: Target, address: str) -> Authorization:
        """For a live tunnel's address alone. Raises ``TargetError``."""
        return self._authorize_addresses(identity, target, (address,))

    def _authorize_addresses(
        self, identity: Identity, target: Target, addresses: tuple[str, ...]
    ) -> Authorization:
        forms = {address: _own_forms(address) for address in addresses}
        own = frozenset(form for found in forms.values() for form in found)
        others = tuple(
            address
            for address in addresses
            if not any(
                service.is_at(target, address, is_own=bool(forms[address]))
                for service in self._own_services
            )
        )
        decision = self.ruleset.decide(
            identity, target, others or addresses, own_addresses=own, now=self._clock()
        )
        if decision.is_allowed and not others:
            reason = f"target {target} is not allowed: {addresses[0]} is the gateway itself there"
            decision = Decision(False, (), DEFAULT_RULE, reason, OWN)
            return Authorization(decision, addresses, own, is_loop=True)
        return Authorization(decision, addresses, own)

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
