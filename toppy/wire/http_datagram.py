"""HTTP Datagrams of UDP proxying: a context ID, then the UDP payload (RFC 9298 section 5)."""

from __future__ import annotations

from toppy.errors import DatagramError
from toppy.wire.varint import parse_varint

UDP_CONTEXT_ID = 0
MAX_UDP_PAYLOAD_BYTES = 65527
"""RFC 9298 section 5; a socket can carry 65,507 over IPv4."""


def encode_udp_payload(payload: bytes | bytearray | memoryview) -> bytes:
    """The value of a DATAGRAM capsule that carries one UDP payload."""
    return b"\x00" + bytes(payload)


def parse_http_datagram(data: bytes) -> tuple[int, memoryview]:
    """(context ID, what follows it).

    Raises ``DatagramError`` when the context ID is cut off, and for a UDP payload that no UDP
    datagram could carry: RFC 9298 section 5 has the stream aborted then.
    """
    context_id, offset = parse_varint(data)
    if context_id == UDP_CONTEXT_ID and len(data) - offset > MAX_UDP_PAYLOAD_BYTES:
        raise DatagramError(
            f"a UDP payload of {len(data) - offset} bytes, at most {MAX_UDP_PAYLOAD_BYTES} exist"
        )
    return context_id, memoryview(data)[offset:]
