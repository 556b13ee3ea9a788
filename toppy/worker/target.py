"""The far side of tunnels: connected UDP sockets on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from toppy.errors import TargetError
from toppy.model.grant import Grant
from toppy.net.udp_socket import BUSY_S, SendResult, UdpSocket, connect_udp
from toppy.protocol.udp_tunnel import Buffer
from toppy.worker.tunnel import Tunnel

_RECEIVES_PER_WAKE_UP = 8
"""Then other tunnels get their turn."""

Received = Callable[[Tunnel, Buffer, int, float], None]


class UdpTarget:
    """One tunnel's socket. It takes datagrams from the target's address and no other."""

    __slots__ = ("_called_at", "_done", "_loop", "_received", "_socket", "_tunnel", "address")

    def __init__(
        self,
        tunnel: Tunnel,
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
    tunnel: Tunnel,
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
