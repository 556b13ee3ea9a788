"""The far side of local TCP connections: the target, by way of the gateway."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

from toppy.client.session import GatewaySession
from toppy.client.tcp_tunnels import TcpTunnel
from toppy.client.tunnel import Refusal
from toppy.errors import DeniedError, TargetError
from toppy.model.rate import NO_LIMITS, DirectionLimits
from toppy.model.target import Target
from toppy.net.paced_socket import PacedSocket
from toppy.net.stream_relay import ByteSocket, StreamRelay
from toppy.net.stream_socket import SocketReader, StreamSocket
from toppy.net.tcp_relay import ByteCounters
from toppy.policy.meter import single_meter
from toppy.wire.connect_tcp import HEADROOM_BYTES
from toppy.wire.http_proxy import HttpRequestError, RequestBody
from toppy.wire.proxy_status import encode_proxy_status, parse_proxy_status

OPEN_TIMEOUT_S: Final = 20.0
"""For the gateway's answer, a connection to it included; the target has ten seconds of it."""
_NO_ANSWER: Final = encode_proxy_status("toppy", error="connection_timeout")

MakeSocket = Callable[[SocketReader], StreamSocket]
"""The near side's socket, which tells the reader; non-blocking and connected."""


class GatewayFarSide:
    """Opens a tunnel for every connection; ``run`` of the session is the caller's affair."""

    def __init__(
        self,
        session: GatewaySession,
        target: Target,
        *,
        limits: DirectionLimits = NO_LIMITS,
        open_timeout_s: float = OPEN_TIMEOUT_S,
    ) -> None:
        """``limits`` are those of each connection, in each direction."""
        self._session = session
        self._target = target
        self._limits = limits
        self._open_timeout_s = open_timeout_s

    async def open(self) -> GatewayStream:
        """See ``FarSide``. Raises ``DeniedError``, or ``TargetError`` for other refusals."""
        return await open_stream(
            self._session, self._target, limits=self._limits, timeout_s=self._open_timeout_s
        )

    def close(self) -> None:
        """See ``FarSide``."""


async def open_stream(
    session: GatewaySession,
    target: Target,
    *,
    limits: DirectionLimits = NO_LIMITS,
    timeout_s: float = OPEN_TIMEOUT_S,
) -> GatewayStream:
    """A tunnel to a target that is open. Raises ``DeniedError``, or ``TargetError`` for other
    refusals.
    """
    answer = await ask_for_stream(session, target, limits=limits, timeout_s=timeout_s)
    if isinstance(answer, GatewayStream):
        return answer
    if answer.status == 403:
        raise DeniedError(answer.explanation)
    said = parse_proxy_status(answer.proxy_status)
    raise TargetError(
        answer.explanation,
        status=answer.status,
        proxy_status=said.error if said is not None and said.error else None,
    )


async def ask_for_stream(
    session: GatewaySession,
    target: Target,
    *,
    limits: DirectionLimits = NO_LIMITS,
    timeout_s: float = OPEN_TIMEOUT_S,
) -> GatewayStream | Refusal:
    """A tunnel to a target that is open, or why there is none."""
    stream = GatewayStream(limits)
    tunnel = stream.tunnel = session.streams.open(target, stream)
    session.flush_soon()
    try:
        async with asyncio.timeout(timeout_s):
            refusal = await stream.answered
    except TimeoutError:
        tunnel.close()
        return Refusal(
            504,
            f"the gateway gave no answer about {target} within {timeout_s:g} s; `toppy doctor` "
            "tells whether it can be reached",
            _NO_ANSWER,
        )
    except BaseException:
        tunnel.close()
        raise
    return stream if refusal is None else refusal


class GatewayStream:
    """One tunnel, open: see ``FarStream``. It is the tunnel's user, too."""

    tunnel: TcpTunnel

    def __init__(self, limits: DirectionLimits = NO_LIMITS) -> None:
        loop = asyncio.get_running_loop()
        self._limits = limits
        self.answered: asyncio.Future[Refusal | None] = loop.create_future()
        self._over: asyncio.Future[str] = loop.create_future()
        self._counters = ByteCounters()

    async def relay(self, client: socket.socket, counters: ByteCounters) -> str:
        """See ``FarStream``."""

        def make(reader: SocketReader) -> StreamSocket:
            return StreamSocket(client, reader)

        return await self.carry(make, counters)

    async def carry(
        self,
        make_socket: MakeSocket,
        counters: ByteCounters,
        *,
        reply: bytes = b"",
        early: bytes = b"",
        body: RequestBody | None = None,
    ) -> str:
        """The same with any kind of socket. ``reply`` is written before what the target sends,
        ``early`` sent before what is read; with ``body`` what is read passes through it.
        """
        relay = self.tunnel.relay
        assert relay is not None
        reader: SocketReader = relay
        if body is not None:
            reader = _RequestReader(relay, body)
        near = self._paced(make_socket, reader)
        if self._over.done():
            near.reset()
            return self._over.result()
        self._counters = counters
        if reply:
            near.write([reply])
        relay.begin(near)
        relay.send(early)
        self.tunnel.flush()
        try:
            return await self._over
        finally:
            self.tunnel.close()

    def _paced(self, make_socket: MakeSocket, reader: SocketReader) -> ByteSocket:
        meter = single_meter(self._limits, time.monotonic())
        if meter is None:
            return make_socket(reader)
        return PacedSocket(
            make_socket,
            reader,
            lambda: (meter.to_client, meter.to_target),
            call_later=asyncio.get_running_loop().call_later,
            clock=time.monotonic,
        )

    def opened(self) -> None:
        """See ``TunnelUser``."""
        if not self.answered.done():
            self.answered.set_result(None)

    def refused(self, refusal: Refusal) -> None:
        """See ``TunnelUser``."""
        if self.answered.done():  # it broke before the local side was ready
            self.over(refusal.explanation, in_order=False)
        else:
            self.answered.set_result(refusal)

    def over(self, reason: str, *, in_order: bool) -> None:
        """See ``TunnelUser``."""
        if not self._over.done():
            self._over.set_result("" if in_order else reason)

    def moved(self, to_socket: int, to_stream: int) -> None:
        """See ``TunnelUser``."""
        self._counters.to_client += to_socket
        self._counters.to_target += to_stream


class _RequestReader:
    """Lets one HTTP request pass, and nothing behind it; see ``SocketReader``."""

    def __init__(self, relay: StreamRelay, body: RequestBody) -> None:
        self._relay = relay
        self._body = body

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        end = HEADROOM_BYTES + payload_bytes
        try:
            passed = self._body.receive(bytes(buffer[HEADROOM_BYTES:end]))
        except HttpRequestError as error:
            self._relay.receive_failure(f"the program's request is malformed: {error}")
            return
        if passed:  # never more than came
            buffer[HEADROOM_BYTES : HEADROOM_BYTES + len(passed)] = passed
            self._relay.receive(buffer, len(passed))

    def receive_end(self) -> None:
        self._relay.receive_end()

    def receive_failure(self, reason: str) -> None:
        self._relay.receive_failure(reason)

    def drained(self) -> None:
        self._relay.drained()
