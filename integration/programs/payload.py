"""Bytes that are the same in every process, and of which no block is like another."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator

MIB = 1 << 20
_BLOCK = random.Random(6).randbytes(MIB)


def blocks(length: int) -> Iterator[memoryview]:
    """``length`` bytes; each is valid until the next. Every MiB begins with its number, so that
    whatever is lost, doubled or swapped changes the digest.
    """
    block = bytearray(_BLOCK)
    for start in range(0, length, MIB):
        block[:8] = start.to_bytes(8, "big")
        yield memoryview(block)[: min(MIB, length - start)]


def digest_of(chunks: Iterable[bytes | memoryview]) -> str:
    """Their SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def digest(length: int) -> str:
    """Of ``blocks(length)``."""
    return digest_of(blocks(length))
