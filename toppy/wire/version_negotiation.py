"""QUIC packets of a version that nobody speaks, and the answer to them (RFC 9000 section 6, RFC
8999 section 6): a question that every QUIC server answers at once, without a connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIN_PROBE_BYTES: Final = 1200
"""Servers leave smaller ones without an answer (RFC 9000 section 5.2.2)."""
UNKNOWN_VERSION: Final = 0x1A2A3A4A
"""Of the form that is reserved to exercise version negotiation (RFC 9000 section 15)."""
PROBE_ID_BYTES: Final = 8
_MAX_ID_BYTES: Final = 20
_LONG_HEADER: Final = 0xC0


@dataclass(frozen=True, slots=True)
class VersionNegotiation:
    """A server's answer; the IDs are the question's, the other way round."""

    destination_id: bytes
    source_id: bytes
    versions: tuple[int, ...]


def encode_version_probe(size: int, destination_id: bytes, source_id: bytes) -> bytes:
    """A UDP payload of ``size`` bytes that a QUIC server answers with the versions that it speaks.

    The IDs have 8 to 20 bytes; raises ``ValueError`` otherwise, or for a size below 1,200.
    """
    for each in (destination_id, source_id):
        if not PROBE_ID_BYTES <= len(each) <= _MAX_ID_BYTES:
            raise ValueError("a connection ID of a probe has 8 to 20 bytes")
    if size < MIN_PROBE_BYTES:
        raise ValueError("a probe has at least 1200 bytes")
    head = (
        bytes([_LONG_HEADER])
        + UNKNOWN_VERSION.to_bytes(4)
        + bytes([len(destination_id)])
        + destination_id
        + bytes([len(source_id)])
        + source_id
    )
    return head + bytes(size - len(head))


def parse_version_negotiation(data: bytes) -> VersionNegotiation | None:
    """What a server answered; None for any other packet (RFC 8999 section 6)."""
    if len(data) < 7 or not data[0] & 0x80 or data[1:5] != bytes(4):
        return None
    destination_end = 6 + data[5]
    if len(data) <= destination_end:
        return None
    source_begin = destination_end + 1
    source_end = source_begin + data[destination_end]
    versions = data[source_end:]
    if len(data) < source_end or not versions or len(versions) % 4:
        return None
    return VersionNegotiation(
        destination_id=data[6:destination_end],
        source_id=data[source_begin:source_end],
        versions=tuple(int.from_bytes(versions[at : at + 4]) for at in range(0, len(versions), 4)),
    )
