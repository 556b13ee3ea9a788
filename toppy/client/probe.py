"""Asks a gateway a few questions on connections of their own, each with a deadline: for doctor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from toppy.client.session import (
    ATTEMPT_DELAY_S,
    GatewaySettings,
    make_client_engine,
    open_sockets,
    reachable,
)
from toppy.model.target import Target
from toppy.net.quic_driver import QuicDriver
from toppy.quic.endpoint import (
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
    StreamAborted,
)
from toppy.quic.engine import Address, ConnectionClosed
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.connect_udp import expand_template, request_headers
from toppy.wire.proxy_status import explain, parse_proxy_status

ECHO_TARGET = Target("127.0.0.1", 9)
"""Where the gateway's built-in echo answers (T-085)."""
ECHO_PAYLOAD = b"toppy-connect-udp-echo"
ECHO_AGAIN_S = 0.3
"""One lost datagram says nothing about the path."""
_MAX_ANSWER_BYTES = 256
_NONE = -1
_MAX_WAITING = 1024
"""Events and payloads; a gateway that says more is not listened to."""


class ProbeError(Exception):
    """The answer was not the one hoped for; the text says what came instead."""


class ProbeRefusedError(ProbeError):
    """The gateway gave a reason."""


class Probe:
    """One connection to a gateway. An async context manager.

    Raises ``ConfigError`` for settings that no engine can work with.
    """

    def __init__(
        self, settings: GatewaySettings, addresses: Sequence[Address], alpn_protocol: str
    ) -> None:
        """``addresses`` of the gateway, in the order to try."""
        self._settings = settings
        self._addresses = list(addresses)
        self._engine = make_client_engine(settings, alpn_protocol, time.monotonic())
        self._endpoint = Endpoint(self._engine, is_client=True)
        self._events: asyncio.Queue[EndpointEvent] = asyncio.Queue(_MAX_WAITING)
        self._payloads: asyncio.Queue[bytes] = asyncio.Queue(_MAX_WAITING)
        self._attempts: dict[int, Address] = {}
        self._connection = _NONE
        self._stream_id = _NONE

    async def __aenter__(self) -> Probe:
        self._sockets = open_sockets(1 << 20)
        self._driver = QuicDriver(self._endpoint, self._sockets, self._pump)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        opened = () if self._connection == _NONE else (self._connection,)
        for connection in (*self._attempts, *opened):
            self._endpoint.close(connection, H3_NO_ERROR, "", time.monotonic())
        self._driver.flush_now()
        self._driver.close()
        for sock in self._sockets:
            sock.close()

    def _pump(self, now: float) -> None:
        for event in self._endpoint.poll_events(now):
            with contextlib.suppress(asyncio.QueueFull):
                self._events.put_nowait(event)
        for _, _, payloads, _ in self._endpoint.poll_datagrams():
            with contextlib.suppress(asyncio.QueueFull):
                self._payloads.put_nowait(payloads)

    async def _wait_for(self, wanted: Callable[[EndpointEvent], bool]) -> EndpointEvent:
        while True:
            event = await self._events.get()
            if getattr(event, "connection", None) != self._connection:
                continue  # of an attempt that another one overtook
            if isinstance(event, ConnectionClosed):
                raise ProbeError(event.reason or "the gateway closed the connection")
            if wanted(event):
                return event

    async def connect(self) -> tuple[Address, float]:
        """Do the handshake with the address that answers first (RFC 8305), each tried a little
        after the one before; which one, and how long its handshake took in seconds.
        """
        untried = reachable(self._addresses, self._sockets)
        if not untried:
            raise ProbeError("this host has no network of the gateway's address family")
        began: dict[int, float] = {}
        while True:
            if untried:
                now = time.monotonic()
                address = untried.pop(0)
                connection = self._endpoint.connect(address, self._settings.server_name, now)
                self._attempts[connection] = address
                began[connection] = now
                self._driver.flush_soon()
            event = await self._next_of_attempts(ATTEMPT_DELAY_S if untried else None)
            if isinstance(event, ConnectionOpened):
                self._connection = event.connection
                took_s = time.monotonic() - began[event.connection]
                return self._attempts.pop(event.connection), took_s
            if isinstance(event, ConnectionClosed):
                del self._attempts[event.connection]
                if not self._attempts and not untried:
                    raise ProbeError(event.reason or "the gateway closed the connection")

    async def _next_of_attempts(
        self, timeout_s: float | None
    ) -> ConnectionOpened | ConnectionClosed | None:
        """How an attempt ended; None when none did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    event = await self._events.get()
                    if (
                        isinstance(event, ConnectionOpened | ConnectionClosed)
                        and event.connection in self._attempts
                    ):
                        return event
        return None

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
            event = await self._wait_for(
                lambda event: (
                    isinstance(event, RawStreamReceived | StreamAborted)
                    and event.stream_id == stream_id
                )
            )
            if not isinstance(event, RawStreamReceived):
                raise ProbeError("the gateway reset the ping")
            answer += event.data
            if len(answer) > _MAX_ANSWER_BYTES:
                raise ProbeError("the answer to the ping is too long: this is no toppy gateway")
            if event.ended:
                return answer.decode("ascii", "replace")

    async def open_echo(self, template: str) -> None:
        """Open a tunnel to the gateway's echo. Raises ``ProbeRefusedError`` when it refuses."""
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
            lambda event: (
                isinstance(event, HeadersReceived | StreamAborted) and event.stream_id == stream_id
            )
        )
        if not isinstance(event, HeadersReceived):
            raise ProbeError("the gateway reset the request")
        found = dict(event.headers)
        status = int(found[b":status"])
        if status != 200:
            said = found.get(b"proxy-status", b"").decode("ascii", "replace")
            raise ProbeRefusedError(f"refused with {explain(status, parse_proxy_status(said))}")

    async def echo(self) -> float:
        """Send a payload through the tunnel until it comes back; its round trip in seconds."""
        if not self._endpoint.may_send_datagrams(self._connection):
            raise ProbeError("the gateway takes no HTTP Datagrams")
        while True:
            now = time.monotonic()
            self._engine.send_datagrams(self._connection, self._stream_id // 4, ECHO_PAYLOAD, 0)
            self._driver.flush_soon()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ECHO_AGAIN_S):
                    while await self._payloads.get() != ECHO_PAYLOAD:
                        pass
                    return time.monotonic() - now
