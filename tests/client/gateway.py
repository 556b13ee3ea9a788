"""A gateway on loopback, inside the test's event loop, that answers as the test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.quic.certificates import SERVER_NAME, certificates
from tests.quic.link import make_engine, server_config, split
from toppy.client.session import GatewaySettings
from toppy.net.quic_driver import QuicDriver
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.protocol.udp_tunnel import UdpTunnel, encode_datagram_capsules
from toppy.quic.endpoint import (
    H3_ALPN,
    PING_ALPN,
    BodyReceived,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
)
from toppy.quic.engine import Address
from toppy.quic.h3 import Headers
from toppy.wire.connect_tcp import TCP_TEMPLATE_PATH
from toppy.wire.connect_udp import FORWARD_TEMPLATE_PATH, response_headers

DEADLINE_S = 10.0


class LoopbackGateway:
    """Opens every tunnel and echoes what comes through it, unless told otherwise."""

    def __init__(
        self,
        *,
        respond: Callable[[HeadersReceived], tuple[Headers, bool]] | None = None,
        pong: bytes = b"pong",
        alpn_protocols: tuple[str, ...] = (H3_ALPN, PING_ALPN),
        lose: int = 0,
        pair: tuple[bytes, bytes] | None = None,
    ) -> None:
        """``respond`` gives the answer's headers and whether they end the stream; ``lose`` is how
        many payloads are not echoed; ``pair`` is another certificate chain and its key, in PEM.
        """
        self._pair = pair
        self._respond = respond or (lambda _: (response_headers(200), False))
        self._pong = pong
        self._alpn_protocols = alpn_protocols
        self._lose = lose
        self.events: list[EndpointEvent] = []
        self.payloads: list[bytes] = []
        self.pings: list[bytes] = []
        self.sources: list[Address] = []
        """Where each connection came from."""
        self._protocols: dict[tuple[int, int], UdpTunnel] = {}

    async def __aenter__(self) -> Self:
        config = replace(server_config(), alpn_protocols=self._alpn_protocols)
        if self._pair is not None:
            chain, key = self._pair
            config = replace(config, certificate_chain_pem=chain, private_key_pem=key)
        engine = make_engine("aioquic", config, now=time.monotonic())
        self.endpoint = Endpoint(engine, is_client=False)
        self._socket = UdpSocket(bind_udp("127.0.0.1", 0, buffer_bytes=1 << 20))
        self._driver = QuicDriver(self.endpoint, [self._socket], self._pump)
        self._changed = asyncio.Event()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._driver.close()
        self._socket.close()

    @property
    def address(self) -> Address:
        return self._socket.local_address

    def of(self, kind: type[EndpointEvent]) -> list[EndpointEvent]:
        """Events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def connections(self) -> list[int]:
        """Of every connection that was opened, in order."""
        return [e.connection for e in self.events if isinstance(e, ConnectionOpened)]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something to be true of this gateway."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def close_connection(self, connection: int, reason: str) -> None:
        self.endpoint.close(connection, 0x100, reason, time.monotonic())
        self._driver.flush_soon()

    def send_goaway(self, connection: int) -> None:
        self.endpoint.send_goaway(connection)
        self._driver.flush_soon()

    def send_body(self, request: HeadersReceived, data: bytes, *, end: bool = False) -> None:
        """Capsules on a tunnel."""
        self.endpoint.send_body(request.connection, request.stream_id, data, end=end)
        self._driver.flush_soon()

    def _pump(self, now: float) -> None:
        for event in self.endpoint.poll_events(now):
            self.events.append(event)
            if isinstance(event, ConnectionOpened):
                source = self.endpoint.engine.peer_address(event.connection)
                assert source is not None
                self.sources.append(source)
            elif isinstance(event, BodyReceived):
                self.receive_capsules(event)
            if isinstance(event, HeadersReceived):
                answer = self.respond_to(event)
                if answer is not None:
                    headers, ended = answer
                    self.endpoint.send_headers(
                        event.connection, event.stream_id, headers, end=ended
                    )
            elif isinstance(event, RawStreamReceived):
                self.pings.append(event.data)
                self.endpoint.engine.send_stream(
                    event.connection, event.stream_id, self._pong, end=True
                )
        for connection, quarter_stream_id, payloads, size in self.endpoint.poll_datagrams():
            self.payloads += split(payloads, size)
            if self._lose:
                self._lose -= 1
                continue
            self.endpoint.engine.send_datagrams(connection, quarter_stream_id, payloads, size)
        self._driver.flush_soon()
        self._changed.set()

    def respond_to(self, event: HeadersReceived) -> tuple[Headers, bool] | None:
        """The answer's headers and whether they end the stream; None: there is none now."""
        return self._respond(event)

    def receive_capsules(self, event: BodyReceived) -> None:
        """As the gateway's echo: in an HTTP Datagram where one is large enough."""
        key = event.connection, event.stream_id
        protocol = self._protocols.setdefault(key, UdpTunnel(hold_datagrams=0, hold_bytes=0))
        engine, quarter = self.endpoint.engine, event.stream_id // 4
        for payload in protocol.receive_body(event.data, ended=event.ended):
            if len(payload) <= engine.max_payload_bytes(event.connection, quarter):
                engine.send_datagrams(event.connection, quarter, payload, len(payload))
            else:
                capsule = encode_datagram_capsules(payload, len(payload))
                self.endpoint.send_body(event.connection, event.stream_id, capsule)


def settings_for(address: Address, **changes: object) -> GatewaySettings:
    """A client's settings for a gateway with the test certificate."""
    settings = GatewaySettings(
        host=address[0],
        port=address[1],
        server_name=SERVER_NAME,
        template=f"https://{SERVER_NAME}:{address[1]}{FORWARD_TEMPLATE_PATH}",
        tcp_template=f"https://{SERVER_NAME}:{address[1]}{TCP_TEMPLATE_PATH}",
        ca_certificates_pem=certificates().ca_pem,
        authorization="the-token",
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


def write_config(directory: Path, address: Address, extra: str = "") -> Path:
    """A client's configuration file for such a gateway."""
    (directory / "ca.pem").write_bytes(certificates().ca_pem)
    path = directory / "config.toml"
    path.write_text(
        f"""
gateway = "{address[0]}"
port = {address[1]}
server_name = "{SERVER_NAME}"
ca_cert_path = "ca.pem"
auth_token = "the-token"
mtu = 1350
{extra}
"""
    )
    path.chmod(0o600)
    return path
