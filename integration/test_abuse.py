"""Hostile clients: the gateway answers or drops, counts, stays small, and serves the others."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from aioquic.buffer import encode_uint_var

from integration.attackers import half_open, send_garbage, witness
from integration.conftest import Peer, each_engine, wait_for_metric, wait_until_left
from integration.masque_client import (
    CLIENTS,
    DEADLINE_S,
    ClosedError,
    Tunnel,
    ask,
    connect_udp_path,
    connected,
    connected_engine,
    connected_stranger,
    open_tunnel,
    run,
)
from integration.processes import Gateway, running_gateway, wait_until
from toppy.quic.endpoint import PING_ALPN
from toppy.wire.capsule import DATAGRAM, encode_capsule
from toppy.wire.connect_udp import request_headers

RETRY_THRESHOLD = 20
MAX_FAILED_AUTH = 5
MAX_STREAMS = 200
MAX_CONNECTIONS = 100
DATA = 0x0
HEADERS = 0x1


@pytest.fixture(scope="module", params=each_engine("abuse"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gw"),
        engine=request.param,
        extra=f"""
[limits]
retry_threshold = {RETRY_THRESHOLD}
handshake_timeout_s = 2
max_connections_per_source = {MAX_CONNECTIONS}
max_failed_auth_per_source_per_min = 0
max_failed_auth_per_connection = {MAX_FAILED_AUTH}
max_streams_per_connection = {MAX_STREAMS}
max_header_bytes = 8192
tunnel_queue_bytes = 65536
connection_queue_bytes = 262144
""",
    ) as running:
        yield running


def frame(kind: int, value: bytes, declared: int | None = None) -> bytes:
    """An HTTP/3 frame; ``declared`` is a length that lies."""
    length = len(value) if declared is None else declared
    return encode_uint_var(kind) + encode_uint_var(length) + value


async def ended(tunnel: Tunnel) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await tunnel.has_ended.wait()


# at the UDP port


def test_a_hundred_thousand_random_datagrams_harm_nobody(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo):
            await asyncio.to_thread(send_garbage, gateway, 100_000)

    run(scenario())


def test_half_open_handshakes_are_asked_for_their_address_and_then_forgotten(
    gateway: Gateway, echo: Peer
) -> None:
    retried = gateway.metric("toppy_gw_handshakes_total", outcome="retried")
    failed = gateway.metric("toppy_gw_handshakes_total", outcome="failed")

    async def scenario() -> None:
        async with witness(gateway, echo):
            counts = await half_open(gateway, 300, linger_s=3.0)
            # nobody is made a victim: at most three times what the client sent
            # (RFC 9000 section 8.1)
            assert 0 < counts.received_bytes <= 3 * counts.sent_bytes

    run(scenario())
    wait_for_metric(gateway, retried + 200, "handshakes_total", outcome="retried")
    wait_for_metric(gateway, failed + RETRY_THRESHOLD, "handshakes_total", outcome="failed")
    wait_until("no connection", lambda: gateway.status()["connections"] == 0)


def test_connections_beyond_the_limit_of_a_source_are_refused(gateway: Gateway, echo: Peer) -> None:
    refused = gateway.metric("toppy_gw_handshakes_total", outcome="refused")
    before = gateway.metric("toppy_gw_connections_total")

    async def scenario() -> int:
        opened = 0
        async with contextlib.AsyncExitStack() as clients:
            with contextlib.suppress(ClosedError):
                while opened <= MAX_CONNECTIONS:
                    await clients.enter_async_context(connected_engine(gateway))
                    opened += 1
        return opened

    # those of the test before may still be draining
    opened = run(scenario())
    assert MAX_CONNECTIONS // 2 <= opened <= MAX_CONNECTIONS
    wait_for_metric(gateway, refused + 1, "handshakes_total", outcome="refused")
    wait_until_left(gateway, before + opened)

    async def later() -> None:
        async with witness(gateway, echo):
            await asyncio.sleep(0.1)

    run(later())


# on a connection


def test_streams_that_never_speak_take_no_room_from_others(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as silent:
            for _ in range(3 * MAX_STREAMS):
                silent.send_raw(encode_uint_var(HEADERS))
            await asyncio.sleep(0.5)
            assert not silent.closed.done()

    run(scenario())


def test_a_header_section_that_is_too_large_is_refused_by_its_declared_length(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as client:
            for declared in (8193, 1 << 30, (1 << 62) - 1):
                await ended(client.send_raw(frame(HEADERS, bytes(100), declared)))
            path = connect_udp_path(echo.host, echo.port)
            headers = request_headers(client.authority, path, client.token)
            await ended(client.request([*headers, (b"x-large", b"x" * 9000)]))
            # many small fields count too (RFC 9114 section 4.2.2)
            await ended(client.request([*headers, *[(b"x-%d" % n, b"") for n in range(250)]]))
            assert not client.closed.done()
            await (await open_tunnel(client, echo.host, echo.port)).echo(b"forgiven")

    run(scenario())


def test_a_capsule_with_a_lying_length_ends_its_tunnel_and_nothing_else(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as client:
            bystander = await open_tunnel(client, echo.host, echo.port)
            for declared in (65_536, 1 << 30, (1 << 62) - 1):
                tunnel = await open_tunnel(client, echo.host, echo.port)
                head = encode_uint_var(DATAGRAM) + encode_uint_var(declared)
                client.send_body(tunnel.stream_id, head + bytes(100))
                await ended(tunnel)
            tunnel = await open_tunnel(client, echo.host, echo.port)
            whole = encode_capsule(DATAGRAM, bytes(100))
            client.send_body(tunnel.stream_id, whole[:-1], end=True)
            await ended(tunnel)
            await bystander.echo(b"not disturbed")

    run(scenario())


def test_capsules_of_unknown_types_are_skipped_however_large(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            size = 4 << 20
            head = encode_uint_var(0x1234) + encode_uint_var(size)
            client.send_body(tunnel.stream_id, head + bytes(size))
            known = encode_capsule(DATAGRAM, b"\x00after all that")
            client.send_body(tunnel.stream_id, known)
            assert await tunnel.receive() == b"after all that"

    run(scenario())


def test_wrong_tokens_at_speed_close_the_connection(gateway: Gateway, echo: Peer) -> None:
    before = gateway.metric("toppy_gw_admissions_total", outcome="401")

    async def scenario() -> None:
        async with witness(gateway, echo):
            for _ in range(10):
                async with connected_engine(gateway) as guesser:
                    for number in range(50):
                        ask(guesser, "localhost", 9, token=f"guess-number-{number}")
                    async with asyncio.timeout(DEADLINE_S):
                        assert "authentication" in await guesser.closed

    run(scenario())
    wait_for_metric(gateway, before + 10 * MAX_FAILED_AUTH, "admissions_total", outcome="401")


def test_requests_that_are_reset_at_once_leave_nothing_behind(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as client:
            for number in range(2000):
                while not client.may_open_stream:  # noqa: ASYNC110  # no event says so
                    await asyncio.sleep(0.005)
                tunnel = ask(client, echo.host, echo.port)
                client.abort(tunnel.stream_id, 0x10C)
                if number % 20 == 19:
                    await asyncio.sleep(0.005)
            await (await open_tunnel(client, echo.host, echo.port)).echo(b"one that is meant")

    run(scenario())
    wait_until("no tunnel", lambda: gateway.status()["tunnels"] == 0)


def test_a_flood_to_a_client_that_does_not_read_is_dropped_at_the_queues_bound(
    gateway: Gateway, echo: Peer
) -> None:
    dropped = gateway.metric("toppy_gw_datagrams_dropped_total", reason="queue_full")

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1", 0))
            target.settimeout(DEADLINE_S)
            async with witness(gateway, echo), connected_stranger(gateway) as deaf:
                tunnel = await open_tunnel(deaf, *target.getsockname())
                tunnel.send(b"?")
                _, source = await asyncio.to_thread(target.recvfrom, 100)
                # not a packet is read or acknowledged from now on
                deaf.datagram_received = lambda data, addr: None  # type: ignore[method-assign]
                for _ in range(100):
                    for _ in range(200):
                        target.sendto(bytes(1100), source)
                    await asyncio.sleep(0.005)

    run(scenario())
    wait_for_metric(gateway, dropped + 1000, "datagrams_dropped_total", reason="queue_full")


def test_a_flood_of_capsules_to_a_client_that_does_not_read_is_dropped(
    gateway: Gateway, echo: Peer
) -> None:
    reason = "capsule_queue_full"
    dropped = gateway.metric("toppy_gw_datagrams_dropped_total", reason=reason)

    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1", 0))
            target.settimeout(DEADLINE_S)
            async with witness(gateway, echo), connected_stranger(gateway) as deaf:
                tunnel = await open_tunnel(deaf, *target.getsockname())
                tunnel.send(b"?")
                _, source = await asyncio.to_thread(target.recvfrom, 100)
                deaf.datagram_received = lambda data, addr: None  # type: ignore[method-assign]
                for _ in range(50):
                    for _ in range(20):
                        target.sendto(bytes(20_000), source)
                    await asyncio.sleep(0.005)

    run(scenario())
    wait_for_metric(gateway, dropped + 100, "datagrams_dropped_total", reason=reason)


def test_a_flood_from_a_client_reaches_its_target_and_harms_nobody(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo), connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            for _ in range(100):
                tunnel.send_many([bytes(1000)] * 300)
                await asyncio.sleep(0.005)
            assert await tunnel.receive() == bytes(1000)

    run(scenario())


def test_datagrams_for_streams_that_are_no_tunnels_are_counted(
    gateway: Gateway, echo: Peer
) -> None:
    before = gateway.metric("toppy_gw_datagrams_dropped_total", reason="unknown_stream")

    async def scenario() -> None:
        async with witness(gateway, echo), connected_stranger(gateway) as client:
            # stream 0 must exist, or the datagram would be an error (RFC 9297 section 2.1)
            assert (await ask(client, "127.0.0.1", 0).answer()).status == 400
            for _ in range(500):
                client.send_frame(0, 0, b"for nobody")
            await asyncio.sleep(0.2)

    run(scenario())
    wait_for_metric(gateway, before + 400, "datagrams_dropped_total", reason="unknown_stream")


def test_pings_that_are_begun_and_given_up_leave_nothing_behind(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with (
            witness(gateway, echo),
            connected_engine(gateway, alpn=PING_ALPN) as client,
        ):
            for number in range(5000):
                stream_id = client.engine.open_stream(client.connection)
                if stream_id is None:
                    await asyncio.sleep(0.01)
                    continue
                client.engine.send_stream(client.connection, stream_id, b"ping " + bytes(8000))
                client.driver.flush_soon()
                await asyncio.sleep(0)
                client.engine.reset_stream(client.connection, stream_id, 0)
                if number % 20 == 19:
                    await asyncio.sleep(0.002)

    run(scenario())


def test_a_ping_that_is_too_long_closes_its_connection(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with (
            witness(gateway, echo),
            connected_engine(gateway, alpn=PING_ALPN) as client,
        ):
            stream_id = client.engine.open_stream(client.connection)
            assert stream_id is not None
            client.engine.send_stream(client.connection, stream_id, b"ping " + bytes(20_000))
            client.driver.flush_soon()
            async with asyncio.timeout(DEADLINE_S):
                assert "too long" in await client.closed

    run(scenario())


def test_broken_http3_ends_its_own_stream_or_connection_only(gateway: Gateway, echo: Peer) -> None:
    chance = random.Random(3)

    async def scenario() -> None:
        async with witness(gateway, echo):
            for number in range(60):
                async with connected_stranger(gateway) as client:
                    for _ in range(20):
                        noise = chance.randbytes(chance.randrange(1, 300))
                        kind = chance.choice((DATA, HEADERS, 0x4, 0x5, 0x7, 0xD, 0x21))
                        if number % 2:
                            noise = frame(kind, noise)
                        client.send_raw(
                            noise,
                            is_unidirectional=not chance.randrange(4),
                            end=bool(chance.randrange(2)),
                        )
                    await asyncio.sleep(0.01)

    run(scenario())


# beside QUIC


def control_frames() -> Iterator[list[bytes]]:
    """What a stranger in the runtime directory might say on the control channel."""
    chance = random.Random(5)
    for size in (0, 1, 10, 1000, 100_000):
        yield [chance.randbytes(size)]
    for message in (
        {"type": "hello", "slot": 0, "generation": 1, "pid": 1, "secret": "wrong"},
        {"type": "hello", "slot": 0, "generation": 1, "pid": 1, "secret": "f\u00e4lschung"},
        {"type": "hello", "slot": 99, "generation": 1, "pid": 1, "secret": ""},
        {"type": "ready", "engine": "native"},
        {"type": "token", "request": 1, "authorization": "guess"},
        {"type": "nonsense"},
    ):
        yield [msgspec.msgpack.encode(message)]
    yield [b"two", b"frames"]
    yield [b"", b"", b""]
    yield [bytes(1 << 20)]


def report_frames() -> Iterator[list[bytes]]:
    for secret in ("wrong", "f\u00e4lschung"):
        message: dict[str, object] = {"slot": 0, "generation": 1, "secret": secret, "counters": {}}
        yield [msgspec.msgpack.encode(message)]
    yield [b"\xff" * 1000]
    yield [b"many", b"frames", b"at", b"once"]


def shout(directory: Path, name: str, kind: int, messages: Iterator[list[bytes]]) -> None:
    """Say everything on one of the gateway's ZeroMQ sockets, each from a new connection."""
    with zmq.Context() as context:
        for frames in messages:
            with context.socket(kind) as sock:
                sock.setsockopt(zmq.LINGER, 200)
                sock.connect(f"ipc://{directory / 'run' / name}.sock")
                sock.send_multipart(frames)


def test_garbage_on_the_control_sockets_is_dropped(gateway: Gateway, echo: Peer) -> None:
    def speak() -> None:
        shout(gateway.directory, "control", zmq.DEALER, control_frames())
        shout(gateway.directory, "reports", zmq.PUSH, report_frames())
        for name in ("control", "reports"):  # not even ZeroMQ
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(str(gateway.directory / "run" / f"{name}.sock"))
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)

    async def scenario() -> None:
        async with witness(gateway, echo):
            await asyncio.to_thread(speak)
            await asyncio.sleep(0.5)

    run(scenario())


def test_idle_connections_to_the_health_port_do_not_hide_it(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with witness(gateway, echo):
            with contextlib.ExitStack() as opened:
                for number in range(200):
                    address = ("127.0.0.1", gateway.health_port)
                    sock = opened.enter_context(socket.create_connection(address))
                    if number % 2:
                        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
                assert (await asyncio.to_thread(gateway.healthz)).status_code == 200

    run(scenario())


def test_after_all_this_nothing_is_open_and_new_clients_are_served(
    gateway: Gateway, echo: Peer
) -> None:
    wait_until("nothing open", lambda: gateway.status()["connections"] == 0, 40)
    assert gateway.status()["tunnels"] == 0

    async def scenario() -> None:
        for kind in CLIENTS:
            async with connected(gateway, kind) as client:
                await (await open_tunnel(client, echo.host, echo.port)).echo(b"at last")

    run(scenario())
