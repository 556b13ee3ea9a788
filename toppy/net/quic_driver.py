"""Moves packets between UDP sockets and an ``Endpoint`` on the running event loop.

Everything that is ready is received, then handled together, then sent together: batches form by
themselves when there is load, and a lone packet waits for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from toppy.net.udp_socket import BUSY_S, MAX_REMEMBERED_PEERS, SendResult, UdpSocket
from toppy.quic.endpoint import Endpoint
from toppy.quic.engine import Address, Buffer, Transmit

_RECEIVES_PER_WAKE_UP = 16
"""Then other sockets get their turn; 16 x 64 KiB is what one batch may hold."""


ReceiveBatch = Callable[[UdpSocket, Buffer, int, Address, float], None]
"""What is done with (socket, payloads, segment size, source, now): give it to the endpoint."""


class QuicDriver:
    """The shell around one endpoint. ``pump`` is called after anything that may have made events,
    with the time; it takes them from the endpoint. Call ``flush_soon`` after giving the endpoint
    something to send.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sockets: Sequence[UdpSocket],
        pump: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        is_reading: bool = True,
    ) -> None:
        self._endpoint = endpoint
        self._sockets = tuple(sockets)
        self._pump = pump
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._flush_is_due = False
        self._called_at = 0.0
        self._unsent: deque[Transmit] = deque()
        self._receive_batch: ReceiveBatch = self.take
        self.send_errors = 0
        families = [sock.is_ipv6 for sock in self._sockets]
        self._by_peer: dict[Address, UdpSocket] | None = None
        if len(set(families)) < len(families):
            # several sockets of one family: each peer is answered from the one that it reached
            self._by_peer = {}
        self._is_reading = False
        if is_reading:
            self.read(True)

    def read(self, is_reading: bool) -> None:
        """Whether to take what arrives; left alone, it waits in the sockets for somebody else."""
        if is_reading == self._is_reading:
            return
        self._is_reading = is_reading
        for sock in self._sockets:
            if is_reading:
                self._loop.add_reader(sock.fileno(), self._receive, sock)
            else:
                self._loop.remove_reader(sock.fileno())

    def divert(self, receive_batch: ReceiveBatch) -> None:
        """Have every received batch looked at first: see ``ReceiveBatch``."""
        self._receive_batch = receive_batch

    def wake_up(self, now: float) -> None:
        """Something was given to the endpoint by another way than its sockets."""
        self._pump(now)
        self.flush_soon()

    def take(
        self, sock: UdpSocket, buffer: Buffer, segment_size: int, source: Address, now: float
    ) -> None:
        """Give the endpoint what arrived for ``sock``; answers go out there."""
        if self._by_peer is not None:
            self._remember(source, sock)
        self._endpoint.receive(buffer, segment_size, source, now)

    def close(self) -> None:
        """Stop; the sockets stay the caller's."""
        self.read(False)
        for sock in self._sockets:
            self._loop.remove_writer(sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush_is_due = True  # a flush that is under way finds nothing to do

    def flush_soon(self) -> None:
        """Send what the endpoint has once everything that is ready now has been handled."""
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def flush_now(self) -> None:
        """Send at once: for the last words before a stop."""
        self._flush_is_due = True
        self._flush()

    def _receive(self, sock: UdpSocket) -> None:
        now = self._clock()
        receive = self._receive_batch
        is_busy = now - self._called_at < BUSY_S
        self._called_at = now
        for _ in range(_RECEIVES_PER_WAKE_UP if is_busy else 1):
            batch = sock.receive()
            if batch is None:
                break
            receive(sock, batch[0], batch[1], batch[2], now)
        self._pump(now)
        self.flush_soon()

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._unsent:
            return  # the socket is full; its writer goes on
        now = self._clock()
        transmits = self._endpoint.poll_transmits(now)
        for index, transmit in enumerate(transmits):
            sock = self._socket_for(transmit[2])
            result = sock.send(*transmit)
            if result is SendResult.WOULD_BLOCK:
                payloads, segment_size, address = transmit
                rest = (payloads[sock.sent_bytes :], segment_size, address)
                self._unsent = deque([rest, *transmits[index + 1 :]])
                self._loop.add_writer(sock.fileno(), self._send_rest, sock)
                break
            if result is not SendResult.SENT:
                self.send_errors += 1  # for QUIC a loss like any other
        self._arm(now)

    def _send_rest(self, blocked: UdpSocket) -> None:
        while self._unsent:
            payloads, segment_size, address = self._unsent[0]
            sock = self._socket_for(address)
            result = sock.send(payloads, segment_size, address)
            if result is SendResult.WOULD_BLOCK:
                self._unsent[0] = (payloads[sock.sent_bytes :], segment_size, address)
                if sock is not blocked:
                    self._loop.remove_writer(blocked.fileno())
                    self._loop.add_writer(sock.fileno(), self._send_rest, sock)
                return
            if result is not SendResult.SENT:
                self.send_errors += 1
            self._unsent.popleft()
        self._loop.remove_writer(blocked.fileno())
        self._flush()

    def _remember(self, peer: Address, sock: UdpSocket) -> None:
        assert self._by_peer is not None
        if peer not in self._by_peer and len(self._by_peer) >= MAX_REMEMBERED_PEERS:
            del self._by_peer[next(iter(self._by_peer))]
        self._by_peer[peer] = sock

    def _socket_for(self, peer: Address) -> UdpSocket:
        if self._by_peer is not None and peer in self._by_peer:
            return self._by_peer[peer]
        host = peer[0]
        if len(self._sockets) > 1:
            is_ipv6 = ":" in host
            for sock in self._sockets:
                if sock.is_ipv6 == is_ipv6:
                    return sock
        return self._sockets[0]

    def _arm(self, now: float) -> None:
        due = self._endpoint.next_timeout()
        if due is None:
            return
        # a timer that fires early is cheap (it re-arms); moving it for every packet is not
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0.0, due - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock()
        due = self._endpoint.next_timeout()
        if due is not None and due <= now:
            self._endpoint.handle_timeout(now)
            self._pump(now)
            self.flush_soon()
        else:
            self._arm(now)
