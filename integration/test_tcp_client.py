"""``toppy up`` through a real gateway: nothing lost, slow readers, resets, reloads, renewals."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import psutil
import pytest

from integration.conftest import ENGINES
from integration.operation import (
    BEST_ENGINE,
    change_config,
    operate,
    wait_for_generations,
    worker_pids,
)
from integration.processes import Gateway, free_tcp_port, running_gateway, wait_until
from integration.tcp_client import CHUNK, Pieces, ask, in_thread, running_up
from integration.test_up import DEADLINE_S, connect, echo, read_digest, target
from toppy.client.gateway_far_side import GatewayStream, open_stream
from toppy.client.session import GatewaySession, GatewaySettings
from toppy.model.target import Target
from toppy.net.tcp import reset_tcp
from toppy.net.tcp_relay import ByteCounters
from toppy.wire.connect_tcp import TCP_TEMPLATE_PATH

BULK = {"native": 24, "aioquic": 2}
"""MiB in each direction."""
SHARE = "tcp-client"

each_engine = [
    pytest.param(engine, marks=pytest.mark.xdist_group(f"{SHARE}-{engine}"), id=engine)
    for engine in ENGINES
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """For tests that change nothing about it."""
    with running_gateway(tmp_path_factory.mktemp("gw")) as running:
        yield running


pytestmark = pytest.mark.xdist_group(SHARE)


@pytest.mark.parametrize("engine", each_engine)
def test_bulk_in_both_directions_survives_a_reload_and_new_connections_use_the_new_generation(
    directory: Path, engine: str
) -> None:
    there, back = Pieces(1, BULK[engine]), Pieces(2, BULK[engine])
    at_target: list[tuple[int, str]] = []

    def serve(sock: socket.socket) -> None:
        sending = in_thread(lambda: back.send(sock))
        at_target.append(read_digest(sock))
        sending.join(DEADLINE_S)

    with (
        target(serve) as port,
        target(echo) as echo_port,
        running_gateway(directory, engine=engine) as gateway,
        running_up(gateway, f"127.0.0.1:{port}", engine=engine) as (local, up),
        running_up(gateway, f"127.0.0.1:{echo_port}", engine=engine, name="up2") as (second, _),
    ):
        assert ask(second, b"before") == b"before"
        with connect(local) as app:
            sending = in_thread(lambda: there.send(app))
            received: list[tuple[int, str]] = []
            reading = in_thread(lambda: received.append(read_digest(app)))
            for pieces in (there, back):
                assert pieces.is_half_sent.wait(DEADLINE_S)
            assert operate(gateway, "reload")["generation"] == 2
            for number in range(20):  # these begin and end while the client moves
                assert ask(second, b"%d" % number * 1000) == b"%d" % number * 1000
            tunnels = operate(gateway, "tunnels")["tunnels"]
            assert [tunnel["name"][:4] for tunnel in tunnels] == ["s0g1"]
            for pieces in (there, back):
                pieces.may_go_on.set()
            reading.join(DEADLINE_S)
            sending.join(DEADLINE_S)
        assert received == [(back.size, back.digest)]
        wait_until("the target's end", lambda: bool(at_target))
        assert at_target == [(there.size, there.digest)]
        wait_for_generations(gateway, {2: "active"})
        up.stop()
        assert f"1 connections, {there.size} bytes out, {back.size} bytes in\n" in up.output()


def test_the_end_of_what_was_sent_arrives_although_the_client_exits(gateway: Gateway) -> None:
    there = Pieces(3, 16)
    there.may_go_on.set()
    at_target: list[tuple[int, str]] = []

    def serve(sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)  # ends first, and reads slowly
        time.sleep(0.3)
        at_target.append(read_digest(sock))

    with (
        target(serve) as port,
        running_up(gateway, f"127.0.0.1:{port}", "--once") as (local, up),
    ):
        with connect(local) as app:
            there.send(app)
        assert up.process.wait(DEADLINE_S) == 0
        wait_until("the target's end", lambda: bool(at_target))
    assert at_target == [(there.size, there.digest)]


def test_the_end_of_what_was_received_arrives_although_the_worker_drains(directory: Path) -> None:
    back = Pieces(4, 8)
    back.may_go_on.set()
    with (
        target(back.send) as port,
        running_gateway(directory) as gateway,
        running_up(gateway, f"127.0.0.1:{port}") as (local, _),
        connect(local) as app,
    ):
        app.shutdown(socket.SHUT_WR)
        assert app.recv(1)
        assert operate(gateway, "reload")["generation"] == 2
        time.sleep(2.5)  # the old worker looks twice for connections that it can close
        size, _ = read_digest(app)
        assert size == back.size - 1
        wait_for_generations(gateway, {2: "active"})


@pytest.mark.parametrize("to_target", [True, False], ids=["to-target", "to-client"])
def test_a_reader_that_sleeps_stops_the_sender_and_memory_stays_bounded(
    gateway: Gateway, to_target: bool
) -> None:
    most = 256
    wakes = threading.Event()
    read: list[int] = []
    sent = 0

    def read_late(sock: socket.socket) -> None:
        wakes.wait(DEADLINE_S)
        read.append(read_digest(sock)[0])

    def send(sock: socket.socket) -> None:
        nonlocal sent
        sock.settimeout(1.5)  # longer than it takes to fill every buffer on the way
        with contextlib.suppress(TimeoutError):
            for _ in range(most):
                sent += sock.send(bytes(CHUNK))
        wakes.set()
        sock.settimeout(DEADLINE_S)
        sock.shutdown(socket.SHUT_WR)

    with (
        target(read_late if to_target else send) as port,
        running_up(gateway, f"127.0.0.1:{port}") as (local, up),
        connect(local) as app,
    ):
        processes = [psutil.Process(pid) for pid in (up.pid, *worker_pids(gateway).values())]
        before = [process.memory_info().rss for process in processes]
        (send if to_target else read_late)(app)
        after = [process.memory_info().rss for process in processes]
        if to_target:
            wait_until("the reader", lambda: bool(read))
        assert sent < most * CHUNK  # the sender was stopped
        assert read == [sent]
        assert all(b - a < 48 << 20 for a, b in zip(before, after, strict=True)), (before, after)


def test_resets_are_passed_on_in_both_directions(gateway: Gateway) -> None:
    seen: list[str] = []

    def serve(sock: socket.socket) -> None:
        if sock.recv(5) == b"reset":
            reset_tcp(sock)
            return
        sock.sendall(b"ready")
        try:
            sock.recv(5)
        except ConnectionResetError:
            seen.append("reset")

    with (
        target(serve) as port,
        running_up(gateway, f"127.0.0.1:{port}") as (local, up),
    ):
        with connect(local) as app:
            app.sendall(b"reset")
            with pytest.raises(ConnectionResetError):
                app.recv(1)
        app = connect(local)
        app.sendall(b"hello")
        assert app.recv(5) == b"ready"
        reset_tcp(app)
        wait_until("the reset at the target", lambda: seen == ["reset"])
        up.stop()
        assert "2 connections, 10 bytes out, 5 bytes in, 2 failed" in up.output()


def test_each_direction_ends_by_itself(gateway: Gateway) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while more := sock.recv(100):
            data += more
        heard.append(data)

    heard: list[bytes] = []
    with (
        target(serve) as port,
        running_up(gateway, f"127.0.0.1:{port}") as (local, _),
        connect(local) as app,
    ):
        assert app.recv(100) == b"bye"
        assert app.recv(100) == b""
        app.sendall(b"one more thing")
        app.shutdown(socket.SHUT_WR)
        wait_until("the target's end", lambda: heard == [b"one more thing"])


def test_a_target_that_nobody_serves_or_the_policy_denies_is_told(gateway: Gateway) -> None:
    for where, reason in (
        (f"127.0.0.1:{free_tcp_port()}", "the target refused the connection"),
        ("10.9.8.7:22", "target 10.9.8.7:22 is not allowed"),
    ):
        with running_up(gateway, where) as (local, up):
            with connect(local) as app, pytest.raises(ConnectionResetError):
                app.recv(1)
            up.stop()
            assert reason in up.output()
            assert "1 failed" in up.output()


def test_why_a_tunnel_was_cut_is_told(directory: Path) -> None:
    with (
        target(echo) as port,
        running_gateway(directory) as gateway,
        running_up(gateway, f"127.0.0.1:{port}") as (local, up),
        connect(local) as app,
    ):
        app.sendall(b"hello")
        assert app.recv(5) == b"hello"
        change_config(gateway, 'cidr = ["127.0.0.0/8", "::1/128"]', 'cidr = ["127.0.0.9/32"]')
        operate(gateway, "reload", "--policy-only")
        with pytest.raises(ConnectionResetError):
            app.recv(1)
        up.wait_for_output(f"403: target 127.0.0.1:{port} is not allowed: no rule allows it")


def test_who_does_not_read_is_cut_off_as_soon(directory: Path) -> None:
    def pour(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(bytes(CHUNK))

    with (
        target(pour) as port,
        running_gateway(directory) as gateway,
        running_up(gateway, f"127.0.0.1:{port}") as (local, up),
        connect(local) as app,
    ):
        assert app.recv(1) == b"\0"
        time.sleep(0.5)  # until every buffer on the way is full
        change_config(gateway, 'cidr = ["127.0.0.0/8", "::1/128"]', 'cidr = ["127.0.0.9/32"]')
        operate(gateway, "reload", "--policy-only")
        up.wait_for_output("a connection was reset")
        with pytest.raises(ConnectionResetError):
            while app.recv(CHUNK):
                pass


def test_a_rate_slows_a_connection_and_loses_nothing(gateway: Gateway) -> None:
    rate, burst, size = 4 << 20, 1 << 18, 5 << 20
    with (
        target(echo) as port,
        running_up(
            gateway,
            f"127.0.0.1:{port}",
            extra=f"[rate]\nbytes_per_sec = {rate}\nburst_bytes = {burst}\n",
        ) as (local, _),
    ):
        began = time.monotonic()
        data = random.Random(5).randbytes(size)
        assert ask(local, data) == data
        assert time.monotonic() - began >= 0.98 * (size - burst) / rate


def test_ten_thousand_connections_leave_nothing_behind(gateway: Gateway) -> None:
    total, at_once = 10_000, 50

    async def one(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()
        await writer.wait_closed()

    async def worker(port: int) -> None:
        for _ in range(total // at_once):
            await one(port)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def scenario() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        port = server.sockets[0].getsockname()[1]
        where = f"127.0.0.1:{port}"
        with running_up(gateway, where) as (local, up):
            await one(local)
            processes = [psutil.Process(pid) for pid in (up.pid, *worker_pids(gateway).values())]

            def is_settled(before: list[int]) -> bool:
                return [process.num_fds() for process in processes] == before

            await asyncio.sleep(0.5)
            before = [process.num_fds() for process in processes]
            await asyncio.gather(*(worker(local) for _ in range(at_once)))
            await asyncio.to_thread(
                wait_until, "as few descriptors as before", lambda: is_settled(before)
            )
            assert operate(gateway, "tunnels")["tunnels"] == []
            up.stop()
            assert f"{total + 1} connections, {total + 1} bytes out, " in up.output()
            assert "failed" not in up.output()
        server.close()
        await server.wait_closed()

    asyncio.run(asyncio.wait_for(scenario(), 90))


SECRET = "a secret that only the issuer knows"


def token(lives_s: float) -> str:
    return jwt.encode({"sub": "alice", "exp": time.time() + lives_s}, SECRET, "HS256")


async def talk(stream: GatewayStream) -> tuple[socket.socket, asyncio.Task[str]]:
    """A local end of a tunnel."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    return ours, asyncio.create_task(stream.relay(theirs, ByteCounters()))


def test_a_tunnel_outlives_its_token_when_a_newer_one_is_sent(directory: Path) -> None:
    (directory / "jwt-secret").write_text(SECRET)
    (directory / "jwt-secret").chmod(0o600)
    extra = '[auth.jwt]\nsecret_file = "jwt-secret"\nleeway_s = 0\n'

    async def scenario(gateway: Gateway, where: Target) -> None:
        def settings(lives_s: float) -> GatewaySettings:
            return GatewaySettings(
                host="127.0.0.1",
                port=gateway.port,
                server_name="localhost",
                template="https://localhost/{target_host}/{target_port}/",
                tcp_template=f"https://localhost:{gateway.port}{TCP_TEMPLATE_PATH}",
                ca_certificates_pem=(directory / "ca.pem").read_bytes(),
                authorization=token(lives_s),
                engine=BEST_ENGINE,
            )

        loop = asyncio.get_running_loop()
        renewed, forgotten = (GatewaySession(settings(3)) for _ in range(2))
        running = [loop.create_task(session.run()) for session in (renewed, forgotten)]
        ours, relaying = await talk(await open_stream(renewed, where))
        other, breaking = await talk(await open_stream(forgotten, where))
        renewed.set_authorization(token(300))
        assert "its credential expired" in await asyncio.wait_for(breaking, DEADLINE_S)
        await loop.sock_sendall(ours, b"still here")
        assert await loop.sock_recv(ours, 100) == b"still here"
        ours.shutdown(socket.SHUT_WR)
        assert await asyncio.wait_for(relaying, DEADLINE_S) == ""
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        for sock in (ours, other):
            sock.close()

    with target(echo) as port, running_gateway(directory, extra=extra) as gateway:
        asyncio.run(scenario(gateway, Target("127.0.0.1", port, "tcp")))
