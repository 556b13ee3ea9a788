"""TCP tunnels of a gateway that is loaded, reloaded or drained, or whose rules have changed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from integration.attackers import worker_pids, worker_rss
from integration.audit import AUDIT, wait_for
from integration.conftest import ENGINES, wait_for_metric
from integration.masque_client import (
    EngineClient,
    NoStreamError,
    connected_engine,
    open_tunnel,
    run,
)
from integration.operation import change_config, operate_meanwhile, wait_for_generations
from integration.processes import Gateway, free_tcp_port, running_gateway, start, wait_until
from integration.tcp_tunnel import (
    H3_CONNECT_ERROR,
    TUNNEL_CLOSED,
    WRAP_UP,
    TcpTunnel,
    Way,
    ask_tcp,
    open_tcp,
)
from integration.test_tcp_relay import (
    HOST,
    SIZE,
    echo,
    pattern,
    serving,
    speak_first,
    unanswered,
)

BEST = ENGINES[0]
MIB = 1 << 20
RULES = """
[[policy.rules]]
name = "loopback"
action = "allow"
cidr = ["127.0.0.0/8", "::1/128"]
"""


@pytest.fixture
def gateway(directory: Path) -> Iterator[Gateway]:
    with running_gateway(directory, extra=AUDIT, rules=RULES) as running:
        yield running


def descriptors(gateway: Gateway) -> int:
    return sum(psutil.Process(pid).num_fds() for pid in worker_pids(gateway))


def pss(gateway: Gateway) -> int:
    """Of the workers, in bytes: what they would give back."""
    return sum(psutil.Process(pid).memory_full_info().pss for pid in worker_pids(gateway))


def pause(tunnel: TcpTunnel) -> None:
    client = tunnel.client
    assert isinstance(client, EngineClient)
    client.endpoint.pause_reading(client.connection, tunnel.stream_id)


class TestBackPressure:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_target_that_never_reads_stops_the_client(self, directory: Path, engine: str) -> None:
        """128 MiB are offered; what moves is what sockets and windows hold."""

        async def scenario(gateway: Gateway) -> None:
            silent = asyncio.Event()

            async def never_read(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                await silent.wait()

            async with serving(never_read) as port, connected_engine(gateway) as client:
                other = await open_tcp(client, Way.CLASSIC, HOST, port)
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                before = await asyncio.to_thread(worker_rss, gateway)
                block = bytes(MIB)
                for _ in range(128):
                    tunnel.send(block)
                backlog = -1
                while backlog != (
                    now := client.endpoint.stream_backlog_bytes(client.connection, tunnel.stream_id)
                ):
                    backlog = now
                    await asyncio.sleep(0.5)
                assert backlog > 64 * MIB
                assert await asyncio.to_thread(worker_rss, gateway) - before < 48 * MIB
                other.reset()  # the connection is alive
                tunnel.reset()
                await asyncio.to_thread(
                    wait_until, "the end", lambda: not gateway.metric("toppy_gw_open_tunnels")
                )

        with running_gateway(directory, engine=engine) as gateway:
            run(scenario(gateway))

    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_client_that_never_reads_stops_the_target(self, directory: Path, engine: str) -> None:
        async def scenario(gateway: Gateway) -> None:
            written = 0

            async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal written
                block = bytes(MIB)
                while True:
                    writer.write(block)
                    await writer.drain()
                    written += len(block)

            async with serving(pour) as port, connected_engine(gateway, engine) as client:
                before = await asyncio.to_thread(worker_rss, gateway)
                tunnels = [ask_tcp(client, Way.CLASSIC, HOST, port) for _ in range(4)]
                for tunnel in tunnels:
                    pause(tunnel)
                seen = -1
                while seen != written:
                    seen = written
                    await asyncio.sleep(0.5)
                assert 4 * MIB < written < 4 * 40 * MIB
                assert await asyncio.to_thread(worker_rss, gateway) - before < 64 * MIB
                for tunnel in tunnels:
                    client.endpoint.resume_reading(client.connection, tunnel.stream_id)
                client.driver.flush_soon()
                await asyncio.to_thread(
                    wait_until, "more than before", lambda: written > seen + 8 * MIB
                )

        with running_gateway(directory, engine=engine) as gateway:
            run(scenario(gateway))


def test_all_tunnels_of_a_subject_share_its_rate_and_lose_nothing(directory: Path) -> None:
    """Slower than the rate is no failure, and faster is impossible."""
    rate, burst = 4 * MIB, MIB

    async def scenario(gateway: Gateway) -> None:
        async with serving(speak_first) as port, connected_engine(gateway) as client:
            start_at = time.monotonic()
            tunnels = [await open_tcp(client, way, HOST, port) for way in Way]
            for tunnel in tunnels:
                assert await tunnel.read_to_end() == pattern(SIZE)
            assert time.monotonic() - start_at > 0.98 * (2 * SIZE - burst) / rate

    rates = f"[rates]\nsubject_bytes_per_sec = {rate}\nsubject_burst_bytes = {burst}\n"
    with running_gateway(directory, extra=rates) as gateway:
        run(scenario(gateway))


async def ask_many(client: EngineClient, count: int, port: int) -> list[TcpTunnel]:
    """Requests, as fast as the gateway allows streams."""
    asked: list[TcpTunnel] = []
    while len(asked) < count:
        try:
            asked.append(ask_tcp(client, list(Way)[len(asked) % 2], HOST, port))
        except NoStreamError:
            await asyncio.sleep(0.01)
    return asked


class TestHalfOpen:
    def test_ten_thousand_requests_for_targets_that_do_not_answer(self, gateway: Gateway) -> None:
        """So many are waited for as the limits say; the others are told to come back, and nothing
        is left of any.
        """
        connections, each, limit = 10, 1_000, 2_000

        async def scenario(port: int) -> tuple[int, int]:
            async with contextlib.AsyncExitStack() as stack:
                clients = [
                    await stack.enter_async_context(connected_engine(gateway))
                    for _ in range(connections)
                ]
                asked: list[TcpTunnel] = []
                for client in clients:
                    asked += await ask_many(client, each, port)
                await asyncio.to_thread(
                    wait_until,
                    "the refusals",
                    lambda: sum(not tunnel.is_answered for tunnel in asked) <= limit,
                )
                answers = [await tunnel.answer() for tunnel in asked if tunnel.is_answered]
                assert {answer.status for answer in answers} <= {429, 504}
                assert await asyncio.to_thread(descriptors, gateway) - before < limit + 100
                async with connected_engine(gateway) as client:
                    tunnel = await open_tunnel(client, "localhost", 7)
                    await tunnel.echo(b"others have their datagrams")
                return len(asked) - len(answers), len(answers)

        before = descriptors(gateway)
        with unanswered() as port:
            waiting, refused = run(scenario(port))
            assert waiting <= limit
            assert waiting + refused == connections * each
            wait_until("no tunnels", lambda: not gateway.metric("toppy_gw_open_tunnels"))
            wait_until("descriptors as before", lambda: descriptors(gateway) <= before)


class TestReload:
    def test_a_transfer_goes_on_through_a_reload_and_loses_nothing(self, gateway: Gateway) -> None:
        payload = pattern(4 * MIB)

        async def scenario() -> None:
            go_on = asyncio.Event()

            async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(payload[:MIB])
                await go_on.wait()
                writer.write(payload[MIB:])
                received = await reader.read(-1)
                writer.write(hashlib.sha256(received).digest())

            async with serving(both_ways) as port, connected_engine(gateway) as client:
                ways = (Way.CAPSULES, Way.CLASSIC)
                tunnels = [await open_tcp(client, way, HOST, port) for way in ways]
                for tunnel in tunnels:
                    tunnel.send(payload[:MIB])
                    await tunnel.read(MIB)
                await operate_meanwhile(gateway, "reload")
                go_on.set()
                for tunnel in tunnels:
                    tunnel.send(payload[MIB:])
                    tunnel.finish()
                for tunnel in tunnels:
                    rest = await tunnel.read_to_end()
                    assert rest == payload[MIB:] + hashlib.sha256(payload).digest()
                assert WRAP_UP in tunnels[0].notices

        run(scenario())
        wait_for_generations(gateway, {2: "active"})

    def test_a_drain_ends_tunnels_when_its_time_is_over(self, gateway: Gateway) -> None:
        async def scenario() -> None:
            async with serving(echo) as port, connected_engine(gateway) as client:
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                await operate_meanwhile(gateway, "reload")
                tunnel.send(b"goes on")
                await tunnel.read(7)
                await operate_meanwhile(gateway, "drain", "g1", "--timeout", "1")
                assert await tunnel.ending()

        run(scenario())
        wait_for_generations(gateway, {2: "active"})
        (closed,) = wait_for(gateway, "tunnel.closed")
        assert closed.reason == "its worker ended"
        assert closed.facts["bytes_to_target"] == "7"


class TestRevocation:
    def test_tunnels_that_a_new_policy_denies_end_open_or_not(self, gateway: Gateway) -> None:
        async def scenario(deaf: int) -> None:
            async with serving(echo) as port, connected_engine(gateway) as client:
                tunnels = {way: await open_tcp(client, way, HOST, port) for way in Way}
                opening = {way: ask_tcp(client, way, HOST, deaf) for way in Way}
                kept = await open_tcp(client, Way.CAPSULES, "127.0.0.1", port)
                kept.send(b"x")
                await kept.read(1)
                await asyncio.to_thread(
                    wait_until,
                    "grants",
                    lambda: len(gateway.ask("GET", "/tunnels")["tunnels"]) == 5,
                )
                change_config(
                    gateway,
                    'name = "loopback"',
                    'name = "no more"\naction = "deny"\ncidr = ["127.0.0.1"]\n'
                    '[[policy.rules]]\nname = "loopback"',
                )
                await operate_meanwhile(gateway, "reload", "--policy-only")
                for way, tunnel in opening.items():
                    answer = await tunnel.answer()
                    assert answer.status == 403, way
                    assert answer.proxy_status.rule == "no more"
                said = await tunnels[Way.CAPSULES].ending()
                assert said == "the response ended"
                reason = tunnels[Way.CAPSULES].notices[TUNNEL_CLOSED]
                assert b'toppy-rule="no more"' in reason
                assert not tunnels[Way.CAPSULES].has_finished  # that would be an ordinary end
                aborted = f"stream aborted with {H3_CONNECT_ERROR:#x}"
                assert await tunnels[Way.CLASSIC].ending() == aborted

        before = descriptors(gateway)
        with unanswered() as port:
            run(scenario(port))
        wait_until("descriptors as before", lambda: descriptors(gateway) <= before)
        assert len(wait_for(gateway, "tunnel.revoked", 5)) == 5

    def test_an_operator_ends_a_tunnel(self, gateway: Gateway) -> None:
        async def scenario() -> None:
            async with serving(echo) as port, connected_engine(gateway) as client:
                tunnel = await open_tcp(client, Way.CLASSIC, HOST, port)
                (live,) = (await operate_meanwhile(gateway, "tunnels"))["tunnels"]
                await operate_meanwhile(gateway, "kick", live["name"])
                assert "aborted" in await tunnel.ending()

        run(scenario())


def read_proxy_header(data: bytes) -> tuple[tuple[str, int], tuple[str, int], bytes]:
    """Source, destination and what follows."""
    signature, version, family, size = struct.unpack_from("!12sBBH", data)
    assert (signature, version) == (b"\r\n\r\n\0\r\nQUIT\n", 0x21)
    width = {0x11: 4, 0x21: 16}[family]
    hosts = [str(ipaddress.ip_address(data[16 + n * width :][:width])) for n in (0, 1)]
    ports = struct.unpack_from("!HH", data, 16 + 2 * width)
    return (hosts[0], ports[0]), (hosts[1], ports[1]), data[16 + size :]


class TestProxyProtocol:
    @pytest.fixture
    def telling(self, directory: Path) -> Iterator[Gateway]:
        rules = f'{RULES}proxy_protocol = "v2"\n'
        with running_gateway(directory, rules=rules) as running:
            yield running

    def test_the_target_is_told_the_clients_address_before_anything_else(
        self, telling: Gateway
    ) -> None:
        async def scenario() -> None:
            async def first_bytes(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                writer.write(await reader.read(-1))

            async with serving(first_bytes) as port, connected_engine(telling) as client:
                for way in Way:
                    tunnel = ask_tcp(client, way, HOST, port)
                    tunnel.send(b"sent before the answer")
                    tunnel.finish()
                    source, destination, rest = read_proxy_header(await tunnel.read_to_end())
                    assert source == (HOST, client.socket.local_address[1])
                    assert destination == (HOST, port)
                    assert rest == b"sent before the answer"

        run(scenario())

    def test_haproxy_takes_it(self, telling: Gateway, directory: Path) -> None:
        haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        if haproxy is None:
            pytest.skip("haproxy is not installed: apt-get install haproxy")
        port = free_tcp_port()
        (directory / "haproxy.cfg").write_text(
            f"""
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend told
    bind {HOST}:{port} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%ci %cp\\n"
"""
        )
        running = start(
            [haproxy, "-db", "-f", directory / "haproxy.cfg"], directory / "haproxy.log"
        )

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((HOST, port)) == 0

        async def scenario() -> None:
            async with connected_engine(telling) as client:
                tunnel = await open_tcp(client, Way.CAPSULES, HOST, port)
                tunnel.send(b"GET / HTTP/1.0\r\n\r\n")
                head, _, body = (await tunnel.read_to_end()).partition(b"\r\n\r\n")
                assert b" 200 " in head
                assert body.decode().split() == [HOST, str(client.socket.local_address[1])]

        try:
            wait_until("haproxy", listens)
            run(scenario())
        finally:
            running.stop()


def test_a_thousand_idle_tunnels_are_small(directory: Path) -> None:
    """Less than 64 KiB each in the gateway; the kernel has more."""
    count = 1000

    async def scenario(gateway: Gateway) -> int:
        async with serving(echo) as port, connected_engine(gateway) as client:
            warm = await open_tcp(client, Way.CAPSULES, HOST, port)
            warm.send(b"x")
            await warm.read(1)
            before = await asyncio.to_thread(pss, gateway)
            tunnels: list[TcpTunnel] = []
            while len(tunnels) < count:
                some = await ask_many(client, 50, port)
                for tunnel in some:
                    assert (await tunnel.answer()).status == 200
                tunnels += some
            for tunnel in tunnels:
                tunnel.send(b"once used")
            for tunnel in tunnels:
                await tunnel.read(9)
            each = (await asyncio.to_thread(pss, gateway) - before) // count
            print(f"{each} bytes for each idle tunnel")
            return each

    limits = "[limits]\nmax_tunnels_per_connection = 2000\nmax_streams_per_connection = 2000\n"
    with running_gateway(directory, engine=BEST, extra=limits) as gateway:
        fds = descriptors(gateway)
        assert run(scenario(gateway)) < 64 << 10
        wait_until("descriptors as before", lambda: descriptors(gateway) <= fds)
        wait_for_metric(gateway, count + 1, "tcp_tunnels_total")
