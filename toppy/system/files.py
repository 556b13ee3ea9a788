"""Reads the files that a configuration names, with errors that say which key named them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from toppy.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Configurations, keys and tokens are far smaller; a wrong path may be anything."""


def read_file(path: Path, key: str) -> bytes:
    """The file's bytes. Raises ``ConfigError`` that names ``key`` and the reason.

    Never waits: a pipe, a device or a directory is refused.
    """
    try:
        # without O_NONBLOCK a pipe is not open before somebody writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{key}: cannot read {path}: it is not a regular file", key=key)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}", key=key) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{key}: {path} is larger than 1 MiB", key=key)
    return data
