"""A connected TCP socket whose other side is a request stream, on the running event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from toppy.net.tcp import reset_tcp
from toppy.protocol.stream_tunnel import Buffer
from toppy.wire.connect_tcp import HEADROOM_BYTES

READ_BYTES: Final = 256 << 10
"""The most that is read at once."""
LOOK_INTERVAL_S: Final = 5.0
"""Between two looks at whether a socket that is not read now has been reset: nobody else tells."""
_PIECES_AT_ONCE: Final = 64
"""Of one call that sends; the kernel takes up to 1,024 (IOV_MAX)."""

_buffer = memoryview(bytearray(HEADROOM_BYTES + READ_BYTES))
_payload = _buffer[HEADROOM_BYTES:]
"""One for all sockets: what is read is handed on, and copied, before anything else is read."""


class SocketReader(Protocol):
    """Hears what happens on a socket."""

    def receive(self, buffer: memoryview, payload_bytes: int) -> None:
        """Payload came; it stands at ``buffer[HEADROOM_BYTES:]`` until this returns."""
        ...

    def receive_end(self) -> None:
        """The peer has sent everything (FIN)."""
        ...

    def receive_failure(self, reason: str) -> None:
        """The connection broke: a RST, or no answer to keep-alives."""
        ...

    def drained(self) -> None:
        """Everything that was given to ``write`` has gone."""
        ...


class Connection(Protocol):
    """What is needed of a non-blocking ``socket.socket``."""

    def fileno(self) -> int: ...
    def recv_into(self, buffer: memoryview, nbytes: int, /) -> int: ...
    def sendmsg(self, buffers: Iterable[memoryview], /) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    def close(self) -> None: ...


class StreamSocket:
    """Owns a non-blocking socket. It is not read before ``resume``."""

    __slots__ = (
        "_has_ended",
        "_has_failed",
        "_is_failure_told",
        "_is_reading",
        "_look_interval_s",
        "_looking",
        "_loop",
        "_reader",
        "_socket",
        "_unsent",
        "_write_fileno",
        "read_limit",
        "unsent_bytes",
    )

    def __init__(
        self,
        sock: Connection,
        reader: SocketReader,
        *,
        write_fileno: int | None = None,
        look_interval_s: float = LOOK_INTERVAL_S,
    ) -> None:
        """``write_fileno``: where it is another descriptor than the one that is read."""
        self._socket = sock
        self._write_fileno = sock.fileno() if write_fileno is None else write_fileno
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._look_interval_s = look_interval_s
        self._looking: asyncio.TimerHandle | None = None
        self._is_reading = False
        self._has_ended = False
        """The peer has sent FIN."""
        self._has_failed = False
        self._is_failure_told = False
        self._unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        """Of what was given to ``write``: the socket takes no more now."""
        self.read_limit = READ_BYTES
        """What one read takes, at most."""

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` or ``reset`` was called."""
        return self._socket.fileno() < 0

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Send payload; what the socket does not take waits, and ``drained`` follows."""
        if self._has_failed or self.is_closed:
            return
        is_waiting = bool(self._unsent)
        self._unsent.extend(memoryview(piece) for piece in pieces)
        self.unsent_bytes += sum(map(len, pieces))
        if not is_waiting and not self._send():
            self._loop.add_writer(self._write_fileno, self._go_on)

    def _send(self) -> bool:
        """Send what waits; False when the socket takes no more now."""
        unsent = self._unsent
        while unsent:
            pieces = [unsent[index] for index in range(min(len(unsent), _PIECES_AT_ONCE))]
            try:
                sent = self._socket.sendmsg(pieces)
            except BlockingIOError:
                return False
            except OSError as error:
                # not now: whoever writes is in the midst of something
                self._fail_soon(error)
                return True
            self.unsent_bytes -= sent
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.popleft())
            if sent:
                unsent[0] = unsent[0][sent:]
        return True

    def _go_on(self) -> None:
        if self._send():
            self._loop.remove_writer(self._write_fileno)
            if not self._has_failed:
                self._reader.drained()

    def finish(self) -> bool:
        """Nothing more will be written: FIN. False: the connection has broken, and the reader is
        about to hear of it.
        """
        if not self._has_failed:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:  # where nothing is read now, nothing else would tell
                self._fail_soon(error)
        return not self._has_failed

    def pause(self) -> None:
        """Read nothing for now."""
        if self._is_reading:
            self._stop_reading()
            self._look_later()

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.fileno())

    def resume(self) -> None:
        """Read."""
        if not (self._is_reading or self._has_ended or self._has_failed or self.is_closed):
            self._is_reading = True
            self._loop.add_reader(self._socket.fileno(), self._receive)

    def _receive(self) -> None:
        try:
            received = self._socket.recv_into(_payload, self.read_limit)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if received:
            self._reader.receive(_buffer, received)
            if self._is_reading:
                self._check()
        else:
            self._has_ended = True
            self.pause()
            self._reader.receive_end()

    def _look_later(self) -> None:
        # one timer at a time, however often it is paused
        if self._looking is None:
            self._looking = self._loop.call_later(self._look_interval_s, self._look)

    def _look(self) -> None:
        self._looking = None
        if self._is_reading or self._has_failed or self.is_closed:
            return
        self._check()
        if not self._has_failed:
            self._look_later()

    def _check(self) -> None:
        """Fail if the connection has broken. uvloop tells of that once (libuv gives up watching a
        descriptor with EPOLLERR), and then there may be data to read first.
        """
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._fail(OSError(number, os.strerror(number)))

    def _fail_soon(self, error: OSError) -> None:
        self._has_failed = True
        # the kernel tells of a reset once: whoever reads now would take it for an ordinary end
        self._stop_reading()
        self._unsent.clear()
        self.unsent_bytes = 0
        self._loop.call_soon(self._fail, error)

    def _fail(self, error: OSError) -> None:
        if self.is_closed or self._is_failure_told:
            return
        self._has_failed = self._has_ended = self._is_failure_told = True
        self._stop_reading()
        if error.errno in (errno.EPIPE, errno.ENOTCONN):
            # what the kernel says once it has said ECONNRESET
            self._reader.receive_failure(os.strerror(errno.ECONNRESET))
        else:
            self._reader.receive_failure(error.strerror or str(error))

    def close(self) -> None:
        """Both directions have ended in order."""
        self._forget()
        self._socket.close()

    def reset(self) -> None:
        """RST: this is no ordinary end."""
        self._forget()
        if isinstance(self._socket, socket.socket):
            reset_tcp(self._socket)
        else:
            self._socket.close()

    def _forget(self) -> None:
        if not self.is_closed:
            self._stop_reading()
            self._loop.remove_writer(self._write_fileno)
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        self._unsent.clear()
        self.unsent_bytes = 0
