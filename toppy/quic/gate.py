"""Who may open a connection: the gateway's bounds on connections and handshakes (pure)."""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from toppy.policy.attempts import AttemptLimit
from toppy.quic.engine import Address, Admission


@dataclass(frozen=True, slots=True)
class GateLimits:
    """Bounds of one worker."""

    max_connections: int
    max_connections_per_source: int
    """Per IPv4 address, or per IPv6 /64: what one customer of a provider gets."""
    retry_threshold: int
    """Handshakes under way above which a client must prove its address first."""
    handshake_timeout_s: float
    attempts_per_source_per_s: int = 0
    """As many at once as ``max_connections_per_source``, at least; 0: no limit."""


class ConnectionGate:
    """Counts connections and handshakes and decides on each new one.

    ``decide`` is the engine's gate. ``accepted``, ``completed`` and ``closed`` follow the engine's
    events; attempts of one received batch are decided on the same counts, so a bound may be
    exceeded by a batch at most.
    """

    def __init__(self, limits: GateLimits) -> None:
        self._limits = limits
        self._source_of: dict[int, str] = {}
        self._per_source: Counter[str] = Counter()
        self._handshake_deadline: dict[int, float] = {}
        self._attempts: AttemptLimit | None = None
        if limits.attempts_per_source_per_s:
            per_s = limits.attempts_per_source_per_s
            self._attempts = AttemptLimit(per_s, max(per_s, limits.max_connections_per_source))
        self._now = 0.0
        """The engine asks without a clock: the last reading serves, half a second old at most."""
        self.retried = 0
        self.refused = 0
        self.is_draining = False
        """Nothing new is taken; ``turned_away`` counts the attempts, which another worker gets."""
        self.turned_away = 0

    def decide(self, source: Address, is_validated: bool) -> Admission:
        """Decide on a first Initial packet from ``source``."""
        limits = self._limits
        if self.is_draining:
            self.turned_away += 1
            return Admission.IGNORE
        if len(self._source_of) >= limits.max_connections:
            self.refused += 1
            return Admission.REFUSE
        if not is_validated and len(self._handshake_deadline) >= limits.retry_threshold:
            self.retried += 1
            return Admission.RETRY
        key = source_key(source[0])
        if self._per_source[key] >= limits.max_connections_per_source:
            self.refused += 1
            return Admission.REFUSE
        # those that have proved their address are counted apart: whoever forges a source must not
        # be able to use up what the true one may
        if self._attempts is not None and not self._attempts.take((key, is_validated), self._now):
            if not is_validated:
                self.retried += 1
                return Admission.RETRY
            self.refused += 1
            return Admission.REFUSE
        return Admission.ACCEPT

    def accepted(self, connection: int, source: Address, now: float) -> None:
        """A handshake began."""
        self._now = now
        key = source_key(source[0])
        self._source_of[connection] = key
        self._per_source[key] += 1
        self._handshake_deadline[connection] = now + self._limits.handshake_timeout_s

    def completed(self, connection: int) -> None:
        """The handshake is done."""
        self._handshake_deadline.pop(connection, None)

    def closed(self, connection: int) -> bool:
        """The connection is gone. Returns whether its handshake had been completed."""
        key = self._source_of.pop(connection, None)
        if key is not None:
            self._per_source[key] -= 1
            if not self._per_source[key]:
                del self._per_source[key]
        return self._handshake_deadline.pop(connection, None) is None

    def overdue(self, now: float) -> list[int]:
        """Connections whose handshake takes longer than allowed; close them. Call it twice a second
        or more often, whether there are any or not.
        """
        self._now = now
        # insertion order is deadline order, so the walk ends at the first that has time left
        overdue = []
        for connection, deadline in self._handshake_deadline.items():
            if deadline > now:
                break
            overdue.append(connection)
        return overdue

    @property
    def connections(self) -> int:
        """Connections that exist, handshakes under way included."""
        return len(self._source_of)


def source_key(host: str) -> str:
    """What "one source" means: an IPv4 address, or an IPv6 /64."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
    return host
