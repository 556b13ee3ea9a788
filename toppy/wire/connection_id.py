"""Connection IDs that name their worker, so that the kernel can steer packets (DESIGN: Processes).

Layout, 10 bytes::

    0         marker, so that strangers' random IDs are rarely taken for ours
    1         server ID (0 for a single gateway; room for an L4 balancer, as QUIC-LB asks)
    2         slot of the worker's socket
    3         generation, modulo 256
    4 .. 9    random
"""

from __future__ import annotations

from dataclasses import dataclass

CONNECTION_ID_BYTES = 10
MARKER = 0x54
PREFIX_BYTES = 4
MAX_SLOTS = 256


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """What a connection ID says about the worker that issued it."""

    slot: int
    generation: int
    """Modulo 256."""
    server_id: int = 0


def encode_prefix(slot: int, generation: int, *, server_id: int = 0) -> bytes:
    """The first ``PREFIX_BYTES`` of every connection ID that a worker issues.

    ``slot`` and ``server_id`` are below 256; ``generation`` is taken modulo 256.
    """
    return bytes((MARKER, server_id, slot, generation % 256))


def encode_family(*, server_id: int = 0) -> bytes:
    """What all connection IDs of one gateway begin with, whichever worker issued them."""
    return bytes((MARKER, server_id))


def parse_connection_id(connection_id: bytes, *, server_id: int = 0) -> WorkerAddress | None:
    """Who issued ``connection_id``, or None when it is not one of ours."""
    if len(connection_id) != CONNECTION_ID_BYTES:
        return None
    if connection_id[0] != MARKER or connection_id[1] != server_id:
        return None
    return WorkerAddress(connection_id[2], connection_id[3], server_id)


def destination_connection_id(packet: bytes) -> bytes | None:
    """The destination connection ID of a packet sent to us (RFC 8999 section 5), if it has one.

    Short headers do not say the length; ours is assumed.
    """
    if not packet:
        return None
    if packet[0] & 0x80:
        if len(packet) < 6 or len(packet) < 6 + packet[5]:
            return None
        return packet[6 : 6 + packet[5]]
    if len(packet) < 1 + CONNECTION_ID_BYTES:
        return None
    return packet[1 : 1 + CONNECTION_ID_BYTES]
