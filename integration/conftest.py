"""Far ends that every integration test may use, each a process or thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.peers import start_peer
from integration.processes import Gateway, free_udp_port, wait_until
from tests.net.dns_server import DnsServer
from toppy.quic.choose import has_native_engine

ENGINES = ("native", "aioquic") if has_native_engine() else ("aioquic",)
"""What gateways and clients are run on."""


def each_engine(module: str) -> list[Any]:
    """Parameters of a gateway fixture. Tests that share a gateway run in one process."""
    return [
        pytest.param(engine, marks=pytest.mark.xdist_group(f"{module}-{engine}"), id=engine)
        for engine in ENGINES
    ]


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a far end listens."""

    host: str
    port: int


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a gateway; short: unix socket paths are limited to 107 bytes."""
    return tmp_path_factory.mktemp("gw")


def _echo(directory: Path, host: str) -> Iterator[Peer]:
    port = free_udp_port(host)
    running = start_peer("echo", port, directory, host=host)
    yield Peer(host, port)
    running.stop()


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A UDP echo server on 127.0.0.1."""
    yield from _echo(tmp_path_factory.mktemp("echo"), "127.0.0.1")


@pytest.fixture(scope="session")
def echo_ipv6(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A UDP echo server on ::1."""
    if not has_ipv6():
        pytest.skip("this host has no IPv6 loopback address")
    yield from _echo(tmp_path_factory.mktemp("echo6"), "::1")


def has_ipv6() -> bool:
    """Whether ::1 can be used here."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


def wait_for_metric(gateway: Gateway, expected: float, name: str, **labels: str) -> None:
    """Until a metric's sum is ``expected`` or more; workers report twice a second."""

    def value() -> float:
        return gateway.metric(f"toppy_gw_{name}", **labels)

    try:
        wait_until(name, lambda: value() >= expected, 10.0)
    except TimeoutError:
        raise AssertionError(f"{name} {labels} is {value()}, not {expected}") from None


def wait_until_left(gateway: Gateway, connections: float) -> None:
    """Until the gateway has seen ``connections`` in all, and nothing of them is left."""

    def are_gone() -> bool:
        return (
            gateway.metric("toppy_gw_connections_total") >= connections
            and gateway.metric("toppy_gw_open_connections") == 0
            and gateway.metric("toppy_gw_open_tunnels") == 0
        )

    wait_until("the end of every connection", are_gone)


@contextlib.contextmanager
def name_server(server: DnsServer) -> Iterator[DnsServer]:
    """``server`` answers on a UDP socket of 127.0.0.1, from a thread."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        server.port = sock.getsockname()[1]
        stopping = threading.Event()

        def answer() -> None:
            while not stopping.is_set():
                query, peer = sock.recvfrom(4096)
                if query and (response := server.answer(query, over_tcp=False)) is not None:
                    sock.sendto(response, peer)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            stopping.set()
            sock.sendto(b"", sock.getsockname())
            thread.join(5)
