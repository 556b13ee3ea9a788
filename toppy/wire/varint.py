"""Variable-length integers of QUIC (RFC 9000 section 16)."""

from __future__ import annotations

from toppy.errors import DatagramError, LocalError

MAX_VARINT = (1 << 62) - 1


def encode_varint(value: int) -> bytes:
    """The shortest encoding of ``value``, 0 to 2^62-1: 1, 2, 4 or 8 bytes."""
    if value < 0x40 and value >= 0:
        return value.to_bytes(1)
    if 0 <= value < 0x4000:
        return (value | 0x4000).to_bytes(2)
    if 0 <= value < 0x4000_0000:
        return (value | 0x8000_0000).to_bytes(4)
    if 0 <= value <= MAX_VARINT:
        return (value | 0xC000_0000_0000_0000).to_bytes(8)
    raise LocalError(f"{value} is no variable-length integer: 0 to 2^62-1")


def read_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """(value, offset after it), or None when ``data`` ends before it does."""
    if offset >= len(data):
        return None
    first = data[offset]
    size = 1 << (first >> 6)
    end = offset + size
    if end > len(data):
        return None
    return int.from_bytes(data[offset:end]) & ((1 << (8 * size - 2)) - 1), end


def parse_varint(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int]:
    """Like ``read_varint``, but raises ``DatagramError`` when the integer is cut off."""
    found = read_varint(data, offset)
    if found is None:
        raise DatagramError("a variable-length integer is cut off")
    return found
