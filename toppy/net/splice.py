"""TCP to TCP by splice(2): the kernel moves pages from one socket through a pipe to the other, and
no byte is copied into this process. Linux only.

One edge-triggered epoll set has the sockets of all connections. A pipe is needed only while bytes
are in it: a few serve all connections that keep up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from toppy.net.tcp import reset_tcp
from toppy.net.tcp_relay import ByteCounters, Rate
from toppy.policy.token_bucket import TokenBucket

_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_INTEREST: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_PIPE_BYTES: Final = 1 << 20
"""What one direction holds at most. The largest that pipe(7) gives to everybody; with 64 KiB the
same bytes take twice the CPU.
"""
_BYTES_PER_TURN: Final = 2 * _PIPE_BYTES
"""Of one direction; then other connections have their turn."""
_EVENTS_PER_TURN: Final = 256
_SPARE_PIPES: Final = 16


class _Pipe:
    """Bytes between two sockets, in the kernel."""

    __slots__ = ("held", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        # what one user may have in pipes is bounded, pipe(7); a smaller one does as well
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class _End:
    """One socket of a connection, and what is known of it; edges tell when that changes."""

    __slots__ = ("fd", "has_error", "is_readable", "is_writable", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.is_readable = True
        self.is_writable = True
        self.has_error = False


class _Direction:
    """From one end to the other."""

    __slots__ = (
        "bucket",
        "has_failed",
        "has_more",
        "is_over",
        "pipe",
        "sink",
        "source",
        "timer",
    )

    def __init__(self, source: _End, sink: _End, bucket: TokenBucket | None) -> None:
        self.source = source
        self.sink = sink
        self.bucket = bucket
        self.pipe: _Pipe | None = None
        """While bytes are in it."""
        self.has_more = False
        """It has had its turn, and could go on."""
        self.is_over = False
        self.has_failed = False
        """The sink takes no more; what the source still sends is of no use."""
        self.timer: asyncio.TimerHandle | None = None
        """Until the bucket has something."""


class _Connection:
    """Two ends, two directions."""

    __slots__ = (
        "counters",
        "done",
        "is_waiting_for_turn",
        "problem",
        "rate",
        "to_client",
        "to_target",
    )

    def __init__(
        self,
        client: socket.socket,
        target: socket.socket,
        rate: Rate | None,
        counters: ByteCounters,
        *,
        done: asyncio.Future[None],
        now: float,
    ) -> None:
        ends = _End(client), _End(target)
        self.to_target = _Direction(ends[0], ends[1], rate.bucket(now) if rate else None)
        self.to_client = _Direction(ends[1], ends[0], rate.bucket(now) if rate else None)
        self.rate = rate
        self.counters = counters
        self.done = done
        self.problem = ""
        self.is_waiting_for_turn = False

    @property
    def directions(self) -> tuple[_Direction, _Direction]:
        return self.to_target, self.to_client

    @property
    def ends(self) -> tuple[_End, _End]:
        return self.to_target.source, self.to_client.source


class SpliceRelay:
    """See ``TcpRelay``. To be made, used and closed on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        """By each of their descriptors."""
        self._turns: deque[_Connection] = deque()
        self._is_turn_due = False
        self._spare_pipes: list[_Pipe] = []
        self._loop.add_reader(self._epoll.fileno(), self._wake_up)

    async def relay(
        self,
        client: socket.socket,
        target: socket.socket,
        rate: Rate | None,
        counters: ByteCounters,
    ) -> str:
        """See ``TcpRelay``."""
        connection = _Connection(
            client, target, rate, counters, done=self._loop.create_future(), now=self._clock()
        )
        for end in connection.ends:
            self._connections[end.fd] = connection
            # an edge for what is already there comes at once
            self._epoll.register(end.fd, _INTEREST)
        try:
            await connection.done
        except asyncio.CancelledError:
            self._end(connection, "cancelled")
            raise
        return connection.problem

    def close(self) -> None:
        """See ``TcpRelay``."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        while self._spare_pipes:
            self._spare_pipes.pop().close()

    def _wake_up(self) -> None:
        for fd, events in self._epoll.poll(0, _EVENTS_PER_TURN):
            connection = self._connections.get(fd)
            if connection is None:  # it ended within this batch
                continue
            end = connection.ends[fd != connection.to_target.source.fd]
            end.is_readable = end.is_readable or bool(events & _READABLE)
            end.is_writable = end.is_writable or bool(events & _WRITABLE)
            end.has_error = end.has_error or bool(events & select.EPOLLERR)
            self._move(connection)

    def _take_turns(self) -> None:
        self._is_turn_due = False
        for _ in range(len(self._turns)):
            connection = self._turns.popleft()
            connection.is_waiting_for_turn = False
            if not connection.done.done():
                self._move(connection)

    def _move(self, connection: _Connection) -> None:
        """Carry what can be carried now, and notice an end."""
        for direction in connection.directions:
            if not direction.is_over:
                try:
                    self._carry(connection, direction)
                except OSError as error:  # the source is gone, or this process's last descriptor
                    self._end(connection, error.strerror or str(error))
                    return
        first, second = connection.directions
        if first.is_over and second.is_over:
            self._end(connection, connection.problem)
            return
        for direction in connection.directions:
            # a reset that no reading will tell of: what came before it waits for the other end
            if direction.source.has_error and direction.pipe is not None:
                number = direction.source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self._end(connection, os.strerror(number or errno.ECONNRESET))
                return
        if (first.has_more or second.has_more) and not connection.is_waiting_for_turn:
            connection.is_waiting_for_turn = True
            self._turns.append(connection)
            if not self._is_turn_due:
                self._is_turn_due = True
                self._loop.call_soon(self._take_turns)

    def _carry(self, connection: _Connection, direction: _Direction) -> None:
        """One direction's turn. Raises ``OSError`` when the source is gone."""
        direction.has_more = False
        left = _BYTES_PER_TURN
        while True:
            if direction.pipe is not None:
                if not self._empty(connection, direction, direction.pipe):
                    return
            elif left <= 0:
                direction.has_more = True
                return
            elif not direction.source.is_readable:
                return
            else:
                most = min(left, _PIPE_BYTES)
                if direction.bucket is not None:
                    most = min(most, self._granted(connection, direction, direction.bucket))
                if most == 0:
                    return
                taken = self._fill(direction, most)
                if taken <= 0:
                    if taken == 0:
                        self._pass_end(connection, direction)
                    return
                left -= taken
                if direction.bucket is not None:
                    direction.bucket.take(taken, self._clock())

    def _granted(self, connection: _Connection, direction: _Direction, bucket: TokenBucket) -> int:
        """How many bytes may go now; where that is 0 a timer is set."""
        assert connection.rate is not None
        if direction.timer is not None:
            return 0
        now = self._clock()
        granted = bucket.available(now)
        if granted >= connection.rate.least:
            return granted
        wait_s = connection.rate.wait_s(bucket, now)
        direction.timer = self._loop.call_later(wait_s, self._refilled, connection, direction)
        return 0

    def _refilled(self, connection: _Connection, direction: _Direction) -> None:
        direction.timer = None
        self._move(connection)

    def _fill(self, direction: _Direction, most: int) -> int:
        """From the source into a pipe; 0: it has ended, -1: it has nothing now."""
        pipe = self._spare_pipes.pop() if self._spare_pipes else _Pipe()
        try:
            taken = os.splice(direction.source.fd, pipe.write_end, most, flags=_FLAGS)
        except BlockingIOError:
            direction.source.is_readable = False
            taken = -1
        except OSError:
            self._keep(pipe)
            raise
        if taken > 0:
            pipe.held = taken
            direction.pipe = pipe
        else:
            self._keep(pipe)
        return taken

    def _empty(self, connection: _Connection, direction: _Direction, pipe: _Pipe) -> bool:
        """From the pipe to the sink; whether all of it went."""
        sink = direction.sink
        while pipe.held:
            if not sink.is_writable:
                return False
            try:
                sent = os.splice(pipe.read_end, sink.fd, pipe.held, flags=_FLAGS)
            except BlockingIOError:
                sink.is_writable = False
                return False
            except OSError as error:
                # what the sink has sent before it went is still to be delivered
                self._fail(connection, direction, error)
                return False
            pipe.held -= sent
            if direction is connection.to_target:
                connection.counters.to_target += sent
            else:
                connection.counters.to_client += sent
        direction.pipe = None
        self._keep(pipe)
        return True

    def _pass_end(self, connection: _Connection, direction: _Direction) -> None:
        direction.is_over = True
        try:
            direction.sink.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail(connection, direction, error)

    def _fail(self, connection: _Connection, direction: _Direction, error: OSError) -> None:
        direction.is_over = True
        connection.problem = connection.problem or error.strerror or str(error)
        if direction.pipe is not None:
            direction.pipe.close()
            direction.pipe = None

    def _keep(self, pipe: _Pipe) -> None:
        if len(self._spare_pipes) < _SPARE_PIPES:
            self._spare_pipes.append(pipe)
        else:
            pipe.close()

    def _end(self, connection: _Connection, problem: str) -> None:
        """Close both ends: in order, or with a reset where there is a problem."""
        if connection.ends[0].sock.fileno() < 0:
            return
        connection.problem = problem
        for direction in connection.directions:
            direction.is_over = True
            if direction.timer is not None:
                direction.timer.cancel()
                direction.timer = None
            if direction.pipe is not None:
                direction.pipe.close()
                direction.pipe = None
        for end in connection.ends:
            if self._connections.pop(end.fd, None) is not None:
                self._epoll.unregister(end.fd)
            if problem:
                reset_tcp(end.sock)
            else:
                end.sock.close()
        if not connection.done.done():
            connection.done.set_result(None)
