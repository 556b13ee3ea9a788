"""A socket that is read and written no faster than its limits allow: TCP is slowed, never dropped.

It stands between a relay and its socket, and looks to each like the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from toppy.net.stream_relay import ByteSocket
from toppy.net.stream_socket import READ_BYTES, SocketReader
from toppy.policy.meter import Lane
from toppy.protocol.stream_tunnel import Buffer

LEAST_BYTES: Final = 16 << 10
"""To wait for, where the limit has less, or its whole burst if that is smaller: a bucket is never
quite empty, and without a least a few bytes would be moved again and again without a pause."""


class Timer(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> object: ...


class LimitableSocket(ByteSocket, Protocol):
    """See ``StreamSocket``."""

    read_limit: int


CallLater = Callable[[float, Callable[[], None]], Timer]
Lanes = Callable[[], tuple[Lane | None, Lane | None]]
"""What limits (the way to the socket, the way from it) now; None: nothing."""


class PacedSocket:
    """The ``ByteSocket`` of a relay, and the ``SocketReader`` of a socket."""

    __slots__ = (
        "_call_later",
        "_clock",
        "_debt_bytes",
        "_has_ended",
        "_held",
        "_held_bytes",
        "_is_wanted",
        "_lanes",
        "_read_timer",
        "_reader",
        "_socket",
        "_write_timer",
    )

    def __init__(
        self,
        make_socket: Callable[[SocketReader], LimitableSocket],
        reader: SocketReader,
        lanes: Lanes,
        *,
        call_later: CallLater,
        clock: Callable[[], float],
    ) -> None:
        """``lanes`` is asked each time: limits of a live tunnel may change. ``clock`` is that of
        the lanes.
        """
        self._socket = make_socket(self)
        self._reader = reader
        self._lanes = lanes
        self._call_later = call_later
        self._clock = clock
        self._is_wanted = False
        """The relay wants to read."""
        self._has_ended = False
        self._held: deque[memoryview] = deque()
        self._held_bytes = 0
        self._debt_bytes = 0
        """Read, and not paid for yet."""
        self._read_timer: Timer | None = None
        self._write_timer: Timer | None = None

    # what the relay does

    @property
    def unsent_bytes(self) -> int:
        """See ``ByteSocket``: what waits for its turn counts."""
        return self._held_bytes + self._socket.unsent_bytes

    def write(self, pieces: Sequence[Buffer]) -> None:
        """See ``ByteSocket``."""
        if not self._held and self._lanes()[0] is None:
            self._socket.write(pieces)
            return
        self._held.extend(memoryview(piece) for piece in pieces if piece)
        self._held_bytes += sum(map(len, pieces))
        if self._write_timer is None:
            self._release()

    def finish(self) -> bool:
        """See ``ByteSocket``."""
        return self._socket.finish()

    def pause(self) -> None:
        """See ``ByteSocket``."""
        self._is_wanted = False
        self._socket.pause()

    def resume(self) -> None:
        """See ``ByteSocket``."""
        self._is_wanted = True
        if self._read_timer is None:
            self._read_on()

    def close(self) -> None:
        """See ``ByteSocket``."""
        self._cancel()
        self._socket.close()

    def reset(self) -> None:
        """See ``ByteSocket``."""
        self._cancel()
        self._socket.reset()

    def _cancel(self) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._read_timer = self._write_timer = None
        self._is_wanted = False
        self._held.clear()
        self._held_bytes = 0

    # to the socket

    def _release(self) -> None:
        """Write what may go now, and set a timer for the rest."""
        lane = self._lanes()[0]
        if lane is None:
            granted = self._held_bytes
        else:
            # asking for all of it says how much is wanted: budgets are divided by that
            granted = lane.take_bytes(self._held_bytes, self._clock())
        if granted:
            self._held_bytes -= granted
            self._socket.write(self._take(granted))
        if lane is not None and self._held:
            wait_s = lane.wait_s(min(self._held_bytes, LEAST_BYTES), self._clock())
            self._write_timer = self._call_later(wait_s, self._release_more)

    def _take(self, size: int) -> list[memoryview]:
        """The first ``size`` bytes of what is held."""
        pieces = []
        while size:
            piece = self._held.popleft()
            if len(piece) > size:
                self._held.appendleft(piece[size:])
                piece = piece[:size]
            size -= len(piece)
            pieces.append(piece)
        return pieces

    def _release_more(self) -> None:
        self._write_timer = None
        self._release()
        if not self.unsent_bytes:
            self._reader.drained()

    def drained(self) -> None:
        """See ``SocketReader``."""
        if not self._held:
            self._reader.drained()

    # from the socket

    def _read_on(self) -> None:
        """Read what may be read now, or set a timer."""
        lane = self._lanes()[1]
        if lane is None:
            self._debt_bytes = 0
            self._socket.read_limit = READ_BYTES
            self._socket.resume()
            return
        now = self._clock()
        self._debt_bytes -= lane.take_bytes(self._debt_bytes, now)
        wait_s = lane.wait_s(self._debt_bytes or LEAST_BYTES, now)
        room = 0 if self._debt_bytes else lane.room(READ_BYTES, now)
        if wait_s or not room:
            self._socket.pause()
            self._read_timer = self._call_later(wait_s, self._read_more)
        else:
            self._socket.read_limit = room
            self._socket.resume()

    def _read_more(self) -> None:
        self._read_timer = None
        if self._is_wanted and not self._has_ended:
            self._read_on()

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        """See ``SocketReader``."""
        lane, limit = self._lanes()[1], self._socket.read_limit
        if lane is not None:
            # others that share the budget may have read what was there for all of them
            self._debt_bytes += payload_bytes - lane.take_bytes(payload_bytes, self._clock())
            if payload_bytes == limit:  # there may be more, as far as anybody knows
                lane.count_unmet(READ_BYTES - limit)
        self._reader.receive(buffer, payload_bytes)
        has_changed = lane is not None or limit != READ_BYTES
        if has_changed and self._is_wanted and self._read_timer is None:
            self._read_on()

    def receive_end(self) -> None:
        """See ``SocketReader``."""
        self._has_ended = True
        self._reader.receive_end()

    def receive_failure(self, reason: str) -> None:
        """See ``SocketReader``."""
        self._reader.receive_failure(reason)
