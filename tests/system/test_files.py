"""A file that a configuration names is read, or the error says which key named it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from toppy.errors import ConfigError
from toppy.system.files import MAX_FILE_BYTES, read_file


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\x00abc\n")
    assert read_file(tmp_path / "key", "tls.private_key") == b"\x00abc\n"


@pytest.mark.parametrize("name", ["missing", ".", "pipe", "/dev/zero"])
def test_what_cannot_be_read_is_named_with_its_key(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    with pytest.raises(ConfigError, match=r"tls\.private_key: cannot read") as refused:
        read_file(tmp_path / name, "tls.private_key")
    assert refused.value.key == "tls.private_key"


def test_a_file_of_absurd_size_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_file(tmp_path / "huge", "auth.token_file")
