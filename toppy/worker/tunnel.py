"""What the router works with: tunnels, their far sides, bounds, and the shell around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from toppy.model.grant import Grant
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import Buffer, UdpTunnel
from toppy.wire.ipc_message import AdmissionRequest, TokenRequest


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


class Tunnel:
    """One request stream and what it carries."""

    __slots__ = (
        "asked_at",
        "barriers_answered",
        "capsules_only",
        "connection",
        "datagrams_to_client",
        "datagrams_to_target",
        "grant",
        "last_active",
        "opened_at",
        "overflow",
        "protocol",
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
        self.datagrams_to_target = 0
        self.datagrams_to_client = 0

    @property
    def key(self) -> tuple[int, int]:
        """(connection, quarter stream ID)."""
        return self.connection, self.stream_id // 4
