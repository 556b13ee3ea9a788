"""Takes connections from a listening TCP socket, and no more at once than a bound."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

ACCEPT_PAUSE_S: Final = 0.5
"""After this process or host had no descriptor or memory for one more connection."""
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """The listening socket is its caller's."""

    def __init__(
        self, listener: socket.socket, most: int, on_exhausted: Callable[[str], None]
    ) -> None:
        """``on_exhausted``: a connection has to wait, because the host has no more of something."""
        self._listener = listener
        self._most = most
        self._on_exhausted = on_exhausted
        self._room = asyncio.Event()
        self._room.set()
        self.open = 0
        """Connections that are being served."""

    async def run(self, serve: Callable[[socket.socket], Coroutine[Any, Any, object]]) -> None:
        """Serve every connection until cancelled; beyond the most, others wait to be accepted."""
        async with asyncio.TaskGroup() as serving:
            while True:
                await self._room.wait()
                client = await self.accept()
                self.open += 1
                if self.open >= self._most:
                    self._room.clear()
                serving.create_task(serve(client)).add_done_callback(self._ended)
                # a crowd of newcomers must not keep those that are here from being served
                await asyncio.sleep(0)

    async def accept(self) -> socket.socket:
        """The next connection, whatever the bound. Raises ``OSError`` once the socket is closed."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return (await loop.sock_accept(self._listener))[0]
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._on_exhausted(error.strerror or str(error))
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                elif error.errno == errno.EBADF:
                    raise
                # whatever else it is, it is the newcomer's: accept(2) reports its errors here

    def _ended(self, _: asyncio.Task[object]) -> None:
        self.open -= 1
        self._room.set()
