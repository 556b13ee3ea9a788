"""What the router works with: tunnels, their far sides, bounds, and the shell around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from toppy.model.client_certificate import ClientCertificate
from toppy.model.grant import Denial, Grant
from toppy.model.target import Target
from toppy.net.udp_socket import SendResult
from toppy.policy.meter import Meter
from toppy.protocol.udp_tunnel import Buffer, UdpTunnel
from toppy.quic.endpoint import BodyReceived, StreamAborted
from toppy.quic.h3 import Headers
from toppy.wire.ipc_message import AdmissionRequest, ClosedTunnel, LiveTunnel, TokenRequest
from toppy.wire.tunnel_request import TunnelKind

if TYPE_CHECKING:
    from toppy.worker.tcp_relay import Connecting, TcpFlow
    from toppy.worker.udp_relay import UdpFlow


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Bounds of one worker; see ``[limits]`` in the configuration reference."""

    max_tunnels_per_connection: int
    max_failed_auth_per_connection: int
    max_failed_auth_per_source_per_min: int
    max_pending_admissions: int
    admission_timeout_s: float
    tunnel_idle_timeout_s: float
    tcp_idle_timeout_s: float
    tcp_connect_timeout_s: float
    tcp_max_connecting: int
    tcp_max_connecting_per_connection: int
    early_datagrams_per_tunnel: int
    early_bytes_per_tunnel: int
    capsule_queue_bytes: int
    connection_capsule_queue_bytes: int


class TargetSocket(Protocol):
    """The far side of a tunnel: a connected UDP socket."""

    @property
    def address(self) -> str:
        """Where it leads, numeric."""
        ...

    @property
    def sent_bytes(self) -> int:
        """How much of the payloads went out when ``send`` did not answer SENT."""
        ...

    @property
    def overflow(self) -> int:
        """Datagrams from the target that the kernel has dropped so far: the buffer was full."""
        ...

    def send(self, payloads: Buffer, segment_size: int) -> SendResult: ...

    def close(self) -> None: ...


class RouterShell(Protocol):
    """What the router has done for it."""

    def ask(self, message: AdmissionRequest | TokenRequest) -> bool:
        """Send a question to the control plane; False when it cannot be asked now."""
        ...

    def open_udp(self, tunnel: UdpFlow, grant: Grant) -> TargetSocket:
        """Connect to the grant's first reachable address; raises ``TargetError``."""
        ...

    def connect_tcp(self, flow: TcpFlow, grant: Grant, timeout_s: float) -> Connecting:
        """Begin to reach one of the grant's addresses; the flow is told how that ended."""
        ...

    def flush(self) -> None:
        """A stream was given something outside of the handling of events: send it soon."""
        ...

    def now(self) -> float:
        """The clock with whose readings the router is called."""
        ...

    def tunnel_closed(self, tunnel: ClosedTunnel) -> None:
        """A tunnel that was granted has ended: tell the control plane, for the audit log."""
        ...

    def refused(self, source: str, target: str, denial: Denial) -> None:
        """A request was refused that the control plane does not know of: the same. ``target`` is
        empty where the request could not be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping that waits for the control plane's word."""

    connection: int
    stream_id: int
    request: TokenRequest


@dataclass(frozen=True, slots=True)
class Renewal:
    """An open tunnel whose client has a newer token, which the control plane is asked about."""

    tunnel: Tunnel
    request: AdmissionRequest

    @property
    def connection(self) -> int:
        """The tunnel's."""
        return self.tunnel.connection


class Tunnel(ABC):
    """One request stream and what it carries. What is special to UDP or TCP is in subclasses."""

    __slots__ = (
        "asked_at",
        "bytes_to_client",
        "bytes_to_target",
        "connection",
        "datagrams_to_client",
        "datagrams_to_target",
        "drops",
        "grant",
        "is_open",
        "last_active",
        "meter",
        "opened_at",
        "rate_limited",
        "renewal",
        "request",
        "stream_id",
    )

    def __init__(
        self,
        connection: int,
        stream_id: int,
        request: AdmissionRequest,
        *,
        now: float,
    ) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.request = request
        self.opened_at = 0.0
        """Unix time."""
        self.asked_at = now
        self.last_active = now
        self.grant: Grant | None = None
        self.is_open = False
        """It was granted, its target is reached and the client was told."""
        self.renewal: Renewal | None = None
        """Waits for the control plane's word."""
        self.datagrams_to_target = 0
        self.datagrams_to_client = 0
        self.bytes_to_target = 0
        self.bytes_to_client = 0
        self.drops = 0
        """Datagrams that could not be handed on; not those that a full engine dropped."""
        self.rate_limited = 0
        """Those among them that were over a rate or a quota."""
        self.meter: Meter | None = None
        """What it is held to; None: to nothing. It may be another one after any await."""

    @property
    @abstractmethod
    def kind(self) -> TunnelKind:
        """What the request asked for."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Of the target, numeric; empty before it is reached, and for an echo."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """While the target is being reached: every address that is tried."""
        return ()

    @property
    @abstractmethod
    def has_capsules(self) -> bool:
        """Whether the gateway may say something on the stream besides the payload."""

    @property
    @abstractmethod
    def offers(self) -> Headers:
        """Fields of the answer that opens it: which of toppy's capsules it takes."""

    @abstractmethod
    def idle_timeout_s(self, limits: RouterLimits) -> float:
        """For how long it may carry nothing."""

    @abstractmethod
    def take_authorization(self) -> str | None:
        """A newer credential that the client sent on the open tunnel, once."""

    @abstractmethod
    def connect(self, grant: Grant, now: float) -> bool:
        """Reach the target; False: that takes a while, and the router is told. Raises
        ``TargetError``.
        """

    @abstractmethod
    def begin(self, now: float) -> None:
        """The client was told that the tunnel is open: what it sent before goes to the target."""

    @abstractmethod
    def receive_body(self, event: BodyReceived, now: float) -> bool:
        """Bytes of the request stream; True: the client has ended the tunnel with them. Raises
        ``PeerError`` where they break the protocol.
        """

    def is_ended_by(self, event: StreamAborted) -> bool:
        """Whether the tunnel ends because the client gave up one direction of its stream."""
        del event
        return True

    def receive_writable(self) -> None:
        """Less waits on its stream now than the bound of which it wanted to hear."""
        return

    @abstractmethod
    def discard_held(self) -> None:
        """The tunnel is refused: what the client sent before the answer is dropped."""

    @abstractmethod
    def count_losses(self) -> None:
        """Bring up to date what was lost at the target's socket."""

    @abstractmethod
    def release(self) -> None:
        """The tunnel is over: its target is given up."""

    def take_renewal(self, question: int) -> Renewal | None:
        """A newer token that came for the open tunnel, as a question to the control plane; None
        when there is none, or one is asked about already.
        """
        if self.renewal is not None:
            return None
        authorization = self.take_authorization()
        if authorization is None:
            return None
        request = msgspec.structs.replace(
            self.request,
            request=question,
            authorization=authorization,
            address=self.address,
        )
        return Renewal(self, request)

    def renew(self, renewal: Renewal, grant: Grant | None) -> None:
        """The control plane's word. Without a grant, or with one to somebody else, the tunnel has
        what it had before.
        """
        self.renewal = None
        if grant is not None and self.grant is not None and grant.subject == self.grant.subject:
            self.grant = grant
            self.request = renewal.request

    @property
    def key(self) -> tuple[int, int]:
        """(connection, quarter stream ID)."""
        return self.connection, self.stream_id // 4

    @property
    def target_name(self) -> str:
        """What was asked for, ``host:port``."""
        return str(Target(self.request.host, self.request.port))

    def live(self, grant: Grant, source: str, *, with_authorization: bool) -> LiveTunnel:
        """As operators see it; ``source`` is the client's address and port."""
        return LiveTunnel(
            connection=self.connection,
            quarter_stream_id=self.stream_id // 4,
            source=source,
            host=self.request.host,
            port=self.request.port,
            protocol=self.request.protocol,
            address=self.address,
            subject=grant.subject,
            rule=grant.rule,
            opened_at=self.opened_at,
            datagrams_to_target=self.datagrams_to_target,
            datagrams_to_client=self.datagrams_to_client,
            authorization=self.request.authorization if with_authorization else None,
            certificate=self.request.certificate if with_authorization else None,
            bytes_to_target=self.bytes_to_target,
            bytes_to_client=self.bytes_to_client,
            candidates=self.candidates,
        )

    def closed(self, grant: Grant, reason: str, unix_now: float) -> ClosedTunnel:
        """As the audit log sees it once it has ended; one that never opened lasted no time."""
        return ClosedTunnel(
            connection=self.connection,
            quarter_stream_id=self.stream_id // 4,
            source=self.request.source,
            host=self.request.host,
            port=self.request.port,
            subject=grant.subject,
            rule=grant.rule,
            reason=reason,
            duration_s=max(0.0, unix_now - self.opened_at) if self.opened_at else 0.0,
            datagrams_to_target=self.datagrams_to_target,
            bytes_to_target=self.bytes_to_target,
            datagrams_to_client=self.datagrams_to_client,
            bytes_to_client=self.bytes_to_client,
            drops=self.drops,
            rate_limited=self.rate_limited,
            protocol=self.request.protocol,
        )


@dataclass(slots=True)
class Peer:
    """One connection."""

    tunnels: set[Tunnel]
    failed_auth: int = 0
    newest_request: int = -1
    """Quarter stream ID of the newest request."""
    early: dict[int, UdpTunnel] = field(default_factory=dict)
    """Datagrams that overtook their request, by quarter stream ID."""
    pings: dict[int, bytes] | None = None
    """Connections that speak ``toppy-ping``: what each stream has said so far."""
    pings_asked: int = 0
    """Pings of this connection that the control plane has not answered yet."""
    opened_at: float = 0.0
    """Unix time."""
    certificate: ClientCertificate | None = None
    """What its client has shown, verified."""
    tails: set[int] = field(default_factory=set)
    """Streams of tunnels that ended in order while the last bytes to the client still waited."""
    idle_since: float | None = None
    """While the worker drains: since when there is nothing left to do for it."""
