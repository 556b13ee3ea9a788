"""What a packet says beside its payload: ECN and DSCP bits, and data before the handshake's end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from aioquic.asyncio.client import connect
from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import Epoch, SessionTicket

from integration.conftest import Peer, each_engine
from integration.masque_client import DEADLINE_S, Stranger, ask, run
from integration.processes import (
    Gateway,
    free_udp_port,
    running_gateway,
    running_udp_client,
    wait_until,
)
from toppy.quic.endpoint import H3_ALPN

EXPEDITED_AND_ECT_0 = 46 << 2 | 0b10
"""What an application may ask for: the highest DSCP in use, and ECN."""
CONGESTION_EXPERIENCED = 0b11
EVERYTHING_MAY_BE_EARLY = 0xFFFF_FFFF
"""What a ticket says where 0-RTT is offered (RFC 9001 section 4.6.1)."""


@pytest.fixture(scope="module", params=each_engine("marks"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gw"), engine=request.param) as running:
        yield running


def marked_socket(port: int, mark: int) -> socket.socket:
    """Its packets have the mark; it is told the marks of those that come."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, mark)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
    sock.bind(("127.0.0.1", port))
    sock.settimeout(DEADLINE_S)
    return sock


def receive(sock: socket.socket) -> tuple[bytes, int, tuple[str, int]]:
    """A payload, its packet's mark, and its sender."""
    payload, [(level, kind, mark)], _, sender = sock.recvmsg(65535, 64)
    assert (level, kind) == (socket.IPPROTO_IP, socket.IP_TOS)
    return payload, mark[0], sender


@pytest.mark.parametrize("size", [20, 20_000], ids=["datagram frame", "capsule"])
def test_no_mark_of_the_application_reaches_the_target_and_none_of_the_target_the_application(
    gateway: Gateway, size: int
) -> None:
    target_port = free_udp_port()
    with (
        marked_socket(0, EXPEDITED_AND_ECT_0) as app,
        marked_socket(target_port, CONGESTION_EXPERIENCED) as target,
        running_udp_client(gateway, f"127.0.0.1:{target_port}", name=f"marks-{size}") as (port, _),
    ):
        app.sendto(b"q" * size, ("127.0.0.1", port))
        payload, mark, gateway_socket = receive(target)
        assert (payload, mark) == (b"q" * size, 0)
        target.sendto(b"a" * size, gateway_socket)
        payload, mark, _ = receive(app)
        assert (payload, mark) == (b"a" * size, 0)


def configuration(gateway: Gateway, ticket: SessionTicket | None = None) -> QuicConfiguration:
    made = QuicConfiguration(
        is_client=True,
        alpn_protocols=[H3_ALPN],
        server_name="localhost",
        max_datagram_frame_size=65535,
        session_ticket=ticket,
    )
    made.load_verify_locations(str(gateway.directory / "ca.pem"))
    return made


async def tickets_of(gateway: Gateway) -> list[SessionTicket]:
    """What a connection is given for the next one."""
    given: list[SessionTicket] = []
    async with connect(
        gateway.host,
        gateway.port,
        configuration=configuration(gateway),
        create_protocol=Stranger,
        session_ticket_handler=given.append,
    ) as client:
        assert isinstance(client, Stranger)
        async with asyncio.timeout(DEADLINE_S):
            await client.opened
        for _ in range(3):
            await client.ping()  # tickets come right after the handshake
    return given


def test_no_ticket_offers_early_data(gateway: Gateway) -> None:
    tickets = run(tickets_of(gateway))
    assert bool(tickets) == (gateway_engine(gateway) == "native")
    assert all(not ticket.max_early_data_size for ticket in tickets)


def test_early_data_is_refused_and_does_nothing_before_the_handshake(
    gateway: Gateway, echo: Peer
) -> None:
    if gateway_engine(gateway) != "native":
        assert not run(tickets_of(gateway))  # nobody can even try
        return
    before = gateway.metric("toppy_gw_admissions_total")

    async def scenario() -> None:
        ticket = (await tickets_of(gateway))[-1]
        ticket.max_early_data_size = EVERYTHING_MAY_BE_EARLY  # a lie, so that the client tries
        async with connect(
            gateway.host,
            gateway.port,
            configuration=configuration(gateway, ticket),
            create_protocol=Stranger,
            wait_connected=False,
        ) as client:
            assert isinstance(client, Stranger)
            client.authority, client.token = f"localhost:{gateway.port}", gateway.token
            early = ask(client, echo.host, echo.port)
            assert client._quic._cryptos[Epoch.ZERO_RTT].send.is_valid()  # it went out as 0-RTT
            await client.wait_connected()
            tls = client._quic.tls
            assert tls.session_resumed  # the ticket itself was good
            assert not tls.early_data_accepted
            # what was early is sent again, protected by the handshake, and counts once
            assert (await early.answer()).status == 200

    run(scenario())
    wait_until("one admission", lambda: gateway.metric("toppy_gw_admissions_total") == before + 1)


def gateway_engine(gateway: Gateway) -> str:
    engine: str = gateway.status()["engine"]
    return engine
