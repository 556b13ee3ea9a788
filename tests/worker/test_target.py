"""The far side of a tunnel: a connected socket on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from toppy.errors import TargetError
from toppy.model.grant import Grant
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import Buffer, UdpTunnel
from toppy.wire.ipc_message import AdmissionRequest
from toppy.worker.target import UdpTarget, open_udp_target
from toppy.worker.tunnel import Tunnel


def tunnel() -> Tunnel:
    request = AdmissionRequest(1, None, "target.example", 53, "udp", False, "")
    return Tunnel(1, 0, UdpTunnel(hold_datagrams=0, hold_bytes=0), request, now=0.0)


@dataclass
class Heard:
    """What the target said, and how often a wake-up was over."""

    payloads: list[tuple[bytes, int]] = field(default_factory=list)
    done: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def received(self, _: Tunnel, payloads: Buffer, segment_size: int, now: float) -> None:
        assert now > 0
        self.payloads.append((bytes(payloads), segment_size))

    def wake_up_is_over(self) -> None:
        self.done += 1
        self.news.set()

    async def until_total(self, size: int) -> bytes:
        async with asyncio.timeout(10):
            while sum(len(data) for data, _ in self.payloads) < size:
                self.news.clear()
                await self.news.wait()
        return b"".join(data for data, _ in self.payloads)


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        sock.settimeout(10)
        yield sock


def open_target(heard: Heard, port: int, *addresses: str) -> UdpTarget:
    grant = Grant(addresses, port, "token", "rule", 1)
    return open_udp_target(
        tunnel(), grant, heard.received, heard.wake_up_is_over, buffer_bytes=1 << 20
    )


def test_batches_go_out_and_answers_come_in() -> None:
    async def scenario() -> None:
        with listening() as far:
            heard = Heard()
            target = open_target(heard, far.getsockname()[1], "127.0.0.1")
            assert target.send(b"aabbc", 2) is SendResult.SENT
            said = [far.recvfrom(100) for _ in range(3)]
            assert [data for data, _ in said] == [b"aa", b"bb", b"c"]
            for number in range(20):
                far.sendto(b"%02d" % number, said[0][1])
            assert await heard.until_total(40) == b"".join(b"%02d" % n for n in range(20))
            assert heard.done
            target.close()

    asyncio.run(scenario())


def test_the_first_address_with_a_route_is_used() -> None:
    async def scenario() -> None:
        with listening() as far:
            # an IPv4-mapped address cannot be reached from an IPv6-only socket
            target = open_target(Heard(), far.getsockname()[1], "::ffff:192.0.2.1", "127.0.0.1")
            assert target.address == "127.0.0.1"
            assert target.send(b"hello", 5) is SendResult.SENT
            assert far.recv(100) == b"hello"
            target.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("addresses", [(), ("::ffff:192.0.2.1",)])
def test_a_target_without_a_way_is_502(addresses: tuple[str, ...]) -> None:
    async def scenario() -> None:
        with pytest.raises(TargetError) as caught:
            open_target(Heard(), 53, *addresses)
        assert (caught.value.status, caught.value.proxy_status) == (
            502,
            "destination_ip_unroutable",
        )

    asyncio.run(scenario())


def test_other_senders_are_not_heard() -> None:
    async def scenario() -> None:
        with listening() as far, listening() as intruder:
            heard = Heard()
            target = open_target(heard, far.getsockname()[1], "127.0.0.1")
            target.send(b"?", 1)
            _, source = far.recvfrom(100)
            intruder.sendto(b"intruder", source)
            far.sendto(b"target", source)
            assert await heard.until_total(6) == b"target"
            target.close()

    asyncio.run(scenario())


def test_a_closed_target_hears_nothing_more_and_leaves_no_descriptor() -> None:
    async def scenario() -> None:
        with listening() as far:
            heard = Heard()
            target = open_target(heard, far.getsockname()[1], "127.0.0.1")
            target.send(b"?", 1)
            _, source = far.recvfrom(100)
            target.close()
            far.sendto(b"too late", source)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert heard.payloads == []

    asyncio.run(scenario())


def test_a_refusing_target_is_reported_and_can_recover() -> None:
    async def scenario() -> None:
        with listening() as far:
            port = far.getsockname()[1]
        heard = Heard()
        target = open_target(heard, port, "127.0.0.1")
        results = set()
        for _ in range(5):
            results.add(target.send(b"anybody?", 8))
            await asyncio.sleep(0)
        assert results <= {SendResult.SENT, SendResult.UNREACHABLE}
        assert SendResult.UNREACHABLE in results
        target.close()

    asyncio.run(scenario())
