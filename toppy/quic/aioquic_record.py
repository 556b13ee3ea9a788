"""What the pure Python engine keeps of one connection."""

from __future__ import annotations

from toppy.quic.aioquic_connection import EngineConnection
from toppy.quic.aioquic_datagrams import DatagramQueue
from toppy.quic.aioquic_reading import StreamReaders
from toppy.quic.engine import Address, Transmit


class Record:
    """What the engine keeps of one connection.

    ``quic`` is None in the closing period: then only the routes remain, and what to repeat.
    """

    __slots__ = (
        "closes_answered",
        "closing_packets",
        "has_datagrams",
        "ids",
        "is_closed",
        "is_ready",
        "keep_alive_at",
        "number",
        "peer",
        "queue",
        "quic",
        "readers",
        "retired_ids",
        "send_stopped",
        "stopped",
        "watched",
    )

    def __init__(
        self, number: int, quic: EngineConnection, queue: DatagramQueue, readers: StreamReaders
    ) -> None:
        self.number = number
        self.quic: EngineConnection | None = quic
        self.queue = queue
        self.readers = readers
        self.watched: dict[int, int] = {}
        self.ids: list[bytes] = []
        self.retired_ids: list[bytes] = []
        self.is_ready = False
        self.has_datagrams = False
        self.is_closed = False
        self.keep_alive_at: float | None = None
        self.stopped: set[int] = set()
        self.send_stopped: set[int] = set()
        self.closing_packets: list[Transmit] = []
        self.closes_answered = 0
        self.peer: Address | None = None
