"""The far side of a tunnel: a connected socket on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from toppy.errors import TargetError
from toppy.model.grant import Grant
from toppy.net.stream_relay import ByteSocket
from toppy.net.udp_socket import SendResult
from toppy.protocol.udp_tunnel import Buffer, UdpTunnel
from toppy.wire.ipc_message import AdmissionRequest
from toppy.wire.proxy_protocol import encode_proxy_header
from toppy.worker.target import UdpTarget, connect_tcp_target, open_udp_target
from toppy.worker.tcp_relay import TcpFlow
from toppy.worker.udp_relay import UdpFlow, UdpRelay


def descriptors() -> int:
    """Open in this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def tunnel() -> UdpFlow:
    request = AdmissionRequest(1, None, "target.example", 53, "udp", False, "")
    return UdpFlow(
        cast(UdpRelay, None), 1, 0, UdpTunnel(hold_datagrams=0, hold_bytes=0), request, now=0.0
    )


@dataclass
class Heard:
    """What the target said, and how often a wake-up was over."""

    payloads: list[tuple[bytes, int]] = field(default_factory=list)
    done: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def received(self, _: UdpFlow, payloads: Buffer, segment_size: int, now: float) -> None:
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


@dataclass
class FakeFlow:
    """What ``connect_tcp_target`` needs of a flow."""

    relay: object = None
    meter: None = None
    outcome: asyncio.Future[ByteSocket | TargetError] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    address: str = ""

    def connected(self, sock: ByteSocket, address: str, now: float) -> None:
        self.address = address
        self.outcome.set_result(sock)

    def not_connected(self, error: TargetError, now: float) -> None:
        self.outcome.set_result(error)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def accepting(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        sock.listen(8)
        sock.settimeout(10)
        yield sock


async def reach(grant: Grant, client: tuple[str, int] | None = None) -> FakeFlow:
    flow = FakeFlow()
    connect_tcp_target(cast(TcpFlow, flow), grant, 10.0, client)
    async with asyncio.timeout(15):
        await flow.outcome
    return flow


def test_the_first_tcp_address_that_answers_is_connected() -> None:
    async def scenario() -> None:
        with accepting() as far:
            grant = Grant(("127.0.0.99", "127.0.0.1"), far.getsockname()[1], "token", "rule", 1)
            flow = await reach(grant)
            assert flow.address == "127.0.0.1"
            found = flow.outcome.result()
            assert not isinstance(found, TargetError)
            with far.accept()[0] as accepted:
                accepted.settimeout(10)
                found.close()
                assert accepted.recv(100) == b""  # no header where none was asked for

    asyncio.run(scenario())


def test_a_tcp_target_that_refuses_is_said() -> None:
    async def scenario() -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            grant = Grant(("127.0.0.1",), bound.getsockname()[1], "token", "rule", 1)
            error = (await reach(grant)).outcome.result()
        assert isinstance(error, TargetError)
        assert (error.status, error.proxy_status) == (502, "connection_refused")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("client", "header"),
    [
        (("192.0.2.7", 50000), encode_proxy_header(("192.0.2.7", 50000), ("127.0.0.1", 1))),
        (("2001:db8::7", 50000), encode_proxy_header(("2001:db8::7", 50000), ("127.0.0.1", 1))),
        (None, encode_proxy_header(None, ("127.0.0.1", 1))),
    ],
)
def test_a_target_is_told_whose_connection_it_is(
    client: tuple[str, int] | None, header: bytes
) -> None:
    async def scenario() -> None:
        with accepting() as far:
            port = far.getsockname()[1]
            grant = Grant(("127.0.0.1",), port, "token", "rule", 1, proxy_protocol=True)
            found = (await reach(grant, client)).outcome.result()
            assert not isinstance(found, TargetError)
            with far.accept()[0] as accepted:
                accepted.settimeout(10)
                found.close()
                received = b""
                while data := accepted.recv(100):
                    received += data
        expected = encode_proxy_header(client, ("127.0.0.1", port))
        assert received == expected
        assert len(expected) == len(header)

    asyncio.run(scenario())


def test_an_attempt_that_is_given_up_leaves_nothing() -> None:
    async def scenario() -> None:
        with accepting() as far:
            far.listen(0)
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(far.getsockname())
            before = descriptors()
            flow = FakeFlow()
            grant = Grant(("127.0.0.1",), far.getsockname()[1], "token", "rule", 1)
            attempt = connect_tcp_target(cast(TcpFlow, flow), grant, 10.0, None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            attempt.cancel()
            await asyncio.wait([attempt])
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1
            assert descriptors() == before
            assert not flow.outcome.done()
            for filler in fillers:
                filler.close()

    asyncio.run(scenario())
