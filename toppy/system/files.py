"""Reads the files that a configuration names, with errors that say which key named them."""

from __future__ import annotations

from pathlib import Path

from toppy.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Configurations, keys and tokens are far smaller; a wrong path may be anything."""


def read_file(path: Path, key: str) -> bytes:
    """The file's bytes. Raises ``ConfigError`` that names ``key`` and the reason."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}", key=key) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{key}: {path} is larger than 1 MiB", key=key)
    return data
