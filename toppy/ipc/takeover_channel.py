"""How a new control plane takes over the workers of one that died, and their sockets.

Each worker listens on a unix socket in the runtime directory (mode 0700). Whoever knows the
worker's secret is its control plane from then on: it gets the descriptors that the worker holds,
and the connection stays open, so that its end tells the worker that the control plane is gone.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

_SECRET_BYTES = 64
_MOST_DESCRIPTORS = 250
"""One message carries at most 253 (SCM_MAX_FD)."""
_DEADLINE_S = 2.0
_MOST_PEERS = 8
"""Of those that have not proved themselves; more wait."""
_PAUSE_S = 0.1
"""After a connection that could not be accepted."""


class TakeoverListener:
    """A worker's end. ``on_taken`` is called when a new control plane has proved itself,
    ``on_lost`` when its connection ends, ``on_trouble`` when one cannot be heard now.
    """

    def __init__(
        self,
        path: str,
        secret: str,
        descriptors: Sequence[int],
        on_taken: Callable[[], None],
        on_lost: Callable[[], None],
        *,
        on_trouble: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._secret = secret.encode()
        self._descriptors = list(descriptors)
        self._on_taken = on_taken
        self._on_lost = on_lost
        self._on_trouble = on_trouble
        self._owner: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        Path(path).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(16)
        self._listener.setblocking(False)
        self._peers: dict[asyncio.Task[None], socket.socket] = {}
        self._task = self._loop.create_task(self._serve())

    @property
    def can_be_found(self) -> bool:
        """Whether its path is still there: not after the runtime directory was removed."""
        return Path(self._path).exists()

    def close(self) -> None:
        """Be found no more."""
        self._task.cancel()
        for peer in self._peers:
            peer.cancel()
        self._listener.close()
        self._drop_owner()
        Path(self._path).unlink(missing_ok=True)

    async def _serve(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:  # no more descriptors, for example
                self._on_trouble(error)
                await asyncio.sleep(_PAUSE_S)
                continue
            connection.setblocking(False)
            peer = self._loop.create_task(self._meet(connection))
            self._peers[peer] = connection
            peer.add_done_callback(self._part)
            while len(self._peers) >= _MOST_PEERS:
                await asyncio.wait([*self._peers], return_when=asyncio.FIRST_COMPLETED)

    async def _meet(self, connection: socket.socket) -> None:
        said = b""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                while len(said) < _SECRET_BYTES:
                    more = await self._loop.sock_recv(connection, _SECRET_BYTES - len(said))
                    if not more:
                        return
                    said += more
            if not hmac.compare_digest(said, self._secret):
                return
            self._hand_over(connection)
        except (OSError, TimeoutError):
            return
        self._drop_owner()
        self._owner = connection
        self._loop.add_reader(connection.fileno(), self._receive)
        self._on_taken()

    def _part(self, peer: asyncio.Task[None]) -> None:
        connection = self._peers.pop(peer)
        if connection is not self._owner:
            connection.close()

    def _hand_over(self, connection: socket.socket) -> None:
        rest = self._descriptors
        while rest:
            now, rest = rest[:_MOST_DESCRIPTORS], rest[_MOST_DESCRIPTORS:]
            socket.send_fds(connection, [b"\1" if rest else b"\0"], now)

    def _receive(self) -> None:
        assert self._owner is not None
        try:
            said = self._owner.recv(16)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._drop_owner()
            self._on_lost()

    def _drop_owner(self) -> None:
        if self._owner is not None:
            self._loop.remove_reader(self._owner.fileno())
            self._owner.close()
            self._owner = None


def take_over(path: str, secret: str) -> tuple[socket.socket, list[int]]:
    """Become the control plane of a worker: the line to keep open, and copies of its descriptors.

    Blocks for two seconds at most. Raises ``OSError`` when the worker does not answer.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptors: list[int] = []
    try:
        line.settimeout(_DEADLINE_S)
        line.connect(path)
        line.sendall(secret.encode())
        is_more = b"\1"
        while is_more == b"\1":
            is_more, received, _, _ = socket.recv_fds(line, 1, _MOST_DESCRIPTORS)
            descriptors += received
            for descriptor in received:
                os.set_inheritable(descriptor, False)
            if not is_more:
                raise ConnectionResetError("the worker hung up")
    except OSError:
        line.close()
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return line, descriptors
