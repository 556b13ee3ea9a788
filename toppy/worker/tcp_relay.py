"""TCP tunnels of a worker: reached by way of the shell, relayed by ``StreamRelay``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from toppy.errors import TargetError
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Grant
from toppy.net.stream_relay import ByteSocket, StreamRelay
from toppy.protocol.stream_tunnel import StreamTunnel
from toppy.quic.endpoint import BodyReceived, Endpoint, StreamAborted
from toppy.quic.engine import READ_TURN_BYTES
from toppy.quic.h3 import Headers
from toppy.wire.capsule import RENEWAL_FIELD
from toppy.wire.connect_tcp import StreamFraming
from toppy.wire.ipc_message import AdmissionRequest
from toppy.wire.tunnel_request import TunnelKind
from toppy.worker.tunnel import RouterLimits, RouterShell, Tunnel

CONNECTION_WINDOW_BYTES: Final = 32 << 20
"""What a connection may have under way to the gateway once it has a TCP tunnel, at most."""
_HOLD_BYTES: Final = 2 * READ_TURN_BYTES
"""What was read of a stream before it was paused still comes: one turn's worth, and then some."""
_FRAMING = {
    TunnelKind.TCP: StreamFraming.CAPSULES,
    TunnelKind.TCP_CLASSIC: StreamFraming.RAW,
}


class Connecting(Protocol):
    """An attempt to reach a target."""

    def cancel(self) -> object: ...


class TcpFlow(Tunnel):
    """A TCP tunnel."""

    __slots__ = ("_kind", "_target_address", "connecting", "relay", "tunnels")

    def __init__(
        self,
        tunnels: TcpTunnels,
        connection: int,
        stream_id: int,
        kind: TunnelKind,
        request: AdmissionRequest,
        *,
        now: float,
    ) -> None:
        super().__init__(connection, stream_id, request, now=now)
        self._kind = kind
        self._target_address = ""
        self.tunnels = tunnels
        protocol = StreamTunnel(_FRAMING[kind], is_client=False, hold_bytes=_HOLD_BYTES)
        self.relay = StreamRelay(tunnels.endpoint, connection, stream_id, protocol, self)
        self.connecting: Connecting | None = None

    @property
    def kind(self) -> TunnelKind:
        """See ``Tunnel``."""
        return self._kind

    @property
    def address(self) -> str:
        """See ``Tunnel``; while it is being reached, the first address to try."""
        if self._target_address or self.grant is None:
            return self._target_address
        return self.grant.addresses[0]

    @property
    def candidates(self) -> tuple[str, ...]:
        """See ``Tunnel``."""
        is_connecting = self.connecting is not None and self.grant is not None
        return self.grant.addresses if is_connecting and self.grant is not None else ()

    @property
    def has_capsules(self) -> bool:
        """See ``Tunnel``."""
        return self._kind is TunnelKind.TCP

    @property
    def offers(self) -> Headers:
        """See ``Tunnel``."""
        return (RENEWAL_FIELD,) if self.has_capsules else ()

    def idle_timeout_s(self, limits: RouterLimits) -> float:
        """See ``Tunnel``."""
        return limits.tcp_idle_timeout_s

    def take_authorization(self) -> str | None:
        """See ``Tunnel``."""
        protocol = self.relay.protocol
        authorization, protocol.authorization = protocol.authorization, None
        return authorization

    def connect(self, grant: Grant, now: float) -> bool:
        """See ``Tunnel``."""
        self.connecting = self.tunnels.connect(self, grant)
        return False

    def connected(self, socket: ByteSocket, address: str, now: float) -> None:
        """The target answered; called by the shell."""
        self._end_attempt()
        self._target_address = address
        self.tunnels.begin(self, socket, now)

    def not_connected(self, error: TargetError, now: float) -> None:
        """No address of the target answered; called by the shell."""
        self._end_attempt()
        self.tunnels.not_connected(self, error, now)

    def _end_attempt(self) -> Connecting | None:
        attempt, self.connecting = self.connecting, None
        if attempt is not None:
            self.tunnels.attempt_ended(self)
        return attempt

    def begin(self, now: float) -> None:
        """See ``Tunnel``; what came before is written when the relay begins."""

    def receive_body(self, event: BodyReceived, now: float) -> bool:
        """See ``Tunnel``; the end of the client's payload is not the end of the tunnel."""
        self.last_active = now
        skipped = self.relay.protocol.skipped
        try:
            self.relay.receive_body(event)
        finally:
            self.tunnels.count_skipped(self.relay.protocol.skipped - skipped)
        return False

    def is_ended_by(self, event: StreamAborted) -> bool:
        """See ``Tunnel``."""
        return self.relay.is_over_with(event)

    def receive_writable(self) -> None:
        """See ``Tunnel``."""
        self.relay.receive_writable()

    def discard_held(self) -> None:
        """See ``Tunnel``; nothing to count: the client was never told that it was taken."""

    def count_losses(self) -> None:
        """See ``Tunnel``; TCP loses nothing."""

    def release(self) -> None:
        """See ``Tunnel``."""
        attempt = self._end_attempt()
        if attempt is not None:
            attempt.cancel()
        self.relay.release()

    # what the relay says

    def moved(self, to_socket: int, to_stream: int) -> None:
        """See ``RelayOwner``."""
        self.bytes_to_target += to_socket
        self.bytes_to_client += to_stream
        self.tunnels.moved(self, to_socket, to_stream)

    def over(self, reason: str, *, in_order: bool) -> None:
        """See ``RelayOwner``."""
        self.tunnels.finished(self, reason if in_order else f"the target broke it off: {reason}")

    def flush(self) -> None:
        """See ``RelayOwner``."""
        self.tunnels.flush()


class TcpTunnels:
    """What all TCP tunnels of a worker share. The router is told of their beginning and end."""

    def __init__(
        self,
        endpoint: Endpoint,
        shell: RouterShell,
        limits: RouterLimits,
        counters: WorkerCounters,
        *,
        connected: Callable[[Tunnel, float], None],
        not_connected: Callable[[Tunnel, TargetError, float], None],
        finished: Callable[[Tunnel, str], None],
    ) -> None:
        self.endpoint = endpoint
        self._shell = shell
        self._limits = limits
        self._counters = counters
        self._connected = connected
        self.not_connected = not_connected
        self.finished = finished
        self.flush = shell.flush
        self.connecting = 0
        """How many targets are being reached."""
        self._connecting_of: Counter[int] = Counter()
        """The same by connection."""

    def new_flow(
        self,
        connection: int,
        stream_id: int,
        kind: TunnelKind,
        request: AdmissionRequest,
        now: float,
    ) -> TcpFlow:
        """For a request that has come. Its stream is read again once the target is reached."""
        self.endpoint.pause_reading(connection, stream_id)
        return TcpFlow(self, connection, stream_id, kind, request, now=now)

    def connect(self, flow: TcpFlow, grant: Grant) -> Connecting:
        """Have the target reached; the shell tells the flow. Raises ``TargetError`` when too many
        have not answered yet.
        """
        limits, connection = self._limits, flow.connection
        if (
            self.connecting >= limits.tcp_max_connecting
            or self._connecting_of[connection] >= limits.tcp_max_connecting_per_connection
        ):
            raise TargetError(
                "too many TCP targets have not answered yet; try again when they have",
                status=429,
                proxy_status="connection_limit_reached",
            )
        attempt = self._shell.connect_tcp(flow, grant, limits.tcp_connect_timeout_s)
        self.connecting += 1
        self._connecting_of[connection] += 1
        return attempt

    def attempt_ended(self, flow: TcpFlow) -> None:
        """The flow's target was reached or not, or is of no interest any more."""
        self.connecting -= 1
        self._connecting_of[flow.connection] -= 1
        if not self._connecting_of[flow.connection]:
            del self._connecting_of[flow.connection]

    def count_skipped(self, capsules: int) -> None:
        """Capsules of unknown types came."""
        self._counters.capsules_skipped += capsules

    def begin(self, flow: TcpFlow, socket: ByteSocket, now: float) -> None:
        """Both sides are there."""
        self.endpoint.widen_connection(flow.connection, CONNECTION_WINDOW_BYTES)
        self._connected(flow, now)
        flow.relay.begin(socket)

    def moved(self, flow: TcpFlow, to_target: int, to_client: int) -> None:
        """Count payload."""
        self._counters.tcp_bytes_to_target += to_target
        self._counters.tcp_bytes_to_client += to_client
        flow.last_active = self._shell.now()
