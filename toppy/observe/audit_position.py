"""How far a log's collector is, kept beside the log (`audit.jsonl.shipped`)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from toppy.observe.audit_reader import log_files, read_lines
from toppy.wire.audit_entry import MAX_LINE_BYTES, AuditError, parse_entry


class Position(msgspec.Struct, frozen=True):
    """The end of what the collector has taken."""

    seq: int = 0
    """Of the last entry that it has taken."""
    hash: str | None = None
    """That entry's."""
    first_seq: int = 0
    """Of that entry's file, whatever it is called by now."""
    offset: int = 0
    """Of the next line in it."""


_positions = msgspec.json.Decoder(Position)


def shipped_path(path: Path) -> Path:
    """Where it is kept how far a log's collector is."""
    return path.with_name(f"{path.name}.shipped")


def read_position(path: Path) -> Position:
    """The beginning where nothing is known. Raises ``OSError``."""
    try:
        return _positions.decode(path.read_bytes())
    except FileNotFoundError:
        return Position()
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Position()  # all of it again: at least once


def write_position(path: Path, position: Position) -> None:
    """In one step. Raises ``OSError``."""
    unfinished = path.with_name(f"{path.name}.new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        give_to_owner(descriptor, path.parent)
        file.write(msgspec.json.encode(position))
    unfinished.rename(path)


def give_to_owner(descriptor: int, directory: Path) -> None:
    """What root makes beside a service's log is the service's. Raises ``OSError``."""
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def first_seq(file: Path) -> int:
    """Of a file's first entry; 0: it has none yet. Raises ``OSError`` and ``AuditError``."""
    for line, is_whole in read_lines(file):
        return parse_entry(line).seq if is_whole else 0
    return 0


def shipped_seq(path: Path, shipped: Path) -> int:
    """The last entry of *this* log that the collector has, as far as the files here prove it.

    0 where they do not: the position is of another log, or of a file that is not here any more.
    Raises ``OSError`` and ``AuditError``.
    """
    position = read_position(shipped)
    if not position.seq:
        return 0
    for file in log_files(path):
        if first_seq(file) != position.first_seq:
            continue
        with file.open("rb") as opened:
            begin = max(0, position.offset - MAX_LINE_BYTES)
            opened.seek(begin)
            read = opened.read(position.offset - begin)
        if not read.endswith(b"\n"):
            return 0
        try:
            last = parse_entry(read[:-1].rpartition(b"\n")[2])
        except AuditError:
            return 0
        return position.seq if (last.seq, last.hash) == (position.seq, position.hash) else 0
    return 0
