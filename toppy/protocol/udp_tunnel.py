"""What one UDP tunnel keeps between datagrams, on either end (RFC 9298): pure.

Payloads travel in stretches: bytes back to back, each ``segment_size`` long, only the last may be
shorter (0: one payload, perhaps empty).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from toppy.errors import PeerError
from toppy.wire.capsule import (
    AUTHORIZATION,
    BARRIER,
    DATAGRAM,
    MAX_AUTHORIZATION_BYTES,
    MAX_TUNNEL_CLOSED_BYTES,
    TUNNEL_CLOSED,
    WRAP_UP,
    Capsule,
    CapsuleParser,
    encode_capsule,
)
from toppy.wire.http_datagram import (
    MAX_UDP_PAYLOAD_BYTES,
    encode_udp_payload,
    parse_http_datagram,
)

Stretch = tuple[bytes, int]
Buffer = bytes | bytearray | memoryview

_CONTEXT_ID_BYTES = 8
_GATEWAY_TAKES = frozenset({DATAGRAM, WRAP_UP, BARRIER, AUTHORIZATION})
_CLIENT_TAKES = frozenset({DATAGRAM, WRAP_UP, TUNNEL_CLOSED, BARRIER})


class HeldPayloads:
    """Payloads that wait, in order, and never more than a bound."""

    __slots__ = ("_stretches", "_total_bytes", "_total_datagrams")

    def __init__(self) -> None:
        self._stretches: deque[Stretch] = deque()
        self._total_bytes = 0
        self._total_datagrams = 0

    def __bool__(self) -> bool:
        return bool(self._stretches)

    def hold(
        self, payloads: Buffer, segment_size: int, *, max_datagrams: int, max_bytes: int
    ) -> int:
        """Keep a copy of a stretch behind the others; returns how many payloads were dropped
        instead: all of them, when one bound or the other would be passed.
        """
        count = count_payloads(len(payloads), segment_size)
        if (
            self._total_datagrams + count > max_datagrams
            or self._total_bytes + len(payloads) > max_bytes
        ):
            return count
        self._stretches.append((bytes(payloads), segment_size))
        self._total_datagrams += count
        self._total_bytes += len(payloads)
        return 0

    def take(self, least_bytes: int | None = None) -> list[Stretch]:
        """Stretches from the front, no longer held: all, or until they have ``least_bytes``."""
        taken: list[Stretch] = []
        size = 0
        while self._stretches and (least_bytes is None or size < least_bytes):
            payloads, segment_size = self._stretches.popleft()
            taken.append((payloads, segment_size))
            size += len(payloads)
            self._total_datagrams -= count_payloads(len(payloads), segment_size)
        self._total_bytes -= size
        return taken


class UdpTunnel:
    """Holds early payloads until the tunnel is open, and turns DATAGRAM capsules into payloads."""

    __slots__ = (
        "_held",
        "_hold_bytes",
        "_hold_datagrams",
        "_is_client",
        "_parser",
        "authorization",
        "barriers",
        "closed_because",
        "is_open",
        "is_wrapping_up",
        "unknown_contexts",
    )

    def __init__(self, *, hold_datagrams: int, hold_bytes: int, is_client: bool = False) -> None:
        self.is_open = False
        self.unknown_contexts = 0
        self.is_wrapping_up = False
        """Client: the gateway intends to end this stream."""
        self.barriers = 0
        """BARRIER capsules that have arrived."""
        self.authorization: str | None = None
        """Gateway: a newer token for this tunnel, until the router takes it from here."""
        self.closed_because: str | None = None
        """Client: the Proxy-Status with which the gateway ends the tunnel."""
        self._is_client = is_client
        self._hold_datagrams = hold_datagrams
        self._hold_bytes = hold_bytes
        self._held = HeldPayloads()
        self._parser = CapsuleParser(
            MAX_UDP_PAYLOAD_BYTES + _CONTEXT_ID_BYTES,
            _CLIENT_TAKES if is_client else _GATEWAY_TAKES,
        )

    def hold(self, payloads: Buffer, segment_size: int) -> int:
        """Keep payloads that came before the tunnel is open (RFC 9297 section 3.1).

        Returns how many were dropped because the bound was reached.
        """
        return self._held.hold(
            payloads,
            segment_size,
            max_datagrams=self._hold_datagrams,
            max_bytes=self._hold_bytes,
        )

    def open(self) -> list[Stretch]:
        """The tunnel is open; returns what was held, in order."""
        self.is_open = True
        return self.discard_held()

    def discard_held(self) -> list[Stretch]:
        """Forget, and return, what was held: the tunnel was refused."""
        return self._held.take()

    def receive_body(self, data: bytes, *, ended: bool) -> list[bytes]:
        """Payloads of the DATAGRAM capsules in ``data``; unknown contexts are counted.

        Raises ``PeerError`` for a capsule that lies about its length or is cut off by the end, for
        WRAP_UP where it may not be, and for an AUTHORIZATION that is too long.
        """
        payloads = []
        for capsule in self._parser.receive(data):
            if capsule.capsule_type == BARRIER:
                self.barriers += 1
                continue
            if capsule.capsule_type == AUTHORIZATION:
                self._receive_authorization(capsule)
                continue
            if capsule.capsule_type != DATAGRAM:
                self._receive_farewell(capsule)
                continue
            context_id, payload = parse_http_datagram(capsule.value)
            if context_id == 0:
                payloads.append(bytes(payload))
            else:
                self.unknown_contexts += 1
        if ended:
            self._parser.receive_end()
        return payloads

    def _receive_authorization(self, capsule: Capsule) -> None:
        if len(capsule.value) > MAX_AUTHORIZATION_BYTES:
            raise PeerError(f"AUTHORIZATION has {len(capsule.value)} bytes")
        # what is not ASCII is no token that anybody would take
        self.authorization = capsule.value.decode("ascii", "replace")

    def _receive_farewell(self, capsule: Capsule) -> None:
        if capsule.capsule_type == WRAP_UP:
            if not self._is_client:
                raise PeerError("a client may not send WRAP_UP")
            if capsule.value or self.is_wrapping_up:
                raise PeerError("WRAP_UP has no value, and comes once")
            self.is_wrapping_up = True
        elif len(capsule.value) > MAX_TUNNEL_CLOSED_BYTES:
            raise PeerError(f"TUNNEL_CLOSED has {len(capsule.value)} bytes")
        else:
            self.closed_because = capsule.value.decode("ascii", "replace")


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
