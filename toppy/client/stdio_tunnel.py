"""Standard input and output as one end of a tunnel, as ``ssh`` wants it of a ProxyCommand."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from toppy.client.gateway_far_side import GatewayStream
from toppy.net.stream_socket import SocketReader, StreamSocket
from toppy.net.tcp_relay import ByteCounters

_PUMP_BYTES: Final = 64 << 10


class StdioConnection:
    """Two descriptors that look like a connected socket. They are closed with it, and are as
    blocking then as they were before: other processes may share them.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._was_blocking = {fd: os.get_blocking(fd) for fd in (read_fd, write_fd)}
        # inetd and socat give sockets, or one that is both
        self._sockets = {fd: copy for fd in self._was_blocking if (copy := _copy_of_socket(fd))}
        for fd in self._was_blocking:
            os.set_blocking(fd, False)

    def fileno(self) -> int:
        """Of the side that is read; -1 once it is closed."""
        return self._read_fd

    @property
    def write_fileno(self) -> int:
        """Of the side that is written."""
        return self._write_fd

    def recv_into(self, buffer: memoryview, nbytes: int, /) -> int:
        """See ``socket.recv_into``."""
        return os.readv(self._read_fd, [buffer[:nbytes]])

    def sendmsg(self, buffers: Iterable[memoryview], /) -> int:
        """See ``socket.sendmsg``."""
        return os.writev(self._write_fd, list(buffers))

    def shutdown(self, how: int, /) -> None:
        """Nothing more is written: whoever reads there sees the end."""
        sock = self._sockets.get(self._write_fd)
        if sock is not None:  # closing is not enough where it is also what is read
            with suppress(OSError):
                sock.shutdown(how)
        self._end(self._write_fd)

    def getsockopt(self, level: int, optname: int, /) -> int:
        """Of the side that is read, where that is a socket; otherwise no error waits there."""
        sock = self._sockets.get(self._read_fd)
        return sock.getsockopt(level, optname) if sock is not None else 0

    def _end(self, fd: int) -> None:
        """Restore and close a descriptor, keeping its number taken: a later file must not become
        standard output.
        """
        if fd in self._was_blocking:
            if fd in self._sockets:
                self._sockets.pop(fd).close()
            with suppress(OSError):
                os.set_blocking(fd, self._was_blocking.pop(fd))
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, fd, inheritable=False)
            os.close(null)

    def close(self) -> None:
        """Both sides."""
        for fd in tuple(self._was_blocking):
            self._end(fd)
        self._read_fd = -1


def _copy_of_socket(fd: int) -> socket.socket | None:
    """Another descriptor of the same socket, if it is one."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    return socket.socket(fileno=os.dup(fd))


def watchable(fd: int) -> int:
    """``fd``, where an event loop can tell when there is something to read; otherwise (a file,
    ``/dev/null``) the end of a pipe that brings what is read there.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd):
        return fd
    read_end, write_end = os.pipe2(os.O_CLOEXEC)

    def pump() -> None:
        with suppress(OSError):  # nobody reads any more
            while data := os.read(fd, _PUMP_BYTES):
                view = memoryview(data)
                while view:
                    view = view[os.write(write_end, view) :]
        os.close(write_end)

    threading.Thread(target=pump, name="standard input", daemon=True).start()
    return read_end


async def carry_stdio(
    stream: GatewayStream, counters: ByteCounters, *, read_fd: int = 0, write_fd: int = 1
) -> str:
    """Relay until both directions have ended; why it was reset, or nothing."""
    connection = StdioConnection(watchable(read_fd), write_fd)

    def make(reader: SocketReader) -> StreamSocket:
        return StreamSocket(connection, reader, write_fileno=write_fd)

    try:
        return await stream.carry(make, counters)
    finally:
        connection.close()
