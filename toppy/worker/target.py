"""The far side of tunnels: connected sockets on the event loop."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from toppy.errors import TargetError
from toppy.model.grant import Grant
from toppy.net.paced_socket import PacedSocket
from toppy.net.stream_socket import StreamSocket
from toppy.net.tcp import connect_tcp
from toppy.net.udp_socket import BUSY_S, SendResult, UdpSocket, connect_udp
from toppy.policy.meter import Lane
from toppy.protocol.udp_tunnel import Buffer
from toppy.quic.engine import Address
from toppy.wire.proxy_protocol import encode_proxy_header
from toppy.worker.tcp_relay import TcpFlow
from toppy.worker.udp_relay import UdpFlow

_RECEIVES_PER_WAKE_UP = 8
"""Then other tunnels get their turn."""

Received = Callable[[UdpFlow, Buffer, int, float], None]


class UdpTarget:
    """One tunnel's socket. It takes datagrams from the target's address and no other."""

    __slots__ = ("_called_at", "_done", "_loop", "_received", "_socket", "_tunnel", "address")

    def __init__(
        self,
        tunnel: UdpFlow,
        address: str,
        socket: UdpSocket,
        received: Received,
        done: Callable[[], None],
    ) -> None:
        self._tunnel = tunnel
        self.address = address
        self._socket = socket
        self._received = received
        self._done = done
        self._called_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._receive)

    @property
    def sent_bytes(self) -> int:
        """See ``TargetSocket``."""
        return self._socket.sent_bytes

    @property
    def overflow(self) -> int:
        """See ``TargetSocket``."""
        return self._socket.overflow

    def send(self, payloads: Buffer, segment_size: int) -> SendResult:
        """One stretch of payloads to the target."""
        return self._socket.send(payloads, segment_size)

    def close(self) -> None:
        """The tunnel is over."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _receive(self) -> None:
        now = time.monotonic()
        is_busy = now - self._called_at < BUSY_S
        self._called_at = now
        for _ in range(_RECEIVES_PER_WAKE_UP if is_busy else 1):
            batch = self._socket.receive()
            if batch is None:
                break
            self._received(self._tunnel, batch[0], batch[1], now)
        self._done()


def open_udp_target(
    tunnel: UdpFlow,
    grant: Grant,
    received: Received,
    done: Callable[[], None],
    *,
    buffer_bytes: int,
) -> UdpTarget:
    """Connect to the first of the grant's addresses that this host has a route to.

    ``done`` is called after every wake-up. Raises ``TargetError``.
    """
    reason = "it has no address"
    for address in grant.addresses:
        try:
            sock = connect_udp(address, grant.port, buffer_bytes=buffer_bytes)
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        return UdpTarget(tunnel, address, UdpSocket(sock), received, done)
    raise TargetError(
        f"no way to the target: {reason}", status=502, proxy_status="destination_ip_unroutable"
    )


def connect_tcp_target(
    flow: TcpFlow, grant: Grant, timeout_s: float, client: Address | None
) -> asyncio.Task[None]:
    """Reach the first of the grant's addresses that answers, and tell the flow.

    ``client`` is the client's address and port, for targets that are to be told of it.
    """

    async def connect() -> None:
        try:
            sock = await connect_tcp(grant.addresses, grant.port, timeout_s=timeout_s)
            address = _introduce(sock, grant, client)
        except TargetError as error:
            flow.not_connected(error, time.monotonic())
        else:
            paced = PacedSocket(
                lambda reader: StreamSocket(sock, reader),
                flow.relay,
                lambda: _lanes(flow),
                call_later=asyncio.get_running_loop().call_later,
                clock=time.monotonic,
            )
            flow.connected(paced, address, time.monotonic())
        flow.flush()

    return asyncio.get_running_loop().create_task(connect())


def _introduce(sock: socket.socket, grant: Grant, client: Address | None) -> str:
    """Say what is to be said before any payload; the target's address. Raises ``TargetError``."""
    try:
        address: str = sock.getpeername()[0]
        if grant.proxy_protocol:
            # the buffer of a new connection takes so little at once
            sock.sendall(encode_proxy_header(client, (address, grant.port)))
    except OSError as error:
        sock.close()
        raise TargetError(
            f"the target accepted the connection and ended it at once: {error.strerror}",
            status=502,
            proxy_status="connection_terminated",
        ) from None
    return address


def _lanes(flow: TcpFlow) -> tuple[Lane | None, Lane | None]:
    meter = flow.meter
    return (meter.to_target, meter.to_client) if meter is not None else (None, None)
