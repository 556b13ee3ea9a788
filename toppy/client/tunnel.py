"""What one tunnel of the client is: a local peer's way to a target, whatever carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toppy.model.target import Target
from toppy.protocol.udp_tunnel import Buffer, HeldPayloads, UdpTunnel


@dataclass(frozen=True, slots=True)
class Refusal:
    """The gateway said no."""

    status: int
    explanation: str
    """A plain sentence: what, which rule, what to do next."""
    proxy_status: str = ""
    """The Proxy-Status field (RFC 9209) as the gateway wrote it; empty: none."""


class Leg:
    """One request of a tunnel, on one connection."""

    __slots__ = (
        "answers_barrier",
        "answers_due",
        "authorization",
        "awaits_answers",
        "awaits_barrier",
        "connection",
        "is_unsent",
        "last_heard",
        "left_at",
        "protocol",
        "received",
        "sent",
        "stream_id",
        "takes_renewal",
        "tunnel",
    )

    def __init__(
        self,
        tunnel: ClientTunnel,
        connection: int,
        stream_id: int,
        authorization: str | None = None,
    ) -> None:
        self.tunnel = tunnel
        self.connection = connection
        self.stream_id = stream_id
        # payloads wait in the tunnel: they outlive the leg
        self.protocol = UdpTunnel(hold_datagrams=0, hold_bytes=0, is_client=True)
        self.authorization = authorization
        """The token that the gateway has for it."""
        self.takes_renewal = False
        """The gateway takes a newer one (AUTHORIZATION)."""
        self.answers_barrier = False
        """The gateway says when everything sent here has gone to the target (BARRIER)."""
        self.awaits_answers = False
        """What comes by a newer leg waits for what comes here."""
        self.answers_due: float | None = None
        """Until then at most, once the target has been asked for the last time."""
        self.awaits_barrier = False
        """It was asked, and has not answered."""
        self.is_unsent = False
        """The tunnel has left, and what it was given here may not even have been sent."""
        self.received = 0
        """Datagrams that came here."""
        self.sent = 0
        """Datagrams that went here."""
        self.left_at = 0.0
        """When the tunnel stopped sending here."""
        self.last_heard = 0.0
        """When something arrived here last; kept once the tunnel has left."""

    @property
    def is_open(self) -> bool:
        """Whether the gateway has said yes."""
        return self.protocol.is_open


class ClientTunnel:
    """One local peer's way to a target. Survives reconnects, and moves between connections."""

    __slots__ = (
        "arrived",
        "current",
        "datagrams_from_gateway",
        "datagrams_to_gateway",
        "deliver",
        "ended",
        "held",
        "hold_until",
        "leaving",
        "next",
        "target",
    )

    def __init__(
        self,
        target: Target,
        deliver: Callable[[Buffer, int], None],
        ended: Callable[[Refusal | None], None],
    ) -> None:
        self.target = target
        self.deliver = deliver
        self.ended = ended
        self.current: Leg | None = None
        """Where payloads are sent, once it is open."""
        self.next: Leg | None = None
        """Asked for on a newer connection, while ``current`` relays."""
        self.leaving: list[Leg] = []
        """Nothing more is sent here; what was under way still arrives."""
        self.held = HeldPayloads()
        self.arrived = HeldPayloads()
        """What a newer leg brought while an older one may still bring answers."""
        self.hold_until: float | None = None
        """While it moves: payloads wait, so that they do not overtake those on the old way."""
        self.datagrams_to_gateway = 0
        self.datagrams_from_gateway = 0

    @property
    def is_open(self) -> bool:
        """Whether payloads have a way to the target now."""
        return self.current is not None and self.current.is_open

    def is_early(self, leg: Leg) -> bool:
        """Whether what ``leg`` brings is to wait for an older leg."""
        for older in self.leaving:
            if older is leg:
                return False
            if older.awaits_answers:
                return True
        return False

    def legs(self) -> list[Leg]:
        """All there are."""
        return [leg for leg in (self.current, self.next, *self.leaving) if leg is not None]

    def forget(self, leg: Leg) -> None:
        """The leg is gone. When it was ``current``, the next one takes its place, if there is."""
        if leg is self.current:
            self.current, self.next = self.next, None
            self.hold_until = None
        elif leg is self.next:
            self.next = None
        else:
            self.leaving.remove(leg)
