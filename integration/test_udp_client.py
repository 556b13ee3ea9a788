"""``toppy udp`` in front of real applications, on every pair of engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dns.message
import dns.query
import pytest

from integration.conftest import ENGINES, Peer, name_server
from integration.peers import (
    DNS_ADDRESS,
    DNS_NAME,
    PAGE,
    fetch_http3,
    start_dns_server,
    start_peer,
)
from integration.processes import (
    BIN,
    Gateway,
    Running,
    free_udp_port,
    run_command,
    running_gateway,
    running_udp_client,
    start,
    wait_until,
    write_client_config,
)
from tests.net.dns_server import DnsServer

PAIRS = [
    pytest.param(
        (gateway, client),
        id=f"{gateway}-gateway-{client}-client",
        marks=pytest.mark.xdist_group(f"udp-client-{gateway}-{client}"),
    )
    for gateway in ENGINES
    for client in ENGINES
]
SIZES = (0, 1, 1200, 1350, 1500, 9000, 65507)
NAME = "echo.example.test"


@dataclass(frozen=True)
class Route:
    """A gateway, and a ``toppy udp`` to the echo server through it."""

    gateway: Gateway
    engine: str
    """Of the client."""
    port: int
    client: Running


@pytest.fixture(scope="module", params=PAIRS)
def path(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, echo: Peer
) -> Iterator[Route]:
    gateway_engine, client_engine = request.param
    with (
        name_server(DnsServer(records={(NAME, "A"): ["127.0.0.1"]})) as names,
        running_gateway(
            tmp_path_factory.mktemp("gw"),
            engine=gateway_engine,
            extra=f'[resolver]\nnameservers = ["{names.address}"]',
        ) as gateway,
        running_udp_client(gateway, f"127.0.0.1:{echo.port}", engine=client_engine) as running,
    ):
        yield Route(gateway, client_engine, *running)


@contextlib.contextmanager
def application(port: int, timeout_s: float = 5.0) -> Iterator[socket.socket]:
    """A local UDP application that talks to the tunnel's local port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.connect(("127.0.0.1", port))
        sock.settimeout(timeout_s)
        yield sock


def echo_once(sock: socket.socket, payload: bytes) -> None:
    sock.send(payload)
    assert sock.recv(70_000) == payload


def test_payloads_of_every_size_come_back(path: Route) -> None:
    with application(path.port) as app:
        for size in SIZES:
            echo_once(app, os.urandom(size))


def test_two_thousand_datagrams_come_back_in_order_and_none_is_lost(path: Route) -> None:
    back: list[int] = []
    with application(path.port) as app:
        for first in range(0, 2000, 40):
            for number in range(first, first + 40):
                app.send(number.to_bytes(4) + bytes(1196))
            back += [int.from_bytes(app.recv(2000)[:4]) for _ in range(40)]
    assert back == list(range(2000))


def test_local_peers_get_their_own_answers(path: Route) -> None:
    with contextlib.ExitStack() as opened:
        apps = [opened.enter_context(application(path.port)) for _ in range(5)]
        for number in range(50):
            for index, app in enumerate(apps):
                app.send(b"%d of %d" % (number, index))
        for index, app in enumerate(apps):
            said = [app.recv(100) for _ in range(50)]
            assert said == [b"%d of %d" % (number, index) for number in range(50)]


def test_http3_works_inside_the_tunnel(path: Route, tmp_path: Path) -> None:
    port = free_udp_port()
    directory = path.gateway.directory
    keys = (str(directory / "server.pem"), str(directory / "server-key.pem"))
    origin = start_peer("http3", port, tmp_path, *keys)
    try:
        with running_udp_client(
            path.gateway, f"127.0.0.1:{port}", engine=path.engine, name="web"
        ) as (local, _):
            assert asyncio.run(fetch_http3(local, directory / "ca.pem")) == PAGE
    finally:
        origin.stop()


def test_dns_works_through_the_tunnel(path: Route, tmp_path: Path) -> None:
    port = free_udp_port()
    server, _ = start_dns_server(port, tmp_path)
    try:
        with running_udp_client(
            path.gateway, f"127.0.0.1:{port}", engine=path.engine, name="dns"
        ) as (local, _):
            query = dns.message.make_query(DNS_NAME, "A")
            answer = dns.query.udp(query, "127.0.0.1", port=local, timeout=5)
            assert answer.answer[0][0].to_text() == DNS_ADDRESS
    finally:
        server.stop()


def test_a_target_may_be_a_name_that_only_the_gateway_resolves(path: Route, echo: Peer) -> None:
    target = f"{NAME}:{echo.port}"
    with (
        running_udp_client(path.gateway, target, engine=path.engine, name="named") as (port, _),
        application(port) as app,
    ):
        echo_once(app, b"by name")


# what goes wrong


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gw")) as running:
        yield running


@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_workers_death_the_same_local_socket_works_again(
    gateway: Gateway, engine: str, echo: Peer
) -> None:
    target = f"127.0.0.1:{echo.port}"
    with (
        running_udp_client(gateway, target, engine=engine) as (port, _),
        application(port, timeout_s=0.3) as app,
    ):
        echo_once(app, b"before")
        os.kill(gateway.status()["workers"][0]["pid"], signal.SIGKILL)

        def works() -> bool:
            with contextlib.suppress(TimeoutError):
                echo_once(app, b"after")
                return True
            return False

        wait_until("relaying again", works)


def test_a_wrong_token_is_explained(gateway: Gateway, echo: Peer) -> None:
    gateway.token = "this-is-not-the-token"
    with (
        running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, client),
        application(port) as app,
    ):
        app.send(b"let me in")
        client.wait_for_output("the token is wrong; get a new token")
        assert "this-is-not-the-token" not in client.output()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_certificate_of_another_authority_is_refused(
    gateway: Gateway, tmp_path: Path, engine: str, echo: Peer
) -> None:
    assert run_command("toppy-gw", "init", str(tmp_path)).returncode == 0
    (gateway.directory / "ca.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
    with (
        running_udp_client(gateway, f"127.0.0.1:{echo.port}", engine=engine) as (port, client),
        application(port) as app,
    ):
        app.send(b"secret")
        client.wait_for_output("no connection to the gateway")
        assert "certificate" in client.output().lower()
    assert gateway.status()["tunnels"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_certificate_for_another_name_is_refused(
    gateway: Gateway, engine: str, echo: Peer
) -> None:
    config = write_client_config(gateway, gateway.directory / "named.toml", engine=engine)
    config.write_text(config.read_text().replace('"localhost"', '"gateway.example.test"'))
    client = start(
        [
            *(BIN / "toppy", "udp", "--config", config),
            *("--listen", "127.0.0.1:0", "--target", f"127.0.0.1:{echo.port}"),
        ],
        gateway.directory / "named.log",
    )
    try:
        client.wait_for_output("no connection to the gateway")
        assert "certificate" in client.output().lower()
    finally:
        client.stop()
