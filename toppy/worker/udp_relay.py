"""The payloads of UDP tunnels, between HTTP Datagrams or capsules and target sockets."""

from __future__ import annotations

from toppy.model.counters import WorkerCounters
from toppy.model.drop_reason import DropReason
from toppy.model.grant import Grant
from toppy.net.udp_socket import SendResult
from toppy.policy.meter import Lane
from toppy.protocol.udp_tunnel import (
    Buffer,
    UdpTunnel,
    count_payloads,
    encode_datagram_capsules,
)
from toppy.quic.endpoint import BodyReceived, Endpoint
from toppy.quic.h3 import Headers
from toppy.wire.capsule import BARRIER_FIELD, MOST_BARRIERS, RENEWAL_FIELD, encode_barrier
from toppy.wire.ipc_message import AdmissionRequest
from toppy.wire.tunnel_request import TunnelKind
from toppy.worker.tunnel import Peer, RouterLimits, RouterShell, TargetSocket, Tunnel

_EARLY_STREAMS = 16
"""Of how many requests that are still on their way one connection's datagrams are held."""

_DROP_REASON = {
    SendResult.WOULD_BLOCK: DropReason.TARGET_BUFFER_FULL,
    SendResult.UNREACHABLE: DropReason.TARGET_UNREACHABLE,
    SendResult.TOO_LARGE: DropReason.TOO_LARGE_FOR_TARGET,
    SendResult.FAILED: DropReason.TARGET_UNREACHABLE,
}


class UdpFlow(Tunnel):
    """A UDP tunnel."""

    __slots__ = (
        "barriers_answered",
        "capsules_only",
        "overflow",
        "protocol",
        "relay",
        "target",
    )

    def __init__(
        self,
        relay: UdpRelay,
        connection: int,
        stream_id: int,
        protocol: UdpTunnel,
        request: AdmissionRequest,
        *,
        now: float,
    ) -> None:
        super().__init__(connection, stream_id, request, now=now)
        self.relay = relay
        self.protocol = protocol
        self.target: TargetSocket | None = None
        self.capsules_only = False
        self.overflow = 0
        self.barriers_answered = 0

    @property
    def kind(self) -> TunnelKind:
        """See ``Tunnel``."""
        return TunnelKind.UDP

    @property
    def address(self) -> str:
        """See ``Tunnel``."""
        return self.target.address if self.target is not None else ""

    @property
    def has_capsules(self) -> bool:
        """See ``Tunnel``."""
        return True

    @property
    def offers(self) -> Headers:
        """See ``Tunnel``."""
        return (BARRIER_FIELD, RENEWAL_FIELD)

    def idle_timeout_s(self, limits: RouterLimits) -> float:
        """See ``Tunnel``."""
        return limits.tunnel_idle_timeout_s

    def take_authorization(self) -> str | None:
        """See ``Tunnel``."""
        authorization, self.protocol.authorization = self.protocol.authorization, None
        return authorization

    def connect(self, grant: Grant, now: float) -> bool:
        """See ``Tunnel``."""
        self.relay.connect(self, grant)
        return True

    def begin(self, now: float) -> None:
        """See ``Tunnel``."""
        self.relay.begin(self, now)

    def receive_body(self, event: BodyReceived, now: float) -> bool:
        """See ``Tunnel``."""
        self.relay.receive_body(self, event, now)
        return event.ended

    def discard_held(self) -> None:
        """See ``Tunnel``."""
        self.relay.discard_held(self)

    def count_losses(self) -> None:
        """See ``Tunnel``."""
        self.relay.count_overflow(self)

    def release(self) -> None:
        """See ``Tunnel``."""
        if self.target is not None:
            self.relay.count_overflow(self)
            self.target.close()


class UdpRelay:
    """Moves payloads of tunnels that the router keeps; counts what goes through and what is lost.

    ``tunnels`` and ``peers`` are the router's own: read here, changed there.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        shell: RouterShell,
        limits: RouterLimits,
        counters: WorkerCounters,
        *,
        tunnels: dict[tuple[int, int], Tunnel],
        peers: dict[int, Peer],
    ) -> None:
        self._endpoint = endpoint
        self._engine = endpoint.engine
        self._shell = shell
        self._limits = limits
        self._counters = counters
        self._tunnels = tunnels
        self._peers = peers
        self._early_peers: set[int] = set()
        self._unanswered_barriers: list[UdpFlow] = []

    # before a tunnel is open

    def new_flow(
        self, peer: Peer, connection: int, stream_id: int, request: AdmissionRequest, now: float
    ) -> UdpFlow:
        """For a request that has come: what overtook it is its own."""
        protocol = peer.early.pop(stream_id // 4, None) or self._new_protocol()
        return UdpFlow(self, connection, stream_id, protocol, request, now=now)

    def connect(self, tunnel: UdpFlow, grant: Grant) -> None:
        """Open the target's socket. Raises ``TargetError``."""
        if not grant.is_echo:
            tunnel.target = self._shell.open_udp(tunnel, grant)
        tunnel.capsules_only = not self._endpoint.may_send_datagrams(tunnel.connection)

    def begin(self, tunnel: UdpFlow, now: float) -> None:
        """What came before the grant goes to the target."""
        for payloads, segment_size in tunnel.protocol.open():
            self._send_to_target(tunnel, payloads, segment_size, now)

    def discard_held(self, tunnel: UdpFlow) -> None:
        """What came before the denial is dropped."""
        for payloads, segment_size in tunnel.protocol.discard_held():
            self._drop(DropReason.TUNNEL_REFUSED, count_payloads(len(payloads), segment_size))

    def forget_early(self) -> None:
        """Requests that have not come by now, with their datagrams ahead of them, were lost."""
        for connection in self._early_peers:
            peer = self._peers.get(connection)
            if peer is not None:
                self.drop_early(peer)
        self._early_peers.clear()

    def drop_early(self, peer: Peer) -> None:
        """Its connection has ended, or the requests of these datagrams never came."""
        for held in peer.early.values():
            for payloads, segment_size in held.discard_held():
                self._drop(DropReason.UNKNOWN_STREAM, count_payloads(len(payloads), segment_size))
        peer.early.clear()

    def _hold_early(
        self, connection: int, quarter_stream_id: int, payloads: bytes, segment_size: int
    ) -> None:
        """Datagrams without a tunnel: their request may be on its way (RFC 9297 section 2.1)."""
        peer = self._peers.get(connection)
        if peer is None or quarter_stream_id <= peer.newest_request:
            count = count_payloads(len(payloads), segment_size)
            self._drop(DropReason.UNKNOWN_STREAM, count)
            return
        held = peer.early.get(quarter_stream_id)
        if held is None:
            if len(peer.early) >= _EARLY_STREAMS:
                count = count_payloads(len(payloads), segment_size)
                self._drop(DropReason.EARLY_QUEUE_FULL, count)
                return
            held = peer.early[quarter_stream_id] = self._new_protocol()
            self._early_peers.add(connection)
        self._drop(DropReason.EARLY_QUEUE_FULL, held.hold(payloads, segment_size))

    def _new_protocol(self) -> UdpTunnel:
        return UdpTunnel(
            hold_datagrams=self._limits.early_datagrams_per_tunnel,
            hold_bytes=self._limits.early_bytes_per_tunnel,
        )

    # from the client

    def pump(self, now: float) -> None:
        """Take every datagram that the endpoint has."""
        for (
            connection,
            quarter_stream_id,
            payloads,
            segment_size,
        ) in self._endpoint.poll_datagrams():
            tunnel = self._tunnels.get((connection, quarter_stream_id))
            if tunnel is None:
                self._hold_early(connection, quarter_stream_id, payloads, segment_size)
            elif not isinstance(tunnel, UdpFlow):
                count = count_payloads(len(payloads), segment_size)
                self._drop(DropReason.UNKNOWN_STREAM, count)
            elif not tunnel.is_open:
                dropped = tunnel.protocol.hold(payloads, segment_size)
                self._drop(DropReason.EARLY_QUEUE_FULL, dropped)
            else:
                self._send_to_target(tunnel, payloads, segment_size, now)
        if self._unanswered_barriers:
            self._answer_barriers()

    def receive_body(self, tunnel: UdpFlow, event: BodyReceived, now: float) -> None:
        """Capsules of the request stream. Raises ``PeerError`` when they are none."""
        protocol = tunnel.protocol
        unknown_before = protocol.unknown_contexts
        payloads = protocol.receive_body(event.data, ended=event.ended)
        self._drop(DropReason.UNKNOWN_CONTEXT, protocol.unknown_contexts - unknown_before)
        self._counters.capsules_received += len(payloads)
        for payload in payloads:
            if not tunnel.is_open:
                self._drop(DropReason.EARLY_QUEUE_FULL, protocol.hold(payload, len(payload)))
            else:
                self._send_to_target(tunnel, payload, len(payload), now)
        if tunnel.barriers_answered < min(protocol.barriers, MOST_BARRIERS):
            tunnel.barriers_answered += 1
            self._unanswered_barriers.append(tunnel)

    def _answer_barriers(self) -> None:
        """What came before them, in the same packets too, has gone to the targets by now."""
        for tunnel in self._unanswered_barriers:
            if tunnel.is_open:
                self._endpoint.send_body(tunnel.connection, tunnel.stream_id, encode_barrier())
        self._unanswered_barriers.clear()

    def _send_to_target(
        self, tunnel: UdpFlow, payloads: Buffer, segment_size: int, now: float
    ) -> None:
        counters = self._counters
        count = count_payloads(len(payloads), segment_size)
        tunnel.last_active = now
        if tunnel.meter is not None and tunnel.meter.to_target is not None:
            count, payloads = self._charge(
                tunnel, tunnel.meter.to_target, payloads, segment_size, now
            )
            if not count:
                return
        if tunnel.target is None:  # echo
            counters.datagrams_to_target += count
            counters.bytes_to_target += len(payloads)
            self.receive_from_target(tunnel, payloads, segment_size, now)
            return
        target = tunnel.target
        result = target.send(payloads, segment_size)
        sent = len(payloads)
        if result is SendResult.UNREACHABLE and not target.sent_bytes:
            # the error belongs to an earlier datagram (ICMP); this one was not sent yet
            result = target.send(payloads, segment_size)
        if result is not SendResult.SENT:
            sent = target.sent_bytes
            unsent = count - (sent // segment_size if segment_size else 0)
            self._drop(_DROP_REASON[result], unsent)
            tunnel.drops += unsent
            count -= unsent
        counters.datagrams_to_target += count
        counters.bytes_to_target += sent
        tunnel.datagrams_to_target += count
        tunnel.bytes_to_target += sent

    # from the target

    def receive_from_target(
        self, tunnel: UdpFlow, payloads: Buffer, segment_size: int, now: float
    ) -> None:
        """What a target socket received: on to the client."""
        count = count_payloads(len(payloads), segment_size)
        tunnel.last_active = now
        if tunnel.meter is not None and tunnel.meter.to_client is not None:
            count, payloads = self._charge(
                tunnel, tunnel.meter.to_client, payloads, segment_size, now
            )
            if not count:
                return
        connection, quarter_stream_id = tunnel.connection, tunnel.stream_id // 4
        largest = segment_size or len(payloads)
        if not tunnel.capsules_only and largest <= self._engine.max_payload_bytes(
            connection, quarter_stream_id
        ):
            self._engine.send_datagrams(connection, quarter_stream_id, payloads, segment_size)
        else:
            backlog = self._engine.stream_backlog_bytes(connection, tunnel.stream_id)
            if (
                backlog + len(payloads) > self._limits.capsule_queue_bytes
                or self._capsule_backlog(connection) + len(payloads)
                > self._limits.connection_capsule_queue_bytes
            ):
                self._drop(DropReason.CAPSULE_QUEUE_FULL, count)
                tunnel.drops += count
                return
            capsules = encode_datagram_capsules(payloads, segment_size)
            self._endpoint.send_body(connection, tunnel.stream_id, capsules)
            self._counters.capsules_sent += count
        self._counters.datagrams_to_client += count
        self._counters.bytes_to_client += len(payloads)
        tunnel.datagrams_to_client += count
        tunnel.bytes_to_client += len(payloads)

    def _charge(
        self, tunnel: UdpFlow, lane: Lane, payloads: Buffer, segment_size: int, now: float
    ) -> tuple[int, Buffer]:
        """How many datagrams of a stretch may go, and these; the others are dropped."""
        granted, over, payloads = lane.take_payloads(payloads, segment_size, now)
        if over:
            reason = DropReason.QUOTA_USED_UP if lane.is_spent else DropReason.RATE_LIMITED
            self._drop(reason, over)
            tunnel.drops += over
            tunnel.rate_limited += over
        return granted, payloads

    def _capsule_backlog(self, connection: int) -> int:
        """What waits on the streams of a connection's UDP tunnels, in bytes."""
        return sum(
            self._engine.stream_backlog_bytes(connection, tunnel.stream_id)
            for tunnel in self._peers[connection].tunnels
            if isinstance(tunnel, UdpFlow)
        )

    def _drop(self, reason: DropReason, count: int) -> None:
        if count:
            self._counters.count_drop(reason, count)

    def count_overflow(self, tunnel: UdpFlow) -> None:
        """What the kernel has dropped at the target's socket since the last call."""
        if tunnel.target is not None:
            overflow = tunnel.target.overflow
            self._drop(DropReason.TARGET_OVERFLOW, overflow - tunnel.overflow)
            tunnel.drops += overflow - tunnel.overflow
            tunnel.overflow = overflow
