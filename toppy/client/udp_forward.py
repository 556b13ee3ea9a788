"""``toppy udp``: a local UDP port whose datagrams reach one target through the gateway.

One tunnel per local peer; what the target sends comes back to that peer and to no other (T-070).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from toppy.client.session import GatewaySession
from toppy.client.tunnel import ClientTunnel, Refusal
from toppy.model.drop_reason import DropReason
from toppy.model.rate import UNLIMITED, DirectionLimits, Rate
from toppy.model.target import Target
from toppy.net.udp_socket import BUSY_S, SendResult, UdpSocket
from toppy.policy.meter import Lane, Meter, single_meter
from toppy.protocol.udp_tunnel import Buffer, count_payloads
from toppy.quic.engine import Address

_RECEIVES_PER_WAKE_UP = 16
_TICK_S = 5.0
REFUSED_PAUSE_S = 1.0
"""After a refusal, before the same peer's next datagram asks the gateway again."""


@dataclass(slots=True)
class ForwardCounters:
    """What went through, in datagrams and payload bytes."""

    peers_total: int = 0
    from_peers: int = 0
    from_peers_bytes: int = 0
    to_peers: int = 0
    to_peers_bytes: int = 0


class _Peer:
    """A local program's source address, and its tunnel."""

    __slots__ = ("address", "last_active", "meter", "not_before", "tunnel")

    def __init__(self, address: Address, now: float, meter: Meter | None) -> None:
        self.address = address
        self.last_active = now
        self.meter = meter
        self.not_before = now
        """When the gateway may be asked for a tunnel again."""
        self.tunnel: ClientTunnel | None = None


class UdpForward:
    """Relays between one local socket and one target. ``run`` until cancelled."""

    def __init__(
        self,
        session: GatewaySession,
        local: UdpSocket,
        target: Target,
        *,
        max_peers: int,
        idle_timeout_s: float,
        rate: Rate = UNLIMITED,
        on_refused: Callable[[Refusal], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rate`` is each local peer's, in each direction; what is over it is dropped."""
        self._clock = clock
        self._session = session
        self._tunnels = session.tunnels
        self._local = local
        self._target = target
        self._max_peers = max_peers
        self._idle_timeout_s = idle_timeout_s
        self._limits = DirectionLimits(bytes=rate)
        self._on_refused = on_refused
        # least recently active first, so that reaping looks at few
        self._peers: OrderedDict[Address, _Peer] = OrderedDict()
        self._called_at = 0.0
        self.counters = ForwardCounters()
        self.drops: dict[DropReason, int] = {}

    @property
    def peers(self) -> int:
        """Local peers that were active within the idle timeout."""
        return len(self._peers)

    async def run(self) -> None:
        """Relay; idle peers are forgotten."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._local.fileno(), self.receive)
        try:
            while True:
                await asyncio.sleep(min(_TICK_S, self._idle_timeout_s))
                self.reap()
                self._tunnels.retry_waiting()
                self._session.flush_soon()
        finally:
            loop.remove_reader(self._local.fileno())
            for peer in self._peers.values():
                if peer.tunnel is not None:
                    self._tunnels.remove(peer.tunnel)
            self._peers.clear()
            self._session.flush_soon()

    def reap(self) -> None:
        """Forget peers that have been silent, in both directions, for the idle timeout."""
        now = self._clock()
        while self._peers:
            address, peer = next(iter(self._peers.items()))
            if now - peer.last_active < self._idle_timeout_s:
                return
            del self._peers[address]
            if peer.tunnel is not None:
                self._tunnels.remove(peer.tunnel)
                self._session.flush_soon()

    def receive(self) -> None:
        """Take what local peers have sent; the local socket is readable."""
        now = self._clock()
        is_busy = now - self._called_at < BUSY_S
        self._called_at = now
        for _ in range(_RECEIVES_PER_WAKE_UP if is_busy else 1):
            batch = self._local.receive()
            if batch is None:
                break
            self._send(batch[0], batch[1], batch[2], now)
        self._session.flush_soon()

    def _send(self, payloads: Buffer, segment_size: int, source: Address, now: float) -> None:
        count = count_payloads(len(payloads), segment_size)
        peer = self._peers.get(source)
        if peer is None:
            if len(self._peers) >= self._max_peers:
                self._drop(DropReason.TOO_MANY_PEERS, count)
                return
            peer = _Peer(source, now, single_meter(self._limits, now))
            self._peers[source] = peer
            self.counters.peers_total += 1
        else:
            self._peers.move_to_end(source)
        peer.last_active = now
        if peer.tunnel is None:
            if now < peer.not_before:
                self._drop(DropReason.TUNNEL_REFUSED, count)
                return
            self._open(peer, now)
        if peer.meter is not None and peer.meter.to_target is not None:
            lane = peer.meter.to_target
            count, payloads = self._charge(lane, payloads, segment_size, now)
            if not count:
                return
        assert peer.tunnel is not None
        self.counters.from_peers += count
        self.counters.from_peers_bytes += len(payloads)
        self._tunnels.send(peer.tunnel, payloads, segment_size)

    def _open(self, peer: _Peer, now: float) -> None:
        # a tunnel that the gateway ends at once must not be asked for with every datagram
        peer.not_before = now + REFUSED_PAUSE_S

        def deliver(payloads: Buffer, segment_size: int) -> None:
            self._deliver(peer, payloads, segment_size)

        def ended(refusal: Refusal | None) -> None:
            peer.tunnel = None
            if refusal is not None:
                peer.not_before = self._clock() + REFUSED_PAUSE_S
                self._on_refused(refusal)

        peer.tunnel = ClientTunnel(self._target, deliver, ended)
        self._tunnels.add(peer.tunnel)

    def _deliver(self, peer: _Peer, payloads: Buffer, segment_size: int) -> None:
        now = peer.last_active = self._clock()
        self._peers.move_to_end(peer.address)
        count = count_payloads(len(payloads), segment_size)
        if peer.meter is not None and peer.meter.to_client is not None:
            lane = peer.meter.to_client
            count, payloads = self._charge(lane, payloads, segment_size, now)
            if not count:
                return
        size = len(payloads)
        if self._local.send(payloads, segment_size, peer.address) is not SendResult.SENT:
            size = self._local.sent_bytes
            sent = size // segment_size if segment_size else 0
            self._drop(DropReason.LOCAL_BUFFER_FULL, count - sent)
            count = sent
        self.counters.to_peers += count
        self.counters.to_peers_bytes += size

    def _charge(
        self, lane: Lane, payloads: Buffer, segment_size: int, now: float
    ) -> tuple[int, Buffer]:
        """How many datagrams of a stretch may go, and these; the others are dropped."""
        granted, over, payloads = lane.take_payloads(payloads, segment_size, now)
        if over:
            self._drop(DropReason.RATE_LIMITED, over)
        return granted, payloads

    def _drop(self, reason: DropReason, count: int) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + count
