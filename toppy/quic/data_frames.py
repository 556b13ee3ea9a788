"""HTTP/3 DATA frames, the bulk of a request stream (RFC 9114 section 7.2.1): bytes in, content out.

aioquic reads everything else. It copies a chunk several times, which counts where a stream carries
hundreds of megabytes a second.
"""

from __future__ import annotations

from typing import Final

_DATA: Final = 0x00
_LENGTH_BITS: Final = (6, 14, 30, 62)
"""Of a variable-length integer, by its first two bits (RFC 9000 section 16)."""


def encode_data_header(length: int) -> bytes:
    """The header of a DATA frame with ``length`` bytes of content (below 2**30)."""
    if length < 1 << 6:
        return bytes((_DATA, length))
    if length < 1 << 14:
        return bytes((_DATA, 0x40 | length >> 8, length & 0xFF))
    return bytes((_DATA,)) + (0x80 << 24 | length).to_bytes(4, "big")


def split_data_frames(data: bytes, left: int) -> tuple[bytes, int, int]:
    """Take DATA frames from the front of ``data``, which begins with ``left`` bytes of content of
    the frame before.

    Returns (content, what is left of the last frame, how much of ``data`` that was). It ends early
    at a frame of another type, and at a frame header that is cut off.
    """
    size = len(data)
    if left >= size:
        return data, left - size, size
    view = memoryview(data)
    pieces = [view[:left]] if left else []
    used = left
    while used < size and data[used] == _DATA:
        start = used + 2
        if start > size:
            break
        first = data[used + 1]
        form = first >> 6
        length = first & 0x3F
        if form:
            start += (1 << form) - 1
            if start > size:
                break
            length = int.from_bytes(view[used + 1 : start], "big") & (1 << _LENGTH_BITS[form]) - 1
        end = start + length
        if length:
            pieces.append(view[start:end])
        if end > size:
            return _join(pieces), end - size, size
        used = end
    return _join(pieces), 0, used


def _join(pieces: list[memoryview]) -> bytes:
    return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
