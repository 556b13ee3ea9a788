"""What one UDP tunnel keeps between datagrams, on either end (RFC 9298): pure.

Payloads travel in stretches: bytes back to back, each ``segment_size`` long, only the last may be
shorter (0: one payload, perhaps empty).
"""

from __future__ import annotations

from collections.abc import Iterator

from toppy.wire.capsule import DATAGRAM, CapsuleParser, encode_capsule
from toppy.wire.http_datagram import (
    MAX_UDP_PAYLOAD_BYTES,
    encode_udp_payload,
    parse_http_datagram,
)

Stretch = tuple[bytes, int]
Buffer = bytes | bytearray | memoryview

_CONTEXT_ID_BYTES = 8


class UdpTunnel:
    """Holds early payloads until the tunnel is open, and turns DATAGRAM capsules into payloads."""

    __slots__ = (
        "_held",
        "_held_bytes",
        "_held_datagrams",
        "_hold_bytes",
        "_hold_datagrams",
        "_parser",
        "is_open",
        "unknown_contexts",
    )

    def __init__(self, *, hold_datagrams: int, hold_bytes: int) -> None:
        self.is_open = False
        self.unknown_contexts = 0
        self._hold_datagrams = hold_datagrams
        self._hold_bytes = hold_bytes
        self._held: list[Stretch] = []
        self._held_datagrams = 0
        self._held_bytes = 0
        self._parser = CapsuleParser(MAX_UDP_PAYLOAD_BYTES + _CONTEXT_ID_BYTES)

    def hold(self, payloads: Buffer, segment_size: int) -> int:
        """Keep payloads that came before the tunnel is open (RFC 9297 section 3.1).

        Returns how many were dropped because the bound was reached.
        """
        count = count_payloads(len(payloads), segment_size)
        if (
            self._held_datagrams + count > self._hold_datagrams
            or self._held_bytes + len(payloads) > self._hold_bytes
        ):
            return count
        self._held.append((bytes(payloads), segment_size))
        self._held_datagrams += count
        self._held_bytes += len(payloads)
        return 0

    def open(self) -> list[Stretch]:
        """The tunnel is open; returns what was held, in order."""
        self.is_open = True
        return self.discard_held()

    def discard_held(self) -> list[Stretch]:
        """Forget, and return, what was held: the tunnel was refused."""
        held, self._held = self._held, []
        self._held_datagrams = self._held_bytes = 0
        return held

    def receive_body(self, data: bytes, *, ended: bool) -> list[bytes]:
        """Payloads of the DATAGRAM capsules in ``data``; unknown contexts are counted.

        Raises ``PeerError`` for a capsule that lies about its length or is cut off by the end.
        """
        payloads = []
        for capsule in self._parser.receive(data):
            context_id, payload = parse_http_datagram(capsule.value)
            if context_id == 0:
                payloads.append(bytes(payload))
            else:
                self.unknown_contexts += 1
        if ended:
            self._parser.receive_end()
        return payloads


def count_payloads(total_bytes: int, segment_size: int) -> int:
    """How many payloads a stretch has."""
    return -(-total_bytes // segment_size) if segment_size else 1


def split_payloads(payloads: Buffer, segment_size: int) -> Iterator[memoryview]:
    """The payloads of a stretch, one by one, without copying."""
    view = memoryview(payloads)
    if not segment_size:
        yield view
        return
    for start in range(0, len(view), segment_size):
        yield view[start : start + segment_size]


def encode_datagram_capsules(payloads: Buffer, segment_size: int) -> bytes:
    """A stretch as DATAGRAM capsules, for payloads that fit no packet (RFC 9297 section 3.5)."""
    return b"".join(
        encode_capsule(DATAGRAM, encode_udp_payload(payload))
        for payload in split_payloads(payloads, segment_size)
    )
