"""What aioquic has delivered of a connection's streams and the caller has not taken yet.

aioquic hands over every byte as it arrives. Here a paused stream's bytes wait, and a busy stream's
beyond its turn; as long as they do, ``EngineConnection`` gives the peer no credit for them.
"""

from __future__ import annotations

from collections import deque

from toppy.quic.engine import READ_TURN_BYTES


class StreamReaders:
    """Held bytes of one connection, per stream. ``turn`` counts the caller's polls: each lets every
    stream report ``READ_TURN_BYTES`` more.

    ``extension_bytes`` is what the connection's window has to grow by, so that paused streams with
    unread data (``stream_window_bytes`` each, ``paused_window_bytes`` in all) take no room from
    the others. It never shrinks: a stream that was paused once will be again.
    """

    def __init__(self, stream_window_bytes: int, paused_window_bytes: int) -> None:
        self.extension_bytes = 0
        self.held_bytes = 0
        self._stream_window_bytes = stream_window_bytes
        self._paused_window_bytes = paused_window_bytes
        self._chunks: dict[int, deque[bytes]] = {}
        self._sizes: dict[int, int] = {}
        self._ended: set[int] = set()
        self._paused: set[int] = set()
        self._taken: dict[int, tuple[int, int]] = {}

    def held_of(self, stream_id: int) -> int:
        """Bytes of a stream that were not taken."""
        return self._sizes.get(stream_id, 0)

    def is_holding(self, stream_id: int) -> bool:
        """Whether bytes or the end of a stream were not taken."""
        return stream_id in self._chunks

    def add(self, stream_id: int, data: bytes, *, ended: bool) -> None:
        """Bytes arrived; ``ended`` says that they are the last."""
        self._chunks.setdefault(stream_id, deque()).append(data)
        self._sizes[stream_id] = self.held_of(stream_id) + len(data)
        self.held_bytes += len(data)
        if ended:
            self._ended.add(stream_id)
        if stream_id in self._paused:
            self._extend()

    def pause(self, stream_id: int) -> None:
        """Let ``take`` give nothing of a stream."""
        self._paused.add(stream_id)
        if stream_id in self._chunks:
            self._extend()

    def resume(self, stream_id: int) -> None:
        """Let ``take`` give bytes of a stream again."""
        self._paused.discard(stream_id)

    def has_unread(self) -> bool:
        """Whether a stream that is not paused has something for the next turn."""
        return any(stream_id not in self._paused for stream_id in self._chunks)

    def readable(self) -> list[int]:
        """The streams that are not paused and have something."""
        return [stream_id for stream_id in self._chunks if stream_id not in self._paused]

    def take(self, stream_id: int, turn: int | None) -> tuple[bytes, bool] | None:
        """(bytes, whether they are the last) that may be reported in this turn; None: nothing.
        Without a turn: all of them.
        """
        chunks = self._chunks.get(stream_id)
        if chunks is None or stream_id in self._paused:
            return None
        last_turn, taken = self._taken.get(stream_id, (turn, 0))
        if last_turn != turn:
            taken = 0
        room = READ_TURN_BYTES - taken if turn is not None else self._sizes[stream_id]
        found: list[bytes] = []
        size = 0
        while chunks and size + len(chunks[0]) <= room:
            size += len(chunks[0])
            found.append(chunks.popleft())
        if chunks and size < room:
            found.append(chunks[0][: room - size])
            chunks[0] = chunks[0][room - size :]
            size = room
        if not found:
            return None
        ended = not chunks and stream_id in self._ended
        self.held_bytes -= size
        self._sizes[stream_id] -= size
        if turn is not None:
            self._taken[stream_id] = (turn, taken + size)
        if not chunks:
            del self._chunks[stream_id], self._sizes[stream_id]
        if ended:
            self.forget(stream_id)
        return b"".join(found), ended

    def forget(self, stream_id: int) -> None:
        """Discard what is held of a stream that was reset or stopped."""
        self._chunks.pop(stream_id, None)
        self.held_bytes -= self._sizes.pop(stream_id, 0)
        self._ended.discard(stream_id)
        self._paused.discard(stream_id)
        self._taken.pop(stream_id, None)

    def clear(self) -> None:
        """The connection is gone."""
        for kept in (self._chunks, self._sizes, self._ended, self._paused, self._taken):
            kept.clear()
        self.held_bytes = 0

    def _extend(self) -> None:
        holding = sum(stream_id in self._chunks for stream_id in self._paused)
        wanted = min(holding * self._stream_window_bytes, self._paused_window_bytes)
        self.extension_bytes = max(self.extension_bytes, wanted)
