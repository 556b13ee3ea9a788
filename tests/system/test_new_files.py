"""Several files, all or none, and who may replace what."""

from __future__ import annotations

from pathlib import Path

import pytest

from toppy.system.new_files import NewFile, write_files

FILES = [NewFile("a.pem", b"new a"), NewFile("a-key.pem", b"new key", 0o600)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_there_is_replaced_by_default(tmp_path: Path) -> None:
    (tmp_path / "a-key.pem").write_bytes(b"old")
    write_files(tmp_path, FILES)
    assert contents(tmp_path) == {"a.pem": b"new a", "a-key.pem": b"new key"}
    assert (tmp_path / "a-key.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", ["a.pem", "a-key.pem"])
def test_what_must_stay_stays_and_nothing_else_is_written(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"old")
    with pytest.raises(FileExistsError) as refused:
        write_files(tmp_path, FILES, replaces=())
    assert refused.value.filename == str(tmp_path / there)
    assert contents(tmp_path) == {there: b"old"}


def test_a_link_that_leads_nowhere_is_there_too(tmp_path: Path) -> None:
    (tmp_path / "a.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_files(tmp_path, FILES, replaces=())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pem"]


def test_only_named_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(b"old")
    write_files(tmp_path, FILES, replaces=("a.pem",))
    assert contents(tmp_path) == {"a.pem": b"new a", "a-key.pem": b"new key"}
