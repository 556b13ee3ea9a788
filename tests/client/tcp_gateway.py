"""A ``LoopbackGateway`` that has TCP tunnels as well: their targets echo, or do as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.client.gateway import LoopbackGateway, settings_for
from toppy.client.session import GatewaySession
from toppy.model.target import Target
from toppy.protocol.stream_tunnel import RESET_CODE, StreamTunnel
from toppy.quic.endpoint import BodyReceived, HeadersReceived
from toppy.quic.h3 import Headers
from toppy.wire.capsule import encode_tunnel_closed
from toppy.wire.connect_tcp import StreamFraming
from toppy.wire.proxy_status import encode_proxy_status
from toppy.wire.tunnel_request import TunnelKind, response_headers, validate_tunnel_request

SILENT_PORT = 1
"""No answer at all."""
REFUSED_PORT = 2
RESET_PORT = 3
"""The target resets when the first byte comes."""
CLOSED_PORT = 4
"""The gateway ends the tunnel, and says why, when the first byte comes."""
TIMEOUT_PORT = 5
NAMELESS_PORT = 6
DENIED_PORT = 7
SINK_PORT = 8
"""The target answers nothing, and never ends."""


def answer(event: HeadersReceived) -> tuple[Headers, bool] | None:
    """By the target's port; None: not now."""
    request = validate_tunnel_request(event.headers)

    def refuse(status: int, error: str) -> tuple[Headers, bool]:
        said = encode_proxy_status("gw", error=error, details="so it is")
        return response_headers(request.kind, status, proxy_status=said), True

    match request.target.port:
        case 1:
            return None
        case 2:
            return refuse(502, "connection_refused")
        case 5:
            return refuse(504, "connection_timeout")
        case 6:
            return refuse(502, "dns_error")
        case 7:
            return refuse(403, "http_request_denied")
        case _:
            return response_headers(request.kind, 200), False


class TcpLoopbackGateway(LoopbackGateway):
    """Every request is in ``requests``, in order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tunnels: dict[tuple[int, int], StreamTunnel] = {}
        self.requests: list[Target] = []
        self.received: dict[int, bytearray] = {}
        """Payload by the target's port."""
        self._ports: dict[tuple[int, int], int] = {}
        """The port of each tunnel's target."""

    def respond_to(self, event: HeadersReceived) -> tuple[Headers, bool] | None:
        """See ``LoopbackGateway``."""
        request = validate_tunnel_request(event.headers)
        self.requests.append(request.target)
        if request.kind is TunnelKind.TCP:
            tunnel = StreamTunnel(StreamFraming.CAPSULES, is_client=False, hold_bytes=0)
            tunnel.open()
            self.tunnels[event.connection, event.stream_id] = tunnel
            self._ports[event.connection, event.stream_id] = request.target.port
        return answer(event)

    def receive_capsules(self, event: BodyReceived) -> None:
        """See ``LoopbackGateway``."""
        key = event.connection, event.stream_id
        tunnel = self.tunnels.get(key)
        if tunnel is None:
            super().receive_capsules(event)
            return
        payload = b"".join(tunnel.receive_body(event.data, ended=event.ended))
        port = self._ports[key]
        self.received.setdefault(port, bytearray()).extend(payload)
        if port == SINK_PORT:
            return
        if payload and port == RESET_PORT:
            self.endpoint.abort_stream(*key, RESET_CODE)
            return
        if payload and port == CLOSED_PORT:
            said = encode_proxy_status("gw", error="http_request_denied", details="enough")
            self.endpoint.send_body(*key, encode_tunnel_closed(said), end=True)
            return
        if payload:
            self.endpoint.send_body(*key, tunnel.send(payload))
        if tunnel.has_peer_finished and not tunnel.has_finished:
            last = tunnel.finish()
            self.endpoint.send_body(*key, last, end=tunnel.take_end())


@asynccontextmanager
async def connected(
    **options: Any,
) -> AsyncIterator[tuple[TcpLoopbackGateway, GatewaySession]]:
    """A gateway, and a session to it that runs."""
    async with TcpLoopbackGateway(**options) as gateway:
        session = GatewaySession(settings_for(gateway.address, engine="aioquic"))
        running = asyncio.create_task(session.run())
        try:
            yield gateway, session
        finally:
            running.cancel()
            await asyncio.wait({running})


async def until(condition: Callable[[], object]) -> None:
    """Whatever it waits for happens on this loop, or in the kernel, which tells nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
