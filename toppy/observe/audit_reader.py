"""Reads audit logs: which files one has, its last lines, and whether it is what was written.

A log is the file at its path and, beside it, those that rotation has put away: ``audit.jsonl`` and
``audit.000000000001.jsonl``, each named by the sequence number of its first entry.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toppy.wire.audit_entry import (
    MAX_LINE_BYTES,
    AuditError,
    Chain,
    Checkpoint,
    SignatureMismatchError,
    Verifier,
    check_checkpoint,
    parse_checkpoint,
    parse_entry,
)

_SEQ_DIGITS = 12
_CHUNK_BYTES = 1 << 20
_PROGRESS_LINES = 5_000


class AuditLogError(AuditError):
    """What is wrong with a log: file, line (from 1; 0: the file as a whole) and cause."""

    def __init__(self, path: Path, line: int, cause: str) -> None:
        self.path = path
        self.line = line
        self.cause = f"line {line}: {cause}" if line else cause
        super().__init__(f"{path.name}: {self.cause}")


@dataclass(frozen=True, slots=True)
class Verified:
    """A log that is what its writer wrote."""

    entries: int
    """Verified; all of the log's, unless its first files are elsewhere."""
    count: int
    """The last one's sequence number."""
    head: str | None
    files: int
    checkpoints: int
    notes: tuple[str, ...]
    """What a person should know about it all the same."""


def rotated_path(path: Path, first_seq: int) -> Path:
    """What the file at ``path`` is called once it is put away."""
    return path.with_name(f"{path.stem}.{first_seq:0{_SEQ_DIGITS}}{path.suffix}")


def checkpoint_path(path: Path) -> Path:
    """Where a log's checkpoints are when nothing else is said."""
    return path.with_name(f"{path.name}.checkpoints")


def lock_path(path: Path) -> Path:
    """What the one writer of a log has locked."""
    return path.with_name(f"{path.name}.lock")


def log_files(path: Path) -> list[Path]:
    """A log's files, the oldest first; none when there is no log. Raises ``OSError``."""
    name = re.compile(rf"{re.escape(path.stem)}\.([0-9]{{{_SEQ_DIGITS},}}){re.escape(path.suffix)}")
    try:
        beside = [p for p in path.parent.iterdir() if name.fullmatch(p.name)]
    except FileNotFoundError:
        return []
    # by number: names are longer from the 10**12th entry on
    beside.sort(key=lambda p: int(p.name.removesuffix(path.suffix).rpartition(".")[2]))
    return [*beside, path] if path.exists() else beside


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, bool]]:
    """Lines from ``offset`` on, and whether each ends in a newline: only the last may not.

    Raises ``OSError``, and ``AuditError`` for a line that no writer wrote.
    """
    rest = b""
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise AuditError(f"a line has more than {MAX_LINE_BYTES} bytes")
            for line in lines:
                yield line, True
    if rest:
        yield rest, False


def last_lines(path: Path, count: int) -> list[bytes]:
    """The last lines of one file that end in a newline, at most ``count``. Raises ``OSError``."""
    return _last_lines(path, count)[0]


def torn_tail(path: Path) -> bytes:
    """What follows the last newline: an entry that its writer did not finish, or nothing."""
    return _last_lines(path, 1)[1]


def _last_lines(path: Path, count: int) -> tuple[list[bytes], bytes]:
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        data = b""
        while position and data.count(b"\n") <= count and len(data) <= (count + 1) * MAX_LINE_BYTES:
            step = min(_CHUNK_BYTES if count > 1 else 1 << 14, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    *lines, torn = data.split(b"\n")
    return lines[-count:] if count else [], torn


def is_being_written(path: Path) -> bool:
    """Whether a writer has the log locked now."""
    try:
        lock = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def read_checkpoints(path: Path) -> list[Checkpoint]:
    """All of a file, the oldest first; none where there is no file.

    Raises ``OSError``, and ``AuditLogError`` for a line that is none. An unfinished last one does
    not count.
    """
    found: list[Checkpoint] = []
    try:
        for number, (line, is_whole) in enumerate(read_lines(path), 1):
            if not is_whole:
                break
            try:
                found.append(parse_checkpoint(line))
            except AuditError as error:
                raise AuditLogError(path, number, str(error)) from None
    except FileNotFoundError:
        return []
    return found


def last_checkpoint(path: Path) -> Checkpoint | None:
    """The newest of a file, without reading the others. Raises as ``read_checkpoints``."""
    try:
        lines = last_lines(path, 1)
    except FileNotFoundError:
        return None
    try:
        return parse_checkpoint(lines[0]) if lines else None
    except AuditError as error:
        raise AuditLogError(path, 0, f"the last line is wrong: {error}") from None


def verify_log(
    path: Path,
    verifier: Verifier | None,
    *,
    checkpoints: Path,
    unsigned: bool = False,
    every_signature: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Verified:
    """Every entry of every file against the chain, the key and the checkpoints.

    ``on_progress`` is told now and then how many bytes have been read. Raises ``OSError`` and
    ``AuditLogError``.
    """
    options = _Options(verifier, checkpoints, unsigned, every_signature, on_progress)
    while True:
        files = log_files(path)
        if not files:
            raise FileNotFoundError(2, "there is no such log", str(path))
        try:
            return _verify_files(path, files, options)
        except (AuditError, FileNotFoundError):
            # a file may have been put away, or deleted, meanwhile
            if not is_being_written(path) or log_files(path) == files:
                raise


@dataclass(frozen=True, slots=True)
class _Options:
    verifier: Verifier | None
    checkpoints: Path
    unsigned: bool
    every_signature: bool
    on_progress: Callable[[int], None]


def _verify_files(path: Path, files: list[Path], options: _Options) -> Verified:
    verifier, unsigned, on_progress = options.verifier, options.unsigned, options.on_progress
    checkpoints, every_signature = options.checkpoints, options.every_signature
    marks = _Checkpoints(checkpoints, verifier, unsigned=unsigned)
    first = _first_seq(files[0])
    chain = Chain(verifier, unsigned=unsigned, every_signature=every_signature)
    notes: list[str] = []
    if first > 1:
        mark = marks.at(first - 1)
        if mark is None:
            raise AuditLogError(
                files[0],
                1,
                f"seq mismatch: {first} instead of 1, and {checkpoints.name} does not tell how "
                f"entry {first - 1} ended: bring the files before this one back, or name the "
                "log's checkpoints with --checkpoints",
            )
        # the files before are elsewhere, or were deleted; what they ended with is known
        chain.count, chain.head = mark.count, mark.head
        notes.append(f"entries 1 to {first - 1} are not here; a checkpoint tells how they ended")
    begun_at = chain.count
    firsts: list[tuple[int, Path]] = []
    read = 0
    for file in files:
        firsts.append((chain.count + 1, file))
        number = 0
        try:
            for number, (line, is_whole) in enumerate(read_lines(file), 1):
                read += len(line) + 1
                if not is_whole and _is_torn(line):
                    if file is path and is_being_written(path):
                        notes.append("the last line is being written")
                        break
                    raise AuditError("unfinished: its writer was interrupted")
                chain.add(line)
                marks.pass_by(chain)
                if number % _PROGRESS_LINES == 0:
                    on_progress(read)
        except SignatureMismatchError as error:
            raise _at_seq(firsts, error) from None
        except AuditError as error:
            raise AuditLogError(file, max(number, 1), str(error)) from None
    on_progress(read)
    try:
        chain.finish()
    except SignatureMismatchError as error:
        raise _at_seq(firsts, error) from None
    marks.finish(path, chain)
    return Verified(
        chain.count - begun_at, chain.count, chain.head, len(files), marks.passed, tuple(notes)
    )


def _at_seq(firsts: list[tuple[int, Path]], error: SignatureMismatchError) -> AuditLogError:
    first, file = next((f, p) for f, p in reversed(firsts) if f <= error.seq)
    return AuditLogError(file, error.seq - first + 1, str(error))


def _is_torn(line: bytes) -> bool:
    try:
        parse_entry(line)
    except AuditError:
        return True
    return False


def _first_seq(file: Path) -> int:
    """1 where it cannot be read: the chain says what is wrong."""
    for line, _ in read_lines(file):
        try:
            return parse_entry(line).seq
        except AuditError:
            break
    return 1


class _Checkpoints:
    """Those of a log, compared with the chain as it passes by them."""

    def __init__(self, path: Path, verifier: Verifier | None, *, unsigned: bool) -> None:
        self.passed = 0
        self._path = path
        self._verifier = verifier
        self._unsigned = unsigned
        self._lines: dict[int, int] = {}
        self._by_count: dict[int, Checkpoint] = {}
        self._all = read_checkpoints(path)
        for number, mark in enumerate(self._all, 1):
            other = self._by_count.setdefault(mark.count, mark)
            if other.head != mark.head:
                raise AuditLogError(
                    path, number, f"another entry {mark.count} than line {self._lines[mark.count]}"
                )
            self._lines.setdefault(mark.count, number)

    def at(self, count: int) -> Checkpoint | None:
        """A checkpoint that may be relied on. Raises ``AuditLogError``."""
        mark = self._by_count.get(count)
        if mark is not None:
            self._check(self._lines[count], mark)
        return mark

    def _check(self, number: int, mark: Checkpoint) -> None:
        try:
            check_checkpoint(mark, self._verifier, unsigned=self._unsigned)
        except AuditError as error:
            raise AuditLogError(self._path, number, str(error)) from None

    def pass_by(self, chain: Chain) -> None:
        mark = self._by_count.get(chain.count)
        if mark is None:
            return
        if mark.head != chain.head:
            raise AuditError(
                f"checkpoint mismatch: entry {mark.count} is another one than "
                f"{self._path.name} has in line {self._lines[mark.count]}"
            )
        self.passed += 1

    def finish(self, path: Path, chain: Chain) -> None:
        """The log has been read; what is wrong in it is more to the point than what is here."""
        for number, mark in enumerate(self._all, 1):
            self._check(number, mark)
        last = max(self._by_count, default=0)
        if last > chain.count:
            raise AuditLogError(
                path,
                0,
                f"truncated: it ends with entry {chain.count}, and {self._path.name} (line "
                f"{self._lines[last]}) knows of entry {last}",
            )
