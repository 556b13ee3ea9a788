"""HTTP Datagrams (RFC 9297) in and out of one aioquic connection, grouped by tunnel, bounded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from toppy.model.drop_reason import DropReason
from toppy.quic.engine import Buffer, DatagramGroup
from toppy.wire.varint import encode_varint, read_varint

MAX_SEGMENTS: Final = 60
"""Of one GSO send; the kernel takes 64 or more everywhere."""
MAX_SEND_BYTES: Final = 65_000
"""Of one GSO send; a UDP send carries at most 65,507 bytes."""
_CONTEXT_UDP_PAYLOAD: Final = b"\0"
_QUANTUM_BYTES: Final = 1500
"""What one tunnel may send before the next has its turn: one large datagram."""
_MIN_COST_BYTES: Final = 64
"""What an entry costs in memory whatever its length: many empty datagrams are not free."""
_MAX_QUARTER_STREAM_ID: Final = (1 << 60) - 1


def parse_datagram_frame(data: bytes) -> tuple[int, int, int] | None:
    """(quarter stream ID, context ID, offset of the payload), or None when it is malformed.

    RFC 9297 section 2.1 and RFC 9298 section 5 say how it is built.
    """
    quarter = read_varint(data, 0)
    if quarter is None or quarter[0] > _MAX_QUARTER_STREAM_ID:
        return None
    context = read_varint(data, quarter[1])
    if context is None:
        return None
    return quarter[0], context[0], context[1]


def tunnel_prefix(quarter_stream_id: int) -> bytes:
    """What stands before the UDP payload in a DATAGRAM frame: quarter stream ID, context ID 0."""
    return encode_varint(quarter_stream_id) + _CONTEXT_UDP_PAYLOAD


class DatagramGroups:
    """Collects arrived payloads into groups for one GSO send each; keeps each tunnel's order."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], _OpenGroup] = {}
        self._done: list[DatagramGroup] = []

    def add(self, connection: int, quarter_stream_id: int, payload: bytes) -> None:
        """One payload that arrived for a tunnel."""
        key = (connection, quarter_stream_id)
        group = self._open.get(key)
        size = len(payload)
        if group is not None and (
            size == 0
            or size > group.segment_size
            or len(group.parts) >= MAX_SEGMENTS
            or group.total + size > MAX_SEND_BYTES
        ):
            self._finish(key)
            group = None
        if size == 0:
            self._done.append((connection, quarter_stream_id, b"", 0))
            return
        if group is None:
            group = self._open[key] = _OpenGroup(size)
        group.parts.append(payload)
        group.total += size
        if size < group.segment_size:
            self._finish(key)

    def take(self) -> list[DatagramGroup]:
        """The groups since the last call."""
        for key in list(self._open):
            self._finish(key)
        done, self._done = self._done, []
        return done

    def _finish(self, key: tuple[int, int]) -> None:
        group = self._open.pop(key)
        self._done.append((*key, b"".join(group.parts), group.segment_size))


class _OpenGroup:
    __slots__ = ("parts", "segment_size", "total")

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self.parts: list[bytes] = []
        self.total = 0


class DatagramQueue:
    """The DATAGRAM frames that wait in one connection, fair between its tunnels.

    It stands in the place of aioquic's own list of pending frames, which has no bound and which a
    frame that fits no packet blocks for good. aioquic asks whether there is one (``bool``), looks
    at the first (``[0]``) and takes it (``popleft``) once it is in a packet.

    ``max_frame_bytes`` says how long a frame's payload may be now (-1: none may be sent);
    ``drops`` counts what is dropped.
    """

    def __init__(
        self,
        *,
        tunnel_bytes: int,
        connection_bytes: int,
        max_frame_bytes: Callable[[], int],
        drops: Counter[DropReason],
    ) -> None:
        self._tunnel_bytes = tunnel_bytes
        self._connection_bytes = connection_bytes
        self._max_frame_bytes = max_frame_bytes
        self._drops = drops
        self._tunnels: dict[int, _TunnelQueue] = {}
        self._turns: deque[int] = deque()
        self._credit = _QUANTUM_BYTES
        self._waiting_bytes = 0

    def push(self, quarter_stream_id: int, payloads: Buffer, segment_size: int) -> None:
        """Queue UDP payloads (``segment_size`` each, the last may be shorter; 0: one payload).

        Payloads that fit no packet now are dropped and counted. A full tunnel loses its oldest; a
        full connection loses the oldest of its longest tunnel.
        """
        prefix = tunnel_prefix(quarter_stream_id)
        limit = self._max_frame_bytes() - len(prefix)
        total = len(payloads)
        step = segment_size or max(total, 1)
        for start in range(0, total or 1, step):
            payload = bytes(payloads[start : start + step])
            if len(payload) > limit:
                self._drops[DropReason.TOO_LARGE] += 1
                continue
            self._append(quarter_stream_id, prefix + payload)

    def backlog_bytes(self, quarter_stream_id: int) -> int:
        """What one tunnel has waiting."""
        tunnel = self._tunnels.get(quarter_stream_id)
        return tunnel.bytes if tunnel is not None else 0

    def discard(self) -> None:
        """Drop and count everything, and take no more: the connection is gone."""
        count = sum(len(tunnel.frames) for tunnel in self._tunnels.values())
        if count:
            self._drops[DropReason.UNKNOWN_STREAM] += count
        self._tunnels.clear()
        self._turns.clear()
        self._waiting_bytes = 0
        self._max_frame_bytes = _nothing_fits

    def __bool__(self) -> bool:
        while self._turns:
            # the limit can shrink while a frame waits: the peer's connection ID may get longer
            if len(self._tunnels[self._turns[0]].frames[0]) <= self._max_frame_bytes():
                return True
            self._drop_oldest(self._turns[0], DropReason.TOO_LARGE)
        return False

    def __getitem__(self, index: int) -> bytes:
        return self._tunnels[self._turns[0]].frames[index]

    def popleft(self) -> bytes:
        """Take the frame that ``[0]`` showed."""
        quarter_stream_id = self._turns[0]
        frame = self._remove_oldest(quarter_stream_id)
        self._credit -= len(frame)
        if self._credit <= 0:
            self._credit = _QUANTUM_BYTES
            if self._turns and self._turns[0] == quarter_stream_id:
                self._turns.rotate(-1)
        return frame

    def _append(self, quarter_stream_id: int, frame: bytes) -> None:
        cost = _cost(frame)
        if cost > self._tunnel_bytes or cost > self._connection_bytes:
            self._drops[DropReason.QUEUE_FULL] += 1
            return
        tunnel = self._tunnels.get(quarter_stream_id)
        while tunnel is not None and tunnel.bytes + cost > self._tunnel_bytes:
            self._drop_oldest(quarter_stream_id, DropReason.QUEUE_FULL)
            tunnel = self._tunnels.get(quarter_stream_id)
        while self._waiting_bytes + cost > self._connection_bytes:
            longest = max(self._tunnels, key=lambda each: self._tunnels[each].bytes)
            self._drop_oldest(longest, DropReason.QUEUE_FULL)
        tunnel = self._tunnels.get(quarter_stream_id)
        if tunnel is None:
            tunnel = self._tunnels[quarter_stream_id] = _TunnelQueue()
            self._turns.append(quarter_stream_id)
        tunnel.frames.append(frame)
        tunnel.bytes += cost
        self._waiting_bytes += cost

    def _drop_oldest(self, quarter_stream_id: int, reason: DropReason) -> None:
        self._remove_oldest(quarter_stream_id)
        self._drops[reason] += 1

    def _remove_oldest(self, quarter_stream_id: int) -> bytes:
        tunnel = self._tunnels[quarter_stream_id]
        frame = tunnel.frames.popleft()
        cost = _cost(frame)
        tunnel.bytes -= cost
        self._waiting_bytes -= cost
        if not tunnel.frames:
            del self._tunnels[quarter_stream_id]
            self._turns.remove(quarter_stream_id)
        return frame


class _TunnelQueue:
    __slots__ = ("bytes", "frames")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.bytes = 0


def _cost(frame: bytes) -> int:
    return max(len(frame), _MIN_COST_BYTES)


def _nothing_fits() -> int:
    return -1
