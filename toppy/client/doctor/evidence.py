"""What was seen on the way to the gateway, before anybody says what it means."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography import x509

from toppy.client.path_probe import AddressFindings, TcpAnswer
from toppy.quic.engine import Address
from toppy.wire.gateway_facts import GatewayFacts


@dataclass(frozen=True, slots=True)
class Trouble:
    """A question that was not answered as hoped for."""

    text: str
    is_timeout: bool = False
    is_refusal: bool = False
    """The gateway gave the reason, and ``text`` says what to do."""


@dataclass(slots=True)
class PingEvidence:
    """The ping with the token, on a connection of its own."""

    address: Address | None = None
    """The one that completed the handshake."""
    handshake_s: float = 0.0
    answer: str = ""
    trouble: Trouble | None = None


@dataclass(slots=True)
class TargetEvidence:
    """How the gateway answered the request for a tunnel to the target that was asked about."""

    protocol: str
    status: int = 0
    explanation: str = ""
    rule: str = ""
    trouble: Trouble | None = None


@dataclass(slots=True)
class TunnelEvidence:
    """The tunnel to the gateway's echo, and what came through it."""

    has_begun: bool = False
    trouble: Trouble | None = None
    """Why there is no tunnel."""
    is_open: bool = False
    status: int = 0
    facts: GatewayFacts | None = None
    facts_at: float = 0.0
    """Unix time here when they came."""
    facts_later: GatewayFacts | None = None
    """Of a second request, when everything else was done."""
    local_port: int = 0
    echo_s: float | None = None
    echo_trouble: Trouble | None = None
    echoes_sent: int = 0
    round_trips_s: list[float] = field(default_factory=list)
    """Of the echoes that came back."""
    has_measured_loss: bool = False
    """Every echo had its time to come back."""
    came_back: dict[int, bool] = field(default_factory=dict)
    """Payload sizes that the gateway returned, and whether in one packet (else in pieces)."""
    sizes_sent: tuple[int, ...] = ()
    has_measured_sizes: bool = False
    largest_up_bytes: int = 0
    """The largest payload that fits one packet to the gateway, as the engine has found out."""
    targets: list[TargetEvidence] = field(default_factory=list)


@dataclass(slots=True)
class Evidence:
    """Everything about the network. What is still empty at the end had no time."""

    addresses: list[Address] = field(default_factory=list)
    lookup_trouble: Trouble | None = None
    login_trouble: Trouble | None = None
    is_logged_in: bool = False
    token: str | None = field(default=None, repr=False)
    path: list[AddressFindings] = field(default_factory=list)
    has_probed_path: bool = False
    tcp: TcpAnswer | None = None
    chain: tuple[x509.Certificate, ...] = ()
    ping: PingEvidence = field(default_factory=PingEvidence)
    tunnel: TunnelEvidence = field(default_factory=TunnelEvidence)

    @property
    def answers_udp(self) -> bool:
        """Whether anything at all came back from the gateway by UDP."""
        return bool(
            any(each.round_trips_s for each in self.path)
            or self.chain
            or self.ping.address
            or self.tunnel.status
        )

    @property
    def round_trip_s(self) -> float | None:
        """The shortest that was seen without a connection."""
        return min(
            (trip for each in self.path for trip in each.round_trips_s.values()), default=None
        )
