"""Writes an audit log: one writer, whole lines, an unbroken chain across files and restarts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toppy.model.audit_event import AuditAction, AuditEvent, Fact, reason_with_facts
from toppy.observe.audit_position import shipped_seq
from toppy.observe.audit_reader import (
    checkpoint_path,
    last_checkpoint,
    last_lines,
    lock_path,
    log_files,
    read_checkpoints,
    rotated_path,
    torn_tail,
)
from toppy.wire.audit_entry import (
    AuditEntry,
    AuditError,
    Signer,
    encode_checkpoint,
    encode_entry,
    entry_hash,
    make_checkpoint,
    make_entry,
    parse_entry,
)

Fsync = Literal["always", "interval", "never"]

_FSYNC_INTERVAL_S = 1.0
_LOCK_POLL_S = 0.02
_RETIRE_INTERVAL_S = 60.0
"""How often it is looked for files that need not be kept; also after each rotation."""
_FILE_MODE = 0o600
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class AuditLogOptions:
    """How a log is written."""

    signer: Signer | None = None
    fsync: Fsync = "interval"
    """After each ``append``; at most once a second (see ``maintain``); only with checkpoints."""
    rotate_bytes: int = 0
    """A file that has so many bytes is put away; 0: never."""
    rotate_interval_s: float = 0.0
    """A file whose first entry is so old is put away; 0: never."""
    checkpoints: Path | None = None
    """Where they are written; None: beside the log."""
    checkpoint_entries: int = 1000
    checkpoint_interval_s: float = 300.0
    """A checkpoint after so many entries, or so long after the first one since the last; and at
    every end of a file or a writer."""
    keep_files: int = 0
    """Files that were put away and are kept; 0: all."""
    keep_days: float = 0.0
    """A file that was put away is deleted when its last entry is so old; 0: never."""
    shipped: Path | None = None
    """How far the collector is: what it does not have is not deleted. None: there is none."""


class LockedError(AuditError):
    """Another writer has the log."""


class AuditLog:
    """The one writer of a log. Not to be used from two threads at once.

    Takes the lock, waiting ``lock_timeout_s`` at most, makes parent directories, and goes on after
    the last entry. An entry that an interrupted writer left unfinished is moved to a file of its
    own, and the log tells. Raises ``OSError``, ``LockedError``, and ``AuditError`` when the last
    entry is not what a writer wrote.
    """

    def __init__(
        self,
        path: Path,
        options: AuditLogOptions,
        *,
        actor: str,
        lock_timeout_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.seq = 0
        """The last entry's."""
        self.head: str | None = None
        """The last entry's hash."""
        self._options = options
        self._signer = options.signer
        self._clock = clock
        self._checkpoints = options.checkpoints or checkpoint_path(path)
        self._checkpoint_seq = 0
        self._checkpoint_due_at: float | None = None
        self._synced_at = 0.0
        self._is_dirty = False
        self._file = -1
        self._size = 0
        self._first_seq = 0
        """Of the open file; 0: it has no entry."""
        self._first_ms = 0
        self._actor = actor
        self._retired_at: float | None = None
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _take_lock(lock_path(path), lock_timeout_s)
        try:
            self._open_file()
            torn = self._mend()
            self._find_end()
            if torn:
                reason = reason_with_facts(
                    "the writer was interrupted in the middle of an entry", torn
                )
                recovered = AuditEvent(
                    actor, AuditAction.AUDIT_RECOVERED.value, str(path), True, None, reason
                )
                self.append([(int(clock() * 1000), recovered)])
        except BaseException:
            self._release()
            raise

    # beginning

    def _open_file(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, _FILE_MODE)
        self._size = os.fstat(self._file).st_size
        self._first_seq = self._first_ms = 0

    def _mend(self) -> dict[str, str | int]:
        """End the last line, or put away what is no line; facts about what was put away."""
        torn = torn_tail(self.path)
        if not torn:
            return {}
        try:
            parse_entry(torn)
        except AuditError:
            pass
        else:  # only its newline is missing
            self._write(b"\n")
            return {}
        kept = self.path.with_name(f"{self.path.name}.torn-{int(self._clock() * 1000)}")
        descriptor = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(torn)
        os.ftruncate(self._file, self._size - len(torn))
        self._size -= len(torn)
        return {"bytes": len(torn), "file": kept.name}

    def _find_end(self) -> None:
        """Where the chain goes on. Raises ``AuditError``."""
        if self._size:
            first = _parse(self.path, os.pread(self._file, 1 << 20, 0).partition(b"\n")[0])
            self._first_seq, self._first_ms = first.seq, first.unix_ms
        for file in reversed(log_files(self.path)):
            lines = last_lines(file, 1)
            if not lines:
                continue
            last = _parse(file, lines[0])
            if last.hash != entry_hash(last):
                raise AuditError(
                    f"{file}: the last entry's hash is wrong: nothing is appended to it. Keep the "
                    "file for those who look into it, and give the log another path"
                )
            self._check_key(file, last)
            self.seq, self.head = last.seq, last.hash
            break
        mark = last_checkpoint(self._checkpoints)
        if mark is None:
            return
        if mark.count > self.seq or (mark.count == self.seq and mark.head != self.head):
            raise AuditError(
                f"{self.path} ends with entry {self.seq}, and {self._checkpoints} knows of entry "
                f"{mark.count}: the log was cut or replaced. Nothing is appended to it; give the "
                "log another path"
            )
        self._checkpoint_seq = mark.count

    def _check_key(self, file: Path, last: AuditEntry) -> None:
        signer = self._signer
        if last.signature is None:
            return
        if signer is None:
            raise AuditError(
                f"{file} is signed and no signing key is set: nothing is appended to it; set the "
                "key, or give the log another path"
            )
        if signer.check(last.hash, last.signature):
            return
        raise AuditError(
            f"{file}: the last entry was signed with another key: nothing is appended to it. A new "
            "key begins a new log; give it another path"
        )

    # writing

    def append(self, events: Sequence[tuple[int, AuditEvent]]) -> list[AuditEntry]:
        """Write events, each with its Unix time in ms; all of them, or none.

        Raises ``OSError`` (a full disk) and ``AuditError`` (somebody else wrote, or took the file
        away); then nothing of it is in the log, as far as can be.
        """
        self._check_file()
        before = self.seq, self.head
        entries: list[AuditEntry] = []
        lines: list[bytes] = []
        waiting = 0
        try:
            for unix_ms, event in events:
                entry = make_entry(
                    event,
                    seq=self.seq + 1,
                    unix_ms=unix_ms,
                    prev_hash=self.head,
                    signer=self._signer,
                )
                line = encode_entry(entry) + b"\n"
                entries.append(entry)
                lines.append(line)
                waiting += len(line)
                self.seq, self.head = entry.seq, entry.hash
            self._rotate_if_due(entries[0].unix_ms if entries else 0, waiting, before)
            self._write(b"".join(lines))
        except BaseException:
            self.seq, self.head = before
            raise
        if entries and not self._first_seq:
            self._first_seq, self._first_ms = entries[0].seq, entries[0].unix_ms
        self._is_dirty = self._is_dirty or bool(entries)
        return entries

    def maintain(self, *, at_once: bool = False) -> None:
        """Do what is due: bring entries to the disk, write a checkpoint. Call it after ``append``
        and once a second. ``at_once``: also what is not due yet. Raises ``OSError``; the entries
        are in the file all the same.
        """
        now = self._clock()
        options = self._options
        new = self.seq - self._checkpoint_seq
        if new and self._checkpoint_due_at is None:
            self._checkpoint_due_at = now + options.checkpoint_interval_s
        is_due = self._checkpoint_due_at is not None and now >= self._checkpoint_due_at
        if new and (at_once or is_due or new >= options.checkpoint_entries):
            self._write_checkpoint(self.seq, self.head)
        elif self._is_dirty and options.fsync != "never":
            is_old = not 0 <= now - self._synced_at < _FSYNC_INTERVAL_S
            if at_once or is_old or options.fsync == "always":
                self._sync()

    def retire(self) -> list[AuditEntry]:
        """Delete files that need not be kept any more; the entries that say so, written before.

        Looks now and then only; call it as often as ``maintain``. Raises ``OSError`` and
        ``AuditError``.
        """
        options, now = self._options, self._clock()
        if not options.keep_files and not options.keep_days:
            return []
        last = self._retired_at
        if last is not None and 0 <= now - last < _RETIRE_INTERVAL_S:
            return []
        self._retired_at = now
        told: list[AuditEntry] = []
        for file, facts in files_to_retire(self.path, options, now):
            event = AuditEvent(
                self._actor,
                AuditAction.AUDIT_RETIRED.value,
                file.name,
                True,
                None,
                reason_with_facts("kept long enough, by setting", facts),
            )
            told += self.append([(int(now * 1000), event)])
            # the log must not have a gap of which it does not know
            self._sync()
            file.unlink()
        if told:
            _sync_directory(self.path.parent)
        return told

    def close(self) -> None:
        """Bring everything to the disk, and let another writer have the log. Raises ``OSError``."""
        if self._file < 0:
            return
        try:
            self.maintain(at_once=True)
        finally:
            self._release()

    def _release(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def _check_file(self) -> None:
        """What is written to a file that is gone from its place would be lost."""
        if self._file < 0:
            raise AuditError(f"{self.path} is closed")
        own = os.fstat(self._file)
        try:
            there = os.stat(self.path)  # noqa: PTH116  # the pair of os.fstat
        except FileNotFoundError:
            raise AuditError(f"{self.path} was taken away while it was written") from None
        if (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino):
            raise AuditError(f"{self.path} was replaced while it was written")
        if own.st_size != self._size:
            raise AuditError(f"{self.path} was changed by somebody else while it was written")

    def _write(self, data: bytes) -> None:
        """All of it, or nothing."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._size = os.fstat(self._file).st_size
            raise
        self._size += written

    def _sync(self) -> None:
        os.fdatasync(self._file)
        self._is_dirty = False
        self._synced_at = self._clock()

    def _write_checkpoint(self, count: int, head: str | None) -> None:
        """The entries first: a checkpoint that knows more than the disk would accuse the log."""
        assert head is not None
        self._sync()
        mark = make_checkpoint(count, head, int(self._clock() * 1000), self._signer)
        self._checkpoints.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self._checkpoints, flags, _FILE_MODE)
        try:
            size = os.fstat(descriptor).st_size
            line = encode_checkpoint(mark) + b"\n"
            # one that was interrupted must not swallow the next
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                size -= len(torn_tail(self._checkpoints))
                os.ftruncate(descriptor, size)
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise OSError(28, os.strerror(28), str(self._checkpoints))
            if self._options.fsync != "never":
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        self._checkpoint_seq, self._checkpoint_due_at = count, None

    # rotation

    def _rotate_if_due(self, unix_ms: int, size: int, end: tuple[int, str | None]) -> None:
        options = self._options
        if not self._first_seq:
            return
        is_full = options.rotate_bytes and self._size + size > options.rotate_bytes
        age_s = (unix_ms - self._first_ms) / 1000
        is_old = options.rotate_interval_s and age_s >= options.rotate_interval_s
        if not is_full and not is_old:
            return
        if end[0] > self._checkpoint_seq:
            self._write_checkpoint(*end)
        else:
            self._sync()
        put_away = rotated_path(self.path, self._first_seq)
        if put_away.exists():
            raise AuditError(f"{put_away} exists already: {self.path} cannot be put away")
        self.path.rename(put_away)
        before = self._file
        try:
            self._open_file()
        except OSError:
            put_away.rename(self.path)
            raise
        os.close(before)
        self._retired_at = None
        _sync_directory(self.path.parent)


def files_to_retire(
    path: Path, options: AuditLogOptions, now: float
) -> list[tuple[Path, dict[str, Fact]]]:
    """The oldest files of a log, those that need not be kept at ``now`` (Unix time), with facts.

    Never one after a file that must be kept: what is left has no gap. Nor one without a checkpoint
    of its end, from which those that verify begin. Raises ``OSError`` and ``AuditError``.
    """
    away = [file for file in log_files(path) if file != path]
    found: list[tuple[Path, dict[str, Fact]]] = []
    anchors: set[int] | None = None
    taken: int | None = None
    for number, file in enumerate(away):
        lines = last_lines(file, 1)
        if not lines:
            break
        last = parse_entry(lines[0])
        is_beyond = options.keep_files and len(away) - number > options.keep_files
        is_old = options.keep_days and now - last.unix_ms / 1000 >= options.keep_days * _DAY_S
        if not is_beyond and not is_old:
            break
        if anchors is None:
            marks = read_checkpoints(options.checkpoints or checkpoint_path(path))
            anchors = {mark.count for mark in marks}
            if options.shipped is not None:
                taken = shipped_seq(path, options.shipped)
        if last.seq not in anchors or (taken is not None and taken < last.seq):
            break
        found.append((file, {"last": last.seq, "by": "keep_files" if is_beyond else "keep_days"}))
    return found


def _parse(path: Path, line: bytes) -> AuditEntry:
    try:
        return parse_entry(line)
    except AuditError as error:
        raise AuditError(
            f"{path}: {error}: nothing is appended to it. Keep the file for those who look into "
            "it, and give the log another path"
        ) from None


def _take_lock(path: Path, timeout_s: float) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
    end = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(lock)
                raise LockedError(
                    f"another process writes {path.name.removesuffix('.lock')}; one log has one "
                    "writer: give this one another path"
                ) from None
            time.sleep(_LOCK_POLL_S)
        except BaseException:
            os.close(lock)
            raise
        else:
            return lock


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
