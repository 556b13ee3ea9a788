"""What the router works with: tunnels, their far sides, bounds, and the shell around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from toppy.model.grant import Grant
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import Buffer, UdpTunnel
from toppy.wire.ipc_message import AdmissionRequest, ClosedTunnel, LiveTunnel, TokenRequest


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Bounds of one worker; see ``[limits]`` in the configuration reference."""

    max_tunnels_per_connection: int
    max_failed_auth_per_connection: int
    max_pending_admissions: int
    admission_timeout_s: float
    tunnel_idle_timeout_s: float
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

    def open_target(self, tunnel: Tunnel, grant: Grant) -> TargetSocket:
        """Connect to the grant's first reachable address; raises ``TargetError``."""
        ...

    def tunnel_closed(self, tunnel: ClosedTunnel) -> None:
        """A tunnel that was granted has ended: tell the control plane, for the audit log."""
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


class Tunnel:
    """One request stream and what it carries."""

    __slots__ = (
        "asked_at",
        "barriers_answered",
        "bytes_to_client",
        "bytes_to_target",
        "capsules_only",
        "connection",
        "datagrams_to_client",
        "datagrams_to_target",
        "drops",
        "grant",
        "last_active",
        "opened_at",
        "overflow",
        "protocol",
        "renewal",
        "request",
        "stream_id",
        "target",
    )

    def __init__(
        self,
        connection: int,
        stream_id: int,
        protocol: UdpTunnel,
        request: AdmissionRequest,
        *,
        now: float,
    ) -> None:
        self.connection = connection
        self.stream_id = stream_id
        self.protocol = protocol
        self.request = request
        self.opened_at = 0.0
        """Unix time."""
        self.asked_at = now
        self.last_active = now
        self.grant: Grant | None = None
        self.target: TargetSocket | None = None
        self.capsules_only = False
        self.overflow = 0
        self.barriers_answered = 0
        self.renewal: Renewal | None = None
        """Waits for the control plane's word."""
        self.datagrams_to_target = 0
        self.datagrams_to_client = 0
        self.bytes_to_target = 0
        self.bytes_to_client = 0
        self.drops = 0
        """Datagrams that could not be handed on; not those that a full engine dropped."""

    def take_renewal(self, question: int) -> Renewal | None:
        """A newer token that came for the open tunnel, as a question to the control plane; None
        when there is none, or one is asked about already.
        """
        authorization = self.protocol.authorization
        if authorization is None or self.renewal is not None:
            return None
        self.protocol.authorization = None
        request = msgspec.structs.replace(
            self.request,
            request=question,
            authorization=authorization,
            address=self.target.address if self.target is not None else "",
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

    def live(self, grant: Grant, source: str, *, with_authorization: bool) -> LiveTunnel:
        """As operators see it; ``source`` is the client's address and port."""
        return LiveTunnel(
            connection=self.connection,
            quarter_stream_id=self.stream_id // 4,
            source=source,
            host=self.request.host,
            port=self.request.port,
            protocol=self.request.protocol,
            address=self.target.address if self.target is not None else "",
            subject=grant.subject,
            rule=grant.rule,
            opened_at=self.opened_at,
            datagrams_to_target=self.datagrams_to_target,
            datagrams_to_client=self.datagrams_to_client,
            authorization=self.request.authorization if with_authorization else None,
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
