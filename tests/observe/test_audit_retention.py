"""Old files of an audit log: deleted by setting, once they were shipped, and never in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.observe.audit_place import Place
from toppy.model.audit_event import parse_facts
from toppy.observe.audit_log import AuditLog
from toppy.observe.audit_position import (
    Position,
    first_seq,
    read_position,
    shipped_path,
    shipped_seq,
    write_position,
)
from toppy.observe.audit_reader import AuditLogError

DAY_S = 86_400.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Each file takes two entries or three."""
    place = Place(tmp_path / "log")
    place.set(rotate_bytes=1000)
    return place


def write(place: Place, log: AuditLog, count: int) -> None:
    for number in range(count):
        place.append(log, number)
        log.retire()


def retired(place: Place) -> list[str]:
    return [e.event.target for e in place.entries() if e.event.action == "audit.retired"]


def shipped_up_to(place: Place, seq: int) -> None:
    """As a collector that has everything up to ``seq``."""
    offset = 0
    for name in place.names():
        file = place.directory / name
        offset, begin = 0, first_seq(file)
        for line in file.read_bytes().splitlines(keepends=True):
            offset += len(line)
            entry = json.loads(line)
            if entry["seq"] == seq:
                position = Position(seq, entry["hash"], begin, offset)
                write_position(shipped_path(place.path), position)
                return
    raise AssertionError(f"entry {seq} is not here")


def test_all_files_are_kept_unless_a_setting_says_otherwise(place: Place) -> None:
    log = place.open()
    write(place, log, 30)
    log.close()
    assert place.names()[0] == "audit.000000000001.jsonl"
    assert not retired(place)


def test_only_the_newest_files_are_kept_and_the_rest_verifies(place: Place) -> None:
    place.set(keep_files=2)
    log = place.open()
    write(place, log, 30)
    log.close()
    assert len(place.names()) == 3
    found = place.verify()
    assert found.count == log.seq
    assert found.entries < log.seq
    assert "a checkpoint tells how they ended" in found.notes[0]


def test_the_log_itself_tells_what_was_deleted(place: Place) -> None:
    place.set(keep_files=1)
    log = place.open()
    write(place, log, 6)
    first = place.names()[0]
    log.close()
    told = [e for e in place.entries() if e.event.action == "audit.retired"]
    reason, facts = parse_facts(told[-1].event.reason or "")
    assert (told[-1].event.actor, told[-1].event.allowed) == ("tester", True)
    assert reason == "kept long enough, by setting"
    assert facts["by"] == "keep_files"
    # the file that follows begins with the next entry
    assert int(facts["last"]) + 1 == first_seq(place.directory / first)


def test_a_file_is_deleted_when_its_last_entry_is_old_enough(place: Place) -> None:
    place.set(keep_days=2.0)
    log = place.open()
    write(place, log, 6)
    before = place.names()
    place.now += 2 * DAY_S - 1
    log.retire()
    assert place.names() == before
    place.now += 2 * 60
    log.retire()
    # it still has the newest file: what is open is never deleted
    assert place.names()[-1] == "audit.jsonl"
    assert len(place.names()) < len(before)
    log.close()
    assert place.verify().count == log.seq


def test_what_the_collector_does_not_have_is_not_deleted(place: Place) -> None:
    place.set(keep_files=1, shipped=shipped_path(place.path))
    log = place.open()
    write(place, log, 12)
    assert place.names()[0] == "audit.000000000001.jsonl"
    second = first_seq(place.directory / place.names()[1])
    shipped_up_to(place, second)
    place.now += 61
    log.retire()
    assert first_seq(place.directory / place.names()[0]) == second
    log.close()
    assert place.verify().count == log.seq


def test_a_position_of_another_log_proves_nothing(place: Place) -> None:
    place.set(keep_files=1, shipped=shipped_path(place.path))
    log = place.open()
    write(place, log, 12)
    for position in (
        Position(10, "0" * 64, 9, 1000),
        Position(10_000, "0" * 64, 1, 1),
        Position(10_000, "0" * 64, 1, 10**9),
    ):
        write_position(shipped_path(place.path), position)
        assert shipped_seq(place.path, shipped_path(place.path)) == 0
        place.now += 61
        assert not log.retire()
    log.close()


def test_a_position_is_believed_where_the_file_bears_it_out(place: Place) -> None:
    log = place.open()
    write(place, log, 7)
    log.close()
    shipped = shipped_path(place.path)
    assert shipped_seq(place.path, shipped) == 0
    for seq in range(1, 8):
        shipped_up_to(place, seq)
        assert shipped_seq(place.path, shipped) == seq
        assert read_position(shipped).seq == seq


def test_a_file_without_a_checkpoint_of_its_end_is_kept(place: Place) -> None:
    log = place.open()
    write(place, log, 8)
    log.close()
    place.checkpoints.unlink()
    place.set(keep_files=1)
    log = place.open()
    assert not log.retire()
    log.close()
    assert place.names()[0] == "audit.000000000001.jsonl"


def test_without_that_checkpoint_the_rest_is_refused_with_what_to_do(place: Place) -> None:
    place.set(keep_files=1)
    log = place.open()
    write(place, log, 12)
    log.close()
    begin = first_seq(place.directory / place.names()[0])
    place.checkpoints.unlink()
    with pytest.raises(AuditLogError) as refused:
        place.verify()
    assert f"seq mismatch: {begin} instead of 1" in refused.value.cause
    assert "--checkpoints" in refused.value.cause


def test_a_file_that_is_missing_in_the_middle_is_found(place: Place) -> None:
    log = place.open()
    write(place, log, 12)
    log.close()
    (place.directory / place.names()[1]).unlink()
    with pytest.raises(AuditLogError, match="seq mismatch"):
        place.verify()


def test_it_is_looked_once_a_minute_only(place: Place) -> None:
    place.set(keep_days=1.0)
    log = place.open()
    write(place, log, 12)
    place.now += DAY_S - 30
    assert not log.retire()
    place.now += 59  # they are old enough now
    assert not log.retire()
    place.now += 2
    assert log.retire()
    log.close()
