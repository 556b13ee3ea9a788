"""A ``ByteSocket`` that keeps what it is given and what is done with it."""

from __future__ import annotations

from collections.abc import Sequence

from toppy.protocol.stream_tunnel import Buffer


class FakeSocket:
    """Takes ``room`` bytes, then no more until the test says so."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.written = bytearray()
        self.is_reading = False
        self.can_finish = True
        self.events: list[str] = []

    @property
    def unsent_bytes(self) -> int:
        return max(0, len(self.written) - self.room)

    def write(self, pieces: Sequence[Buffer]) -> None:
        assert pieces
        for piece in pieces:
            self.written += piece

    def finish(self) -> bool:
        assert not self.unsent_bytes
        self.events.append("finish")
        return self.can_finish

    def pause(self) -> None:
        self.is_reading = False

    def resume(self) -> None:
        self.is_reading = True

    def close(self) -> None:
        self.events.append("close")

    def reset(self) -> None:
        self.events.append("reset")
