"""TCP through the gateway with real sockets, whoever the client is and whichever way it asks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import cast

import psutil
import pytest

from integration.attackers import worker_pids
from integration.audit import AUDIT, wait_for
from integration.conftest import each_engine, name_server, wait_for_metric
from integration.masque_client import CLIENTS, Client, ClosedError, ask, connected, run
from integration.operation import operate_meanwhile
from integration.processes import Gateway, running_gateway, wait_until
from integration.tcp_tunnel import (
    DATA,
    FINAL_DATA,
    H3_CONNECT_ERROR,
    WRAP_UP,
    Way,
    ask_tcp,
    capsule,
    open_tcp,
)
from tests.net.dns_server import DnsServer

HOST = "127.0.0.1"
AUTHORIZATION = 0x1A709A93
H3_MESSAGE_ERROR = 0x10E
H3_DATAGRAM_ERROR = 0x33
SIZE = 3 << 20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def dns() -> Iterator[DnsServer]:
    records = {("both.example.test", "A"): [HOST], ("both.example.test", "AAAA"): ["::1"]}
    with name_server(DnsServer(records=records)) as server:
        yield server


@pytest.fixture(scope="module", params=each_engine("tcp_relay"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dns: DnsServer
) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gw"),
        engine=request.param,
        extra=f"""{AUDIT}
[limits]
tcp_connect_timeout_s = 1
[resolver]
nameservers = ["{dns.address}"]
""",
    ) as running:
        yield running


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@contextlib.asynccontextmanager
async def serving(serve: Serve, host: str = HOST) -> AsyncIterator[int]:
    """A TCP server in this process; its port. What is open at the end is reset."""
    serving: set[asyncio.Task[None]] = set()

    async def safely(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(cast("asyncio.Task[None]", asyncio.current_task()))
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await serve(reader, writer)
                writer.close()
                await writer.wait_closed()
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await asyncio.shield(writer.wait_closed())

    server = await asyncio.start_server(safely, host, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, and end when it ends."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer only when everything has come."""
    found = hashlib.sha256()
    while data := await reader.read(1 << 16):
        found.update(data)
    writer.write(found.digest())


async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say everything and end; what comes is not looked at."""
    writer.write(pattern(SIZE))
    writer.write_eof()
    await reader.read()


def pattern(size: int) -> bytes:
    """Bytes that are wrong when cut, moved or mixed."""
    return b"".join(struct.pack("!I", number) for number in range(size // 4))


@contextlib.contextmanager
def unanswered() -> Iterator[int]:
    """A port at which connections are never accepted, and the next ones never answered."""
    with socket.socket() as full, contextlib.ExitStack() as fillers:
        full.bind((HOST, 0))
        full.listen(0)
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def descriptors(gateway: Gateway) -> int:
    """Of the worker."""
    return sum(psutil.Process(pid).num_fds() for pid in worker_pids(gateway))


@contextlib.contextmanager
def nothing_left(gateway: Gateway) -> Iterator[None]:
    """The worker has as many descriptors and tunnels afterwards as before."""
    before = descriptors(gateway)
    yield
    wait_until("descriptors as before", lambda: descriptors(gateway) <= before)
    wait_until("no tunnels", lambda: gateway.metric("toppy_gw_open_tunnels") == 0)


class TestPayload:
    def test_bytes_go_both_ways_and_each_direction_ends_by_itself(
        self, gateway: Gateway, kind: str, way: Way
    ) -> None:
        async def scenario() -> None:
            async with serving(digest) as port, connected(gateway, kind) as client:
                tunnel = await open_tcp(client, way, HOST, port)
                answer = await tunnel.answer()
                assert answer.fields["proxy-status"] == 'toppy-gw; next-hop="127.0.0.1"'
                payload = pattern(SIZE)
                for start in range(0, SIZE, 1 << 18):
                    tunnel.send(payload[start : start + (1 << 18)])
                tunnel.finish()
                assert await tunnel.read_to_end() == hashlib.sha256(payload).digest()
                assert await tunnel.ending() == "the response ended"

        run(scenario())

    def test_the_target_may_end_first(self, gateway: Gateway, kind: str, way: Way) -> None:
        async def scenario() -> None:
            async with serving(speak_first) as port, connected(gateway, kind) as client:
                tunnel = await open_tcp(client, way, HOST, port)
                assert await tunnel.read_to_end() == pattern(SIZE)
                tunnel.send(b"still allowed")
                tunnel.finish()
                await tunnel.ending()

        run(scenario())

    def test_many_tunnels_share_a_connection(self, gateway: Gateway, way: Way) -> None:
        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway) as client:
                tunnels = [await open_tcp(client, way, HOST, port) for _ in range(20)]
                for number, tunnel in enumerate(tunnels):
                    tunnel.send(b"%04d" % number)
                    tunnel.finish()
                said = [await tunnel.read_to_end() for tunnel in tunnels]
                assert said == [b"%04d" % number for number in range(20)]

        with nothing_left(gateway):
            run(scenario())

    def test_who_expects_it_is_told_to_continue_and_served(
        self, gateway: Gateway, kind: str, way: Way
    ) -> None:
        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway, kind) as client:
                tunnel = ask_tcp(client, way, HOST, port, expects=True)
                assert (await tunnel.answer()).status == 200
                tunnel.send(b"there and back")
                assert await tunnel.read(14) == b"there and back"
                if kind == "stranger":
                    assert 100 in tunnel.notices

        run(scenario())

    def test_of_a_names_addresses_the_one_that_answers_is_used(
        self, gateway: Gateway, way: Way
    ) -> None:
        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway) as client:
                tunnel = await open_tcp(client, way, "both.example.test", port)
                answer = await tunnel.answer()
                assert answer.proxy_status.next_hop == HOST
                tunnel.send(b"x")
                assert await tunnel.read(1) == b"x"

        run(scenario())


class TestResets:
    def test_a_reset_of_the_target_resets_the_stream(
        self, gateway: Gateway, kind: str, way: Way
    ) -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        async def scenario() -> None:
            async with serving(reset) as port, connected(gateway, kind) as client:
                tunnel = await open_tcp(client, way, HOST, port)
                tunnel.send(b"!")
                assert await tunnel.ending() == f"stream aborted with {H3_CONNECT_ERROR:#x}"

        run(scenario())

    def test_a_stream_that_is_reset_resets_the_target(
        self, gateway: Gateway, kind: str, way: Way
    ) -> None:
        async def scenario() -> None:
            seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

            async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"hello")
                try:
                    await reader.read()
                except ConnectionResetError:
                    seen.set_result("reset")
                else:
                    seen.set_result("end")

            async with serving(watch) as port, connected(gateway, kind) as client:
                tunnel = await open_tcp(client, way, HOST, port)
                await tunnel.read(5)
                tunnel.reset()
                async with asyncio.timeout(10):
                    assert await seen == "reset"

        with nothing_left(gateway):
            run(scenario())

    def test_a_connection_that_ends_resets_its_targets(self, gateway: Gateway, way: Way) -> None:
        async def scenario() -> None:
            seen: asyncio.Queue[str] = asyncio.Queue()

            async def watch(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
                try:
                    await reader.read()
                    seen.put_nowait("end")
                except ConnectionResetError:
                    seen.put_nowait("reset")

            async with serving(watch) as port:
                async with connected(gateway) as client:
                    for _ in range(3):
                        await open_tcp(client, way, HOST, port)
                async with asyncio.timeout(10):
                    assert [await seen.get() for _ in range(3)] == ["reset"] * 3

        with nothing_left(gateway):
            run(scenario())


class TestFailures:
    def failure(self, gateway: Gateway, way: Way, host: str, port: int) -> tuple[int, str]:
        async def scenario() -> tuple[int, str]:
            async with connected(gateway) as client:
                answer = await ask_tcp(client, way, host, port).answer()
                return answer.status, answer.proxy_status.error

        return run(scenario())

    def test_a_port_without_a_listener_is_502(self, gateway: Gateway, way: Way) -> None:
        with socket.socket() as bound:
            bound.bind((HOST, 0))  # and does not listen
            found = self.failure(gateway, way, HOST, bound.getsockname()[1])
        assert found == (502, "connection_refused")

    def test_a_target_that_does_not_answer_is_504(self, gateway: Gateway, way: Way) -> None:
        with unanswered() as port, nothing_left(gateway):
            assert self.failure(gateway, way, HOST, port) == (504, "connection_timeout")

    def test_a_name_that_does_not_exist_is_a_dns_error(self, gateway: Gateway, way: Way) -> None:
        status, error = self.failure(gateway, way, "no.example.test", 80)
        assert (status, error) == (502, "dns_error")

    def test_a_denied_target_is_403(self, gateway: Gateway, way: Way) -> None:
        assert self.failure(gateway, way, "192.0.2.1", 80) == (403, "http_request_denied")

    def test_the_gateways_own_port_is_a_loop(self, gateway: Gateway, way: Way) -> None:
        before = gateway.metric("toppy_gw_admissions_total", outcome="508")
        assert self.failure(gateway, way, HOST, gateway.health_port) == (508, "proxy_loop_detected")

        async def udp() -> int:
            async with connected(gateway) as client:
                return (await ask(client, HOST, gateway.port).answer()).status

        assert run(udp()) == 508
        wait_for_metric(gateway, before + 2, "admissions_total", outcome="508")
        for port in (gateway.health_port, gateway.port):
            entries = wait_for(gateway, "tunnel.denied")
            (entry, *_) = [each for each in entries if each.target == f"{HOST}:{port}"]
            assert "the gateway itself" in entry.reason

    @pytest.mark.parametrize("token", [None, "wrong"])
    def test_without_a_good_token_the_answer_fits_the_way(
        self, gateway: Gateway, way: Way, token: str | None
    ) -> None:
        async def scenario() -> None:
            async with connected(gateway) as client:
                answer = await ask_tcp(client, way, HOST, 80, token=token).answer()
                if way is Way.CLASSIC:
                    assert answer.status == 407
                    assert "proxy-authenticate" in answer.fields
                else:
                    assert answer.status == 401
                    assert "www-authenticate" in answer.fields

        run(scenario())


class TestBadInput:
    @pytest.mark.parametrize(
        ("sent", "code"),
        [
            ([capsule(FINAL_DATA), capsule(FINAL_DATA)], H3_MESSAGE_ERROR),
            ([capsule(FINAL_DATA), capsule(DATA, b"more")], H3_MESSAGE_ERROR),
            ([capsule(WRAP_UP)], H3_MESSAGE_ERROR),
            ([capsule(WRAP_UP, b"x" * 9)], H3_MESSAGE_ERROR),
            ([capsule(AUTHORIZATION, b"", length=1 << 40)], H3_MESSAGE_ERROR),
            ([capsule(0, b"\0a datagram")], H3_DATAGRAM_ERROR),
        ],
        ids=["final-twice", "data-after", "wrap-up", "long-wrap-up", "lying-length", "datagram"],
    )
    def test_what_breaks_the_protocol_ends_its_tunnel_and_nothing_else(
        self, gateway: Gateway, sent: list[bytes], code: int
    ) -> None:
        errors = gateway.metric("toppy_gw_protocol_errors_total")

        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway) as client:
                other = await open_tcp(client, Way.CAPSULES, HOST, port)
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                tunnel.raw(*sent)
                assert await tunnel.ending() == f"stream aborted with {code:#x}"
                other.send(b"still here")
                assert await other.read(10) == b"still here"

        with nothing_left(gateway):
            run(scenario())
        wait_for_metric(gateway, errors + 1, "protocol_errors_total")

    def test_an_end_inside_a_capsule_is_a_reset_for_the_target(self, gateway: Gateway) -> None:
        async def scenario() -> None:
            seen: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

            async def watch(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
                try:
                    await reader.read()
                    seen.set_result(False)
                except ConnectionResetError:
                    seen.set_result(True)

            async with serving(watch) as port, connected(gateway) as client:
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                tunnel.raw(capsule(DATA, b"cut off", length=100), end=True)
                assert "aborted" in await tunnel.ending()
                async with asyncio.timeout(10):
                    assert await seen

        with nothing_left(gateway):
            run(scenario())

    def test_unknown_capsules_are_skipped_and_counted(self, gateway: Gateway) -> None:
        skipped = gateway.metric("toppy_gw_capsules_skipped_total")

        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway) as client:
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                tunnel.raw(capsule(0x29 * 7 + 0x17, b"?" * 100_000), capsule(0x17, b""))
                tunnel.send(b"behind")
                assert await tunnel.read(6) == b"behind"

        run(scenario())
        wait_for_metric(gateway, skipped + 2, "capsules_skipped_total")

    def test_datagrams_for_a_tcp_tunnel_are_dropped_and_counted(
        self, gateway: Gateway, way: Way
    ) -> None:
        reason = {"reason": "unknown_stream"}
        dropped = gateway.metric("toppy_gw_datagrams_dropped_total", **reason)

        async def scenario() -> None:
            async with serving(echo) as port, connected(gateway) as client:
                tunnel = await open_tcp(client, way, HOST, port)
                client.send_payloads(tunnel.stream_id, b"a datagram", 10)
                tunnel.send(b"payload")
                assert await tunnel.read(7) == b"payload"

        run(scenario())
        wait_for_metric(gateway, dropped + 1, "datagrams_dropped_total", **reason)


def test_operators_see_protocol_and_bytes_and_the_log_has_them(gateway: Gateway, way: Way) -> None:
    async def scenario() -> str:
        async with serving(echo) as port, connected(gateway) as client:
            tunnel = await open_tcp(client, way, HOST, port)
            tunnel.send(b"12345")
            await tunnel.read(5)
            (live,) = (await operate_meanwhile(gateway, "tunnels"))["tunnels"]
            assert (live["protocol"], live["target"]) == ("tcp", f"{HOST}:{port}")
            assert (live["bytes_to_target"], live["bytes_to_client"]) == (5, 5)
            tunnel.finish()
            await tunnel.read_to_end()
            return str(live["name"])

    before = gateway.metric("toppy_gw_tcp_bytes_total", direction="to_target")
    name = run(scenario())  # a port may have been an earlier tunnel's, too
    wait_for_metric(gateway, before + 5, "tcp_bytes_total", direction="to_target")

    def closed() -> list[dict[str, str]]:
        entries = wait_for(gateway, "tunnel.closed")
        return [each.facts for each in entries if each.facts["tunnel"] == name]

    wait_until("the entry", lambda: bool(closed()))
    (facts,) = closed()
    assert (facts["protocol"], facts["bytes_to_target"], facts["bytes_to_client"]) == (
        *("tcp", "5", "5"),
    )


async def refused_or_closed(client: Client, way: Way, port: int) -> int:
    """The status of a request; 0 when its connection ended first."""
    try:
        return (await ask_tcp(client, way, HOST, port).answer()).status
    except ClosedError:
        return 0
