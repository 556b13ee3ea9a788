"""The audit log's writer and its verifier, on real files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.observe.audit_place import KEY, Place, event
from toppy.observe.audit_log import AuditLog, AuditLogOptions, LockedError
from toppy.observe.audit_reader import (
    AuditLogError,
    is_being_written,
    last_lines,
    log_files,
    read_checkpoints,
    read_lines,
    rotated_path,
    verify_log,
)
from toppy.wire.audit_entry import MAX_LINE_BYTES, AuditError, HmacKey


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "deep" / "er")


def error_of(place: Place) -> AuditLogError:
    with pytest.raises(AuditLogError) as found:
        place.verify()
    return found.value


def rewrite(path: Path, change: object) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    assert callable(change)
    path.write_bytes(b"".join(change(lines)))


# the chain across lives and files


def test_a_log_that_was_written_in_several_lives_is_one_chain(place: Place) -> None:
    for numbers in ([1, 2], [3], [4, 5, 6]):
        place.write(numbers)
    found = place.verify()
    assert (found.entries, found.count, found.files) == (6, 6, 1)
    assert [entry.seq for entry in place.entries()] == [1, 2, 3, 4, 5, 6]


def test_directories_are_made_and_files_are_for_their_user_alone(place: Place) -> None:
    place.write([1])
    assert stat.S_IMODE(place.directory.stat().st_mode) == 0o700
    for file in place.directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_full_file_is_put_away_and_the_chain_goes_on(place: Place) -> None:
    place.set(rotate_bytes=1500)
    place.write(range(10))
    place.write(range(10, 20))
    names = place.names()
    assert len(names) > 3
    assert names[0] == "audit.000000000001.jsonl"
    assert names[-1] == "audit.jsonl"
    assert all(file.stat().st_size <= 1500 for file in log_files(place.path))
    assert place.verify().entries == 20


def test_an_old_file_is_put_away(place: Place) -> None:
    place.set(rotate_interval_s=60)
    log = place.open()
    place.append(log, 1)
    place.now += 59
    place.append(log, 2)
    assert len(place.names()) == 1
    place.now += 2
    place.append(log, 3)
    log.close()
    assert len(place.names()) == 2
    place.now += 30
    place.write([4])
    place.now += 31
    place.write([5])  # the age is that of the first entry, whoever wrote it
    assert len(place.names()) == 3
    assert place.verify().entries == 5


def test_a_writer_goes_on_after_one_that_died_between_two_files(place: Place) -> None:
    place.write([1, 2])
    place.path.rename(rotated_path(place.path, 1))
    place.write([3])
    assert place.verify().entries == 3


def test_the_first_files_may_be_elsewhere_when_a_checkpoint_knows_their_end(place: Place) -> None:
    place.set(rotate_bytes=800)
    place.write(range(9))
    first = log_files(place.path)[0]
    kept = first.read_bytes()
    first.unlink()
    found = place.verify()
    assert found.count == 9
    assert found.entries == 9 - kept.count(b"\n")
    assert "are not here" in found.notes[0]
    place.checkpoints.unlink()
    assert "seq mismatch" in str(error_of(place))


# what verify finds


def test_errors_name_line_and_cause(place: Place) -> None:
    place.write(range(5))
    kept = place.path.read_bytes()
    rewrite(place.path, lambda lines: [*lines[:2], *lines[3:]])
    assert error_of(place).cause == "line 3: seq mismatch: 4 instead of 3"
    place.path.write_bytes(kept)
    rewrite(place.path, lambda lines: [*lines[:3], lines[3].replace(b"alice", b"mallet"), lines[4]])
    assert error_of(place).cause.startswith("line 4: hash mismatch: ")
    place.path.write_bytes(kept)
    rewrite(place.path, lambda lines: [lines[0], b"{}\n", *lines[2:]])
    assert error_of(place).cause.startswith("line 2: not an audit entry: ")
    place.path.write_bytes(kept + b"\n")
    assert error_of(place).line == 6


def test_a_wrong_line_of_an_earlier_file_is_named_with_its_file(place: Place) -> None:
    place.set(rotate_bytes=1000)
    place.write(range(9))
    second = log_files(place.path)[1]
    rewrite(second, lambda lines: [lines[0], lines[1].replace(b"alice", b"mallet"), *lines[2:]])
    found = error_of(place)
    assert (found.path, found.line) == (second, 2)
    assert str(found).startswith(f"{second.name}: line 2: hash mismatch")


def test_a_log_without_its_end_is_found_out(place: Place) -> None:
    place.write(range(4))
    rewrite(place.path, lambda lines: lines[:-1])
    assert error_of(place).cause.startswith("truncated: it ends with entry 3")
    with pytest.raises(AuditError, match="was cut or replaced"):
        place.open()


def test_a_log_that_was_taken_away_whole_is_found_out(place: Place) -> None:
    place.write(range(4))
    place.path.unlink()
    with pytest.raises(FileNotFoundError):
        place.verify()
    with pytest.raises(AuditError, match="was cut or replaced"):
        place.open()


def test_a_log_that_was_written_anew_with_the_key_is_found_out(place: Place) -> None:
    place.write(range(4))
    other = Place(place.directory / "other")
    other.write(range(10, 16))
    place.path.write_bytes(other.path.read_bytes())
    assert "checkpoint mismatch" in str(error_of(place))


def test_another_key_is_a_signature_mismatch_of_the_first_line(place: Place) -> None:
    place.write([1, 2])
    with pytest.raises(AuditLogError, match="line 1: signature mismatch"):
        verify_log(place.path, HmacKey(b"other"), checkpoints=place.checkpoints)
    with pytest.raises(AuditLogError, match="line 1: signature present but no key"):
        verify_log(place.path, None, checkpoints=place.checkpoints)


def test_a_forged_checkpoint_is_found_out(place: Place) -> None:
    place.write([1, 2])
    mark = read_checkpoints(place.checkpoints)[0]
    line = place.checkpoints.read_bytes().replace(b'"unix_ms":', b'"unix_ms":1')
    place.checkpoints.write_bytes(line)
    assert error_of(place).path == place.checkpoints
    assert "signature mismatch" in str(error_of(place))
    assert mark.count == 2


def test_two_checkpoints_that_contradict_each_other_are_found_out(place: Place) -> None:
    place.write([1])
    other = Place(place.directory / "other")
    other.write([7])
    with place.checkpoints.open("ab") as file:
        file.write(other.checkpoints.read_bytes())
    assert "another entry 1" in str(error_of(place))


def test_a_line_that_no_writer_wrote_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"x" * (MAX_LINE_BYTES + 2_000_000))
    with pytest.raises(AuditError, match="a line has more than"):
        list(read_lines(path))


def test_progress_is_told_in_bytes(place: Place) -> None:
    place.write(range(5))
    told: list[int] = []
    verify_log(place.path, KEY, checkpoints=place.checkpoints, on_progress=told.append)
    assert told[-1] == place.path.stat().st_size


# an interrupted writer


def test_an_unfinished_entry_is_put_away_and_the_log_tells(place: Place) -> None:
    place.write([1, 2])
    with place.path.open("ab") as file:
        file.write(b'{"version":1,"seq":3,"uni')
    assert error_of(place).cause == "line 3: unfinished: its writer was interrupted"
    place.write([3])
    actions = [entry.event.action for entry in place.entries()]
    assert actions == ["udp", "udp", "audit.recovered", "udp"]
    assert place.verify().entries == 4
    (kept,) = place.directory.glob("*.torn-*")
    assert kept.read_bytes() == b'{"version":1,"seq":3,"uni'


def test_an_entry_that_only_lacks_its_newline_is_kept(place: Place) -> None:
    place.write([1, 2])
    place.path.write_bytes(place.path.read_bytes().rstrip(b"\n"))
    assert place.verify().entries == 2
    place.write([3])
    assert [entry.seq for entry in place.entries()] == [1, 2, 3]
    assert place.verify().entries == 3


def test_a_log_whose_only_line_is_unfinished_begins_with_what_happened(place: Place) -> None:
    place.directory.mkdir(parents=True)
    place.path.write_bytes(b'{"vers')
    place.write([1])
    assert [entry.event.action for entry in place.entries()] == ["audit.recovered", "udp"]


def test_an_unfinished_checkpoint_does_not_swallow_the_next(place: Place) -> None:
    place.write([1])
    with place.checkpoints.open("ab") as file:
        file.write(b'{"version":1,"cou')
    assert place.verify().checkpoints == 1
    place.write([2])
    assert [mark.count for mark in read_checkpoints(place.checkpoints)] == [1, 2]


def test_a_line_that_is_being_written_is_no_error(place: Place) -> None:
    log = place.open()
    place.append(log, 1)
    assert is_being_written(place.path)
    with place.path.open("ab") as file:
        file.write(b'{"version"')
    assert place.verify().notes == ("the last line is being written",)
    os.truncate(place.path, place.path.stat().st_size - len(b'{"version"'))
    log.close()
    assert not is_being_written(place.path)


# one writer, and what it refuses


def test_two_writers_at_once_are_refused(place: Place) -> None:
    log = place.open()
    with pytest.raises(LockedError, match=r"another process writes audit\.jsonl"):
        place.open()
    log.close()
    place.write([1])


def test_nothing_is_appended_to_an_entry_whose_hash_is_wrong(place: Place) -> None:
    place.write([1, 2])
    rewrite(place.path, lambda lines: [lines[0], lines[1].replace(b"alice", b"mallet")])
    with pytest.raises(AuditError, match="the last entry's hash is wrong"):
        place.open()
    place.path.write_bytes(b"something else\n")
    with pytest.raises(AuditError, match="not an audit entry"):
        place.open()


def test_nothing_is_appended_with_another_key(place: Place) -> None:
    place.write([1])
    place.set(signer=HmacKey(b"other"))
    with pytest.raises(AuditError, match="another key"):
        place.open()
    place.set(signer=None)
    with pytest.raises(AuditError, match="is signed and no signing key"):
        place.open()
    place.set(signer=KEY)
    place.write([2])


@pytest.mark.parametrize("what", ["unlink", "replace", "append"])
def test_a_file_that_somebody_else_changes_is_not_written_to(place: Place, what: str) -> None:
    log = place.open()
    place.append(log, 1)
    if what == "unlink":
        place.path.unlink()
    elif what == "replace":
        place.path.rename(place.directory / "away")
        place.path.write_bytes((place.directory / "away").read_bytes())
    else:
        with place.path.open("ab") as file:
            file.write(b"more\n")
    with pytest.raises(AuditError, match="while it was written"):
        place.append(log, 2)
    log.close()


def test_a_full_disk_leaves_no_half_entry_and_the_next_attempt_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = place.open()
    place.append(log, 1)
    write = os.write
    room = [40]

    def full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        place.append(log, 2, 3)
    monkeypatch.setattr(os, "write", write)
    assert log.seq == 1
    place.append(log, 2, 3)
    log.close()
    assert place.verify().entries == 3


def test_a_file_that_cannot_be_put_away_stays_the_log(place: Place) -> None:
    place.set(rotate_bytes=400)
    log = place.open()
    place.append(log, 1)
    rotated_path(place.path, 1).write_bytes(b"in the way")
    with pytest.raises(AuditError, match="exists already"):
        place.append(log, 2)
    rotated_path(place.path, 1).unlink()
    place.append(log, 2)
    log.close()
    assert place.verify().entries == 2


# checkpoints and the disk


def test_checkpoints_come_by_count_by_time_and_at_the_end(place: Place) -> None:
    place.set(checkpoint_entries=3, checkpoint_interval_s=10.0)
    log = place.open()

    def counts() -> list[int]:
        return [mark.count for mark in read_checkpoints(place.checkpoints)]

    place.append(log, 1, 2)
    assert counts() == []
    place.append(log, 3)
    assert counts() == [3]
    place.append(log, 4)
    place.now += 10
    log.maintain()
    log.maintain()
    assert counts() == [3, 4]
    place.append(log, 5)
    log.close()
    assert counts() == [3, 4, 5]
    place.open().close()
    assert counts() == [3, 4, 5]
    assert place.verify().checkpoints == 3


@pytest.mark.parametrize(("fsync", "expected"), [("always", 3), ("interval", 2), ("never", 0)])
def test_entries_reach_the_disk_as_the_setting_says(
    place: Place, monkeypatch: pytest.MonkeyPatch, fsync: str, expected: int
) -> None:
    place.set(fsync=fsync)
    log = place.open()
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    for number in range(3):
        place.append(log, number)
        place.now += 0.6
    assert len(synced) == expected
    monkeypatch.undo()
    log.close()


def test_what_a_checkpoint_knows_is_on_the_disk_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.set(fsync="never", checkpoint_entries=1)
    log = place.open()
    order: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: order.append("sync"))

    def checkpoint(*_: object) -> None:
        order.append("checkpoint")
        raise OSError("enough")

    monkeypatch.setattr("toppy.observe.audit_log.make_checkpoint", checkpoint)
    with pytest.raises(OSError, match="enough"):
        place.append(log, 1)
    assert order == ["sync", "checkpoint"]
    monkeypatch.undo()
    log.close()


# reading


def test_the_last_lines_of_a_file_are_read_from_its_end(place: Place) -> None:
    place.write(range(200))
    lines = place.path.read_bytes().splitlines()
    assert last_lines(place.path, 1) == lines[-1:]
    assert last_lines(place.path, 150) == lines[-150:]
    assert last_lines(place.path, 500) == lines
    assert last_lines(place.path, 0) == []


def test_a_log_without_a_suffix_has_its_own_rotated_files(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path, AuditLogOptions(rotate_bytes=300), actor="tester")
    for number in range(3):
        log.append([(number, event(number))])
    log.close()
    (tmp_path / "audit.old").write_text("not of it")
    names = [file.name for file in log_files(path)]
    assert names == ["audit.000000000001", "audit.000000000002", "audit"]
