"""SOCKS5 UDP ASSOCIATE: one program's datagrams, each with its target before the payload, through
the gateway (RFC 1928 section 7). One tunnel per target.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from toppy.client.session import GatewaySession
from toppy.client.tunnel import ClientTunnel, Refusal
from toppy.client.udp_forward import REFUSED_PAUSE_S, ForwardCounters
from toppy.model.drop_reason import DropReason
from toppy.model.rate import UNLIMITED, DirectionLimits, Rate
from toppy.model.target import Target
from toppy.net.udp_socket import SendResult, UdpSocket
from toppy.policy.meter import single_meter
from toppy.policy.ruleset import Decision
from toppy.protocol.udp_tunnel import Buffer, count_payloads
from toppy.quic.engine import Address
from toppy.wire.socks import SocksError, encode_udp_header, parse_udp_datagram

Decide = Callable[[Target], Awaitable[Decision]]

_RECEIVES_PER_WAKE_UP: Final = 16
_TICK_S: Final = 5.0
_HELD_DATAGRAMS: Final = 16
"""Of one target, until the client's policy has decided about it."""


class _Way:
    """To one target."""

    __slots__ = ("header", "held", "last_active", "not_before", "target", "tunnel")

    def __init__(self, target: Target, now: float) -> None:
        self.target = target
        self.header = encode_udp_header(target.host, target.port)
        self.held: list[bytes] | None = []
        """Until it is decided; None: it is."""
        self.tunnel: ClientTunnel | None = None
        self.not_before = now
        """When the gateway may be asked for a tunnel again."""
        self.last_active = now


class SocksUdpRelay:
    """Relays between a program and its targets. ``run`` until cancelled.

    Only datagrams from the program's own address are taken; where it did not say its port, the
    first datagram does.
    """

    def __init__(
        self,
        session: GatewaySession,
        local: UdpSocket,
        program: Address,
        decide: Decide,
        *,
        max_targets: int,
        idle_timeout_s: float,
        rate: Rate = UNLIMITED,
        on_opened: Callable[[Target], None] = lambda _: None,
        on_denied: Callable[[Target, str], None] = lambda _, __: None,
        on_refused: Callable[[Target, Refusal], None] = lambda _, __: None,
        counters: ForwardCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``program``: its address, and its port or 0. ``rate`` is for each direction."""
        self._session = session
        self._tunnels = session.tunnels
        self._local = local
        self._program = program
        self._decide = decide
        self._max_targets = max_targets
        self._idle_timeout_s = idle_timeout_s
        self._on_opened = on_opened
        self._on_denied = on_denied
        self._on_refused = on_refused
        self._clock = clock
        self._meter = single_meter(DirectionLimits(bytes=rate), clock())
        # least recently active first
        self._ways: OrderedDict[Target, _Way] = OrderedDict()
        self._deciding: asyncio.TaskGroup | None = None
        self.counters = counters if counters is not None else ForwardCounters()
        self.drops: dict[DropReason, int] = {}

    @property
    def targets(self) -> int:
        """That are known now."""
        return len(self._ways)

    async def run(self) -> None:
        """Relay; targets that are idle are forgotten."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as self._deciding:
                loop.add_reader(self._local.fileno(), self.receive)
                while True:
                    await asyncio.sleep(min(_TICK_S, self._idle_timeout_s))
                    self.reap()
                    self._tunnels.retry_waiting()
                    self._session.flush_soon()
        finally:
            loop.remove_reader(self._local.fileno())
            for way in self._ways.values():
                if way.tunnel is not None:
                    self._tunnels.remove(way.tunnel)
            self._ways.clear()
            self._session.flush_soon()

    def reap(self) -> None:
        """Forget targets that were silent, in both directions, for the idle timeout."""
        now = self._clock()
        while self._ways:
            target, way = next(iter(self._ways.items()))
            if now - way.last_active < self._idle_timeout_s:
                return
            del self._ways[target]
            if way.tunnel is not None:
                self._tunnels.remove(way.tunnel)

    def receive(self) -> None:
        """Take what the program has sent; the local socket is readable."""
        now = self._clock()
        for _ in range(_RECEIVES_PER_WAKE_UP):
            batch = self._local.receive()
            if batch is None:
                break
            payloads, segment_size, source = batch
            if not self._is_program(source):
                self._drop(DropReason.TOO_MANY_PEERS, count_payloads(len(payloads), segment_size))
                continue
            size = segment_size or len(payloads) or 1
            for start in range(0, max(len(payloads), 1), size):
                self._receive_one(bytes(payloads[start : start + size]), source, now)
        self._session.flush_soon()

    def _is_program(self, source: Address) -> bool:
        host, port = self._program
        return source[0] == host and port in (0, source[1])

    def _receive_one(self, data: bytes, source: Address, now: float) -> None:
        try:
            datagram = parse_udp_datagram(data)
        except SocksError:
            self._drop(DropReason.MALFORMED, 1)
            return
        self._program = source
        target = datagram.target
        way = self._ways.get(target)
        if way is None:
            if len(self._ways) >= self._max_targets or self._deciding is None:
                self._drop(DropReason.TOO_MANY_PEERS, 1)
                return
            way = self._ways[target] = _Way(target, now)
            self._deciding.create_task(self._decide_about(way))
        else:
            self._ways.move_to_end(target)
            way.last_active = now
        payload = bytes(datagram.payload)
        if way.held is None:
            self._send(way, payload, now)
        elif len(way.held) < _HELD_DATAGRAMS:
            way.held.append(payload)
        else:
            self._drop(DropReason.NO_CONNECTION, 1)

    async def _decide_about(self, way: _Way) -> None:
        decision = await self._decide(way.target)
        if self._ways.get(way.target) is not way:
            return
        held, way.held = way.held or [], None
        now = self._clock()
        if not decision.is_allowed:
            # asked again when the program still sends then: the policy has times, names move
            way.not_before = now + self._idle_timeout_s
            self._drop(DropReason.TUNNEL_REFUSED, len(held))
            self._on_denied(way.target, decision.reason)
            return
        self._on_opened(way.target)
        for payload in held:
            self._send(way, payload, now)
        self._session.flush_soon()

    def _send(self, way: _Way, payload: bytes, now: float) -> None:
        if way.tunnel is None:
            if now < way.not_before:
                self._drop(DropReason.TUNNEL_REFUSED, 1)
                return
            self._open(way, now)
        assert way.tunnel is not None
        lane = self._meter.to_target if self._meter is not None else None
        if lane is not None and not lane.take_datagrams(len(payload), 0, now):
            self._drop(DropReason.RATE_LIMITED, 1)
            return
        self.counters.from_peers += 1
        self.counters.from_peers_bytes += len(payload)
        self._tunnels.send(way.tunnel, payload, 0)

    def _open(self, way: _Way, now: float) -> None:
        way.not_before = now + REFUSED_PAUSE_S

        def deliver(payloads: Buffer, segment_size: int) -> None:
            self._deliver(way, payloads, segment_size)

        def ended(refusal: Refusal | None) -> None:
            way.tunnel = None
            if refusal is not None:
                way.not_before = self._clock() + REFUSED_PAUSE_S
                self._on_refused(way.target, refusal)

        way.tunnel = ClientTunnel(way.target, deliver, ended)
        self._tunnels.add(way.tunnel)

    def _deliver(self, way: _Way, payloads: Buffer, segment_size: int) -> None:
        now = way.last_active = self._clock()
        if way.target in self._ways:
            self._ways.move_to_end(way.target)
        lane = self._meter.to_client if self._meter is not None else None
        if lane is not None:
            granted, over, payloads = lane.take_payloads(payloads, segment_size, now)
            self._drop(DropReason.RATE_LIMITED, over)
            if not granted:
                return
        size = segment_size or len(payloads)
        pieces = [payloads[start : start + size] for start in range(0, len(payloads), size or 1)]
        pieces = pieces or [b""]
        data = b"".join(part for piece in pieces for part in (way.header, piece))
        step = len(way.header) + size if len(pieces) > 1 else 0
        if self._local.send(data, step, self._program) is SendResult.SENT:
            self.counters.to_peers += len(pieces)
            self.counters.to_peers_bytes += len(payloads)
        else:
            self._drop(DropReason.LOCAL_BUFFER_FULL, len(pieces))

    def _drop(self, reason: DropReason, count: int) -> None:
        if count:
            self.drops[reason] = self.drops.get(reason, 0) + count
