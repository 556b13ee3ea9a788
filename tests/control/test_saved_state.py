"""What one control plane leaves to the next one: whole, secret, and never a reason not to start."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.control.stage import settings_for
from toppy.control.saved_state import (
    FORMAT,
    SavedGeneration,
    SavedState,
    SavedWorker,
    UnreadableStateError,
    digest_of,
    read_state,
    remove_state,
    write_state,
)
from toppy.model.counters import WorkerCounters

STATE = SavedState(
    format=FORMAT,
    reset_key=b"hidden" * 10,
    token_key=b"hidden" * 10,
    certificate_chain_pem=b"chain",
    private_key_pem=b"hidden",
    generation=3,
    generation_active=2,
    revision=7,
    started_at=5.5,
    worker_deaths=1,
    socket_rows=(8, 8),
    past={0: WorkerCounters(pings=3, drops={"malformed": 1})},
    workers=(
        SavedWorker(slot=2, generation=2, place=0, pid=42, started=999, since=6.5, secret="hidden"),
    ),
    generations=(SavedGeneration(2, 7, (2, 3), False, 6.5),),
    is_upgrading=True,
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE


def test_a_later_state_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    write_state(tmp_path, msgspec.structs.replace(STATE, generation=4))
    found = read_state(tmp_path)
    assert found is not None
    assert found.generation == 4
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_can_read_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_state(tmp_path, STATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600


def test_an_unfinished_file_of_a_control_plane_that_died_is_no_obstacle(tmp_path: Path) -> None:
    unfinished = tmp_path / "state.new"
    unfinished.write_bytes(b"half")
    unfinished.chmod(0o644)
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    (tmp_path / "state.new").symlink_to(other)
    write_state(tmp_path, STATE)
    assert other.read_bytes() == b"precious"


def test_where_it_cannot_be_written_the_earlier_one_stays(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    (tmp_path / "state.new").mkdir()
    with pytest.raises(OSError, match=r"directory|permitted"):
        write_state(tmp_path, msgspec.structs.replace(STATE, generation=9))
    assert read_state(tmp_path) == STATE


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "no such directory") is None


def test_what_was_removed_is_gone(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    remove_state(tmp_path)
    remove_state(tmp_path)
    assert read_state(tmp_path) is None


def test_a_state_of_another_format_is_unreadable_and_not_taken_for_none(tmp_path: Path) -> None:
    write_state(tmp_path, msgspec.structs.replace(STATE, format=FORMAT + 1))
    with pytest.raises(UnreadableStateError, match=f"format {FORMAT + 1}"):
        read_state(tmp_path)


def test_a_state_that_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(UnreadableStateError, match="cannot be read"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"garbage",
        b"\x81\xa6format\x01",
        b"\x81\xa6format\xa1\xff",
        b"\x91" * 100_000,
        b"\x81\xa1x" + b"\x91" * 100_000,  # nested in a field that is not known
        msgspec.msgpack.encode(STATE)[:-1],
        msgspec.msgpack.encode(STATE).replace(b"hidden", b"\xff\xfe\xfd\xfc\xfb\xfa"),
    ],
)
def test_garbage_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(UnreadableStateError, match="damaged"):
        read_state(tmp_path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_state_is_a_state_or_unreadable(tmp_path: Path, data: st.DataObject) -> None:
    encoded = bytearray(msgspec.msgpack.encode(STATE))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "state").write_bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    try:
        found = read_state(tmp_path)
    except UnreadableStateError:
        return
    assert found is not None
    assert found.format == FORMAT


def test_no_secret_shows_in_a_repr() -> None:
    assert "hidden" not in repr(STATE)
    assert "hidden" not in repr(STATE.workers)


def test_what_workers_were_told_is_known_again() -> None:
    told = settings_for(0, 1, 0, "secret")
    of_another = settings_for(3, 2, 1, "another secret")
    assert digest_of(told, 2) == digest_of(of_another, 2)
    louder = msgspec.structs.replace(told, log_level="debug")  # it can be changed while they run
    assert digest_of(told, 2) == digest_of(louder, 2)
    assert digest_of(told, 2) != digest_of(told, 3)
    for change in (
        {"engine": "aioquic"},
        {"limits": {"max_connections": 1}},
        {"private_key_pem": b"renewed"},
        {"names": ("gw.example",)},
    ):
        assert digest_of(msgspec.structs.replace(told, **change), 2) != digest_of(told, 2)
