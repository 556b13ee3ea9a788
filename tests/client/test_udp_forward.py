"""From local peers to tunnels and back, in virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import cast

import pytest

from tests.client.world import TARGET, World
from tests.quic.link import split
from toppy.client.session import GatewaySession
from toppy.client.tunnel import Refusal
from toppy.client.udp_forward import REFUSED_PAUSE_S, UdpForward
from toppy.model.drop_reason import DropReason
from toppy.model.rate import UNLIMITED, Rate
from toppy.net.udp_socket import BUSY_S, SendResult, UdpSocket
from toppy.protocol.udp_tunnel import Buffer, encode_datagram_capsules
from toppy.quic.endpoint import BodyReceived
from toppy.quic.engine import Address
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.connect_udp import response_headers

ALICE: Address = ("127.0.0.1", 40001)
BOB: Address = ("127.0.0.1", 40002)
CAROL: Address = ("127.0.0.1", 40003)
IDLE_S = 10.0
"""Shorter than the idle timeout of the connection below."""


class LocalSocket:
    """The local port, as ``UdpForward`` uses it."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[bytes, int, Address]] = deque()
        self.sent: list[tuple[Address, bytes]] = []
        self.result = SendResult.SENT
        self.sent_bytes = 0

    def receive(self) -> tuple[memoryview, int, Address] | None:
        if not self.waiting:
            return None
        payloads, size, source = self.waiting.popleft()
        return memoryview(payloads), size, source

    def send(self, payloads: Buffer, segment_size: int, address: Address) -> SendResult:
        size = len(payloads) if self.result is SendResult.SENT else self.sent_bytes
        if size or not payloads:
            self.sent += [(address, p) for p in split(bytes(payloads)[:size], segment_size)]
        return self.result


class Session:
    """What ``UdpForward`` needs of a session: the tunnels."""

    def __init__(self, world: World) -> None:
        self.tunnels = world.tunnels
        self.flushes = 0

    def flush_soon(self) -> None:
        self.flushes += 1


class Forwarding:
    """A world with a local port in front of its tunnels."""

    def __init__(
        self,
        *,
        max_peers: int = 8,
        streams: int = 10,
        is_connected: bool = True,
        rate: Rate = UNLIMITED,
    ) -> None:
        self.world = World(streams=streams)
        if is_connected:
            self.world.connect()
        self.local = LocalSocket()
        self.session = Session(self.world)
        self.refusals: list[Refusal] = []
        self.forward = UdpForward(
            cast(GatewaySession, self.session),
            cast(UdpSocket, self.local),
            TARGET,
            max_peers=max_peers,
            idle_timeout_s=IDLE_S,
            rate=rate,
            on_refused=self.refusals.append,
            clock=lambda: self.world.now,
        )

    def says(self, peer: Address, payloads: bytes, segment_size: int = 0) -> None:
        """A local program sends; what follows from it happens."""
        self.local.waiting.append((payloads, segment_size, peer))
        self.forward.receive()
        self.world.run()

    def open(self, peer: Address) -> int:
        """A peer with an open tunnel; which request it is."""
        self.says(peer, b"hello")
        self.world.accept()
        return len(self.world.requests) - 1

    def reply(self, index: int, payloads: bytes, segment_size: int = 0) -> None:
        """The target answers through the tunnel of a request."""
        request = self.world.requests[index]
        self.world.gateway.engine.send_datagrams(
            request.connection, request.stream_id // 4, payloads, segment_size
        )
        self.world.run()

    def refuse(self, index: int = -1, status: int = 403) -> None:
        request = self.world.requests[index]
        headers = response_headers(status)
        self.world.gateway.send_headers(request.connection, request.stream_id, headers, end=True)
        self.world.run()

    def end(self, index: int = -1) -> None:
        """The gateway ends a tunnel."""
        request = self.world.requests[index]
        self.world.gateway.send_body(request.connection, request.stream_id, b"", end=True)
        self.world.run()


@pytest.fixture
def forwarding() -> Forwarding:
    return Forwarding()


def test_each_local_peer_has_a_tunnel_of_its_own(forwarding: Forwarding) -> None:
    for peer in (ALICE, BOB, ALICE, BOB):
        forwarding.says(peer, b"x")
    assert len(forwarding.world.requests) == 2
    assert forwarding.forward.peers == 2


def test_a_reply_goes_to_the_peer_whose_tunnel_it_came_through(forwarding: Forwarding) -> None:
    alice, bob = forwarding.open(ALICE), forwarding.open(BOB)
    forwarding.says(BOB, b"bob was last to speak")
    forwarding.reply(alice, b"aabbc", 2)
    forwarding.reply(bob, b"")
    assert forwarding.local.sent == [(ALICE, b"aa"), (ALICE, b"bb"), (ALICE, b"c"), (BOB, b"")]


def test_datagrams_and_bytes_are_counted_in_both_directions(forwarding: Forwarding) -> None:
    alice = forwarding.open(ALICE)
    forwarding.says(ALICE, b"aabbc", 2)
    forwarding.reply(alice, b"ddee", 2)
    counters = forwarding.forward.counters
    assert (counters.from_peers, counters.from_peers_bytes) == (4, 10)
    assert (counters.to_peers, counters.to_peers_bytes) == (2, 4)
    assert counters.peers_total == 1
    assert forwarding.forward.drops == {}


def test_a_wake_up_takes_what_came_and_the_next_one_soon_after_all_that_waits(
    forwarding: Forwarding,
) -> None:
    forwarding.open(ALICE)
    forwarding.world.now += 10 * BUSY_S
    forwarding.local.waiting += [(b"%d" % number, 0, ALICE) for number in range(4)]
    forwarding.forward.receive()
    assert len(forwarding.local.waiting) == 3
    forwarding.world.now += BUSY_S / 2
    forwarding.forward.receive()
    assert not forwarding.local.waiting
    forwarding.world.run()
    assert forwarding.world.arrived == [b"hello", b"0", b"1", b"2", b"3"]


def test_a_peer_beyond_the_limit_is_dropped_and_counted() -> None:
    forwarding = Forwarding(max_peers=2)
    for peer in (ALICE, BOB):
        forwarding.says(peer, b"x")
    forwarding.says(CAROL, b"abc", 1)
    assert len(forwarding.world.requests) == 2
    assert forwarding.forward.drops == {DropReason.TOO_MANY_PEERS: 3}


def test_a_silent_peer_is_forgotten_and_its_tunnel_ended(forwarding: Forwarding) -> None:
    forwarding.open(ALICE)
    forwarding.world.now += IDLE_S
    forwarding.forward.reap()
    forwarding.world.run()
    assert forwarding.forward.peers == 0
    ends = [e for e in forwarding.world.events if isinstance(e, BodyReceived) and e.ended]
    assert len(ends) == 1


def test_only_the_silent_peer_is_forgotten(forwarding: Forwarding) -> None:
    forwarding.open(ALICE)
    forwarding.open(BOB)
    forwarding.world.now += IDLE_S / 2
    forwarding.says(ALICE, b"still here")
    forwarding.world.now += IDLE_S / 2
    forwarding.forward.reap()
    assert forwarding.forward.peers == 1
    forwarding.says(ALICE, b"x")
    assert len(forwarding.world.requests) == 2


def test_what_the_target_sends_keeps_a_peer_too(forwarding: Forwarding) -> None:
    alice = forwarding.open(ALICE)
    forwarding.world.now += IDLE_S / 2
    forwarding.reply(alice, b"news")
    forwarding.world.now += IDLE_S / 2
    forwarding.forward.reap()
    assert forwarding.forward.peers == 1


def test_a_forgotten_peer_that_speaks_again_gets_a_new_tunnel(forwarding: Forwarding) -> None:
    forwarding.open(ALICE)
    forwarding.world.now += IDLE_S
    forwarding.forward.reap()
    again = forwarding.open(ALICE)
    assert again == 1
    forwarding.reply(again, b"welcome back")
    assert forwarding.local.sent == [(ALICE, b"welcome back")]
    assert forwarding.forward.counters.peers_total == 2


def test_after_a_refusal_the_gateway_is_asked_again_only_after_a_pause(
    forwarding: Forwarding,
) -> None:
    forwarding.says(ALICE, b"x")
    forwarding.refuse()
    assert [refusal.status for refusal in forwarding.refusals] == [403]
    forwarding.says(ALICE, b"yz", 1)
    assert len(forwarding.world.requests) == 1
    assert forwarding.forward.drops == {DropReason.TUNNEL_REFUSED: 2}
    forwarding.world.now += REFUSED_PAUSE_S
    forwarding.says(ALICE, b"x")
    assert len(forwarding.world.requests) == 2


def test_a_refusal_of_one_peer_does_not_pause_another(forwarding: Forwarding) -> None:
    forwarding.says(ALICE, b"x")
    forwarding.refuse()
    forwarding.says(BOB, b"x")
    assert len(forwarding.world.requests) == 2


def test_a_tunnel_that_the_gateway_ends_is_asked_for_again_by_the_next_datagram(
    forwarding: Forwarding,
) -> None:
    alice = forwarding.open(ALICE)
    forwarding.world.now += REFUSED_PAUSE_S
    forwarding.end(alice)
    assert forwarding.refusals == []
    again = forwarding.open(ALICE)
    forwarding.reply(again, b"back")
    assert forwarding.local.sent == [(ALICE, b"back")]


def test_a_gateway_that_ends_tunnels_at_once_is_asked_once_in_a_while(
    forwarding: Forwarding,
) -> None:
    forwarding.end(forwarding.open(ALICE))
    for _ in range(5):
        forwarding.says(ALICE, b"x")
    assert len(forwarding.world.requests) == 1
    assert forwarding.forward.drops == {DropReason.TUNNEL_REFUSED: 5}


def test_after_a_reconnect_every_peer_has_its_tunnel_and_what_was_held_arrives(
    forwarding: Forwarding,
) -> None:
    world = forwarding.world
    forwarding.open(ALICE)
    forwarding.open(BOB)
    world.gateway.close(world.requests[0].connection, H3_NO_ERROR, "restart", world.now)
    world.run()
    assert world.lost == ["restart"]
    forwarding.says(ALICE, b"from alice")
    forwarding.says(BOB, b"from bob")
    world.arrived.clear()
    world.connect()
    assert len(world.requests) == 4
    for index in (2, 3):
        world.accept(index)
    assert sorted(world.arrived) == [b"from alice", b"from bob"]
    forwarding.reply(2, b"to alice")
    forwarding.reply(3, b"to bob")
    assert forwarding.local.sent == [(ALICE, b"to alice"), (BOB, b"to bob")]


def test_what_is_said_before_the_first_connection_arrives() -> None:
    forwarding = Forwarding(is_connected=False)
    forwarding.says(ALICE, b"early")
    forwarding.world.connect()
    forwarding.world.accept()
    assert forwarding.world.arrived == [b"early"]


def test_beyond_the_stream_limit_a_peer_waits_until_another_is_forgotten() -> None:
    forwarding = Forwarding(streams=1)
    forwarding.open(ALICE)
    forwarding.world.now += IDLE_S / 2
    forwarding.says(BOB, b"patient")
    assert len(forwarding.world.requests) == 1
    forwarding.world.now += IDLE_S / 2
    forwarding.forward.reap()
    forwarding.world.run()
    forwarding.end(0)
    forwarding.world.tunnels.retry_waiting()
    forwarding.world.run()
    forwarding.world.accept()
    assert forwarding.world.arrived == [b"hello", b"patient"]


def test_a_large_payload_travels_as_a_capsule_both_ways(forwarding: Forwarding) -> None:
    alice = forwarding.open(ALICE)
    forwarding.says(ALICE, bytes(20_000))
    body = [e for e in forwarding.world.events if isinstance(e, BodyReceived)]
    assert sum(len(e.data) for e in body) > 20_000
    request = forwarding.world.requests[alice]
    capsule = encode_datagram_capsules(bytes(30_000), 0)
    forwarding.world.gateway.send_body(request.connection, request.stream_id, capsule)
    forwarding.world.run()
    assert forwarding.local.sent == [(ALICE, bytes(30_000))]


@pytest.mark.parametrize("result", [SendResult.WOULD_BLOCK, SendResult.UNREACHABLE])
def test_what_the_local_socket_does_not_take_is_counted(
    forwarding: Forwarding, result: SendResult
) -> None:
    alice = forwarding.open(ALICE)
    forwarding.local.result, forwarding.local.sent_bytes = result, 4
    forwarding.reply(alice, b"aabbccd", 2)
    assert [payload for _, payload in forwarding.local.sent] == [b"aa", b"bb"]
    assert forwarding.forward.counters.to_peers == 2
    assert forwarding.forward.counters.to_peers_bytes == 4
    assert forwarding.forward.drops == {DropReason.LOCAL_BUFFER_FULL: 2}


def test_stopping_ends_every_tunnel_and_leaves_the_socket_to_its_owner(
    forwarding: Forwarding,
) -> None:
    async def run_and_stop() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            forwarding.local.fileno = sock.fileno  # type: ignore[attr-defined]
            task = asyncio.create_task(forwarding.forward.run())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert sock.fileno() >= 0
            assert not asyncio.get_running_loop().remove_reader(sock.fileno())

    forwarding.open(ALICE)
    asyncio.run(run_and_stop())
    forwarding.world.run()
    assert forwarding.forward.peers == 0
    assert any(isinstance(e, BodyReceived) and e.ended for e in forwarding.world.events)


def test_a_peer_that_only_listens_does_not_shield_a_silent_one(forwarding: Forwarding) -> None:
    alice = forwarding.open(ALICE)
    forwarding.open(BOB)
    forwarding.world.now += IDLE_S / 2
    forwarding.reply(alice, b"news")
    forwarding.world.now += IDLE_S / 2
    forwarding.forward.reap()
    forwarding.world.run()
    assert forwarding.forward.peers == 1


# rates


def test_what_a_peer_sends_over_its_rate_is_dropped_and_counted() -> None:
    forwarding = Forwarding(rate=Rate(10, 105))
    alice = forwarding.open(ALICE)  # says b"hello"
    forwarding.says(ALICE, b"x" * 150, 50)
    assert forwarding.forward.drops == {DropReason.RATE_LIMITED: 1}
    counters = forwarding.forward.counters
    assert (counters.from_peers, counters.from_peers_bytes) == (3, 105)
    # another peer has a rate of its own, and answers have too
    forwarding.open(BOB)
    forwarding.says(BOB, b"y" * 100)
    assert counters.from_peers_bytes == 210
    forwarding.reply(alice, b"z" * 120, 60)
    assert forwarding.local.sent == [(ALICE, b"z" * 60)]
    assert forwarding.forward.drops == {DropReason.RATE_LIMITED: 2}
