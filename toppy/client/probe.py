"""Asks a gateway a few questions on connections of their own, each with a deadline: for doctor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from toppy.client.session import GatewaySettings, open_sockets
from toppy.model.target import Target
from toppy.net.quic_driver import QuicDriver
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import (
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
    StreamAborted,
)
from toppy.quic.engine import Address, ConnectionClosed, EngineConfig
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.connect_udp import expand_template, request_headers
from toppy.wire.proxy_status import explain, parse_proxy_status

ECHO_TARGET = Target("127.0.0.1", 9)
"""Where the gateway's built-in echo answers (T-085)."""
ECHO_PAYLOAD = b"toppy-connect-udp-echo"


class ProbeError(Exception):
    """The answer was not the one hoped for; the text says what to do."""


class Probe:
    """One connection to a gateway. An async context manager."""

    def __init__(self, settings: GatewaySettings, address: Address, alpn_protocol: str) -> None:
        self._settings = settings
        self._address = address
        engine = make_engine(
            settings.engine,
            EngineConfig(
                is_client=True,
                alpn_protocols=(alpn_protocol,),
                ca_certificates_pem=settings.ca_certificates_pem,
                initial_packet_bytes=settings.initial_packet_bytes,
            ),
            now=time.monotonic(),
        )
        self._engine = engine
        self._endpoint = Endpoint(engine, is_client=True)
        self._events: asyncio.Queue[EndpointEvent] = asyncio.Queue()
        self._payloads: asyncio.Queue[bytes] = asyncio.Queue()
        self._connection = -1
        self._stream_id = -1

    async def __aenter__(self) -> Probe:
        is_ipv6 = ":" in self._address[0]
        self._sockets = [s for s in open_sockets(1 << 20) if s.is_ipv6 == is_ipv6]
        if not self._sockets:
            raise ProbeError("this host has no network of the gateway's address family")
        self._driver = QuicDriver(self._endpoint, self._sockets, self._pump)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._endpoint.close(self._connection, H3_NO_ERROR, "", time.monotonic())
        self._driver.flush_now()
        self._driver.close()
        for sock in self._sockets:
            sock.close()

    def _pump(self, now: float) -> None:
        for event in self._endpoint.poll_events(now):
            self._events.put_nowait(event)
        for _, _, payloads, _ in self._endpoint.poll_datagrams():
            self._payloads.put_nowait(payloads)

    async def _wait_for(self, wanted: Callable[[EndpointEvent], bool]) -> EndpointEvent:
        while True:
            event = await self._events.get()
            if isinstance(event, ConnectionClosed):
                raise ProbeError(event.reason or "the gateway closed the connection")
            if wanted(event):
                return event

    async def connect(self) -> float:
        """Do the handshake; how long it took, in seconds."""
        now = time.monotonic()
        self._connection = self._endpoint.connect(self._address, self._settings.server_name, now)
        self._driver.flush_soon()
        await self._wait_for(lambda event: isinstance(event, ConnectionOpened))
        return time.monotonic() - now

    async def ping(self) -> str:
        """Ask ``ping <token>`` (T-064); the gateway's answer."""
        stream_id = self._engine.open_stream(self._connection)
        if stream_id is None:
            raise ProbeError("the gateway allows no stream")
        token = self._settings.authorization
        question = f"ping {token}" if token is not None else "ping"
        self._engine.send_stream(self._connection, stream_id, question.encode(), end=True)
        self._driver.flush_soon()
        answer = b""
        while True:
            event = await self._wait_for(lambda event: isinstance(event, RawStreamReceived))
            assert isinstance(event, RawStreamReceived)
            answer += event.data
            if event.ended:
                return answer.decode("ascii", "replace")

    async def open_echo(self, template: str) -> None:
        """Open a tunnel to the gateway's echo. Raises ``ProbeError`` with its refusal."""
        if not self._endpoint.may_connect(self._connection):
            raise ProbeError("it speaks HTTP/3, but takes no MASQUE requests")
        authority, path = expand_template(template, ECHO_TARGET)
        headers = request_headers(authority, path, self._settings.authorization)
        stream_id = self._endpoint.send_request(self._connection, headers)
        if stream_id is None:
            raise ProbeError("the gateway allows no stream")
        self._stream_id = stream_id
        self._driver.flush_soon()
        event = await self._wait_for(
            lambda event: isinstance(event, HeadersReceived | StreamAborted)
        )
        if not isinstance(event, HeadersReceived):
            raise ProbeError("the gateway reset the request")
        found = dict(event.headers)
        status = int(found[b":status"])
        if status != 200:
            said = found.get(b"proxy-status", b"").decode("ascii", "replace")
            raise ProbeError(f"refused with {explain(status, parse_proxy_status(said))}")

    async def echo(self) -> float:
        """Send one payload through the tunnel and await it; the round trip in seconds."""
        if not self._endpoint.may_send_datagrams(self._connection):
            raise ProbeError("the gateway takes no HTTP Datagrams")
        now = time.monotonic()
        self._engine.send_datagrams(self._connection, self._stream_id // 4, ECHO_PAYLOAD, 0)
        self._driver.flush_soon()
        while await self._payloads.get() != ECHO_PAYLOAD:
            pass
        return time.monotonic() - now
