"""Reads the files that a configuration names, with errors that say which key named them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from toppy.errors import ConfigError

_CLOSED_DIRECTORIES = (Path("/run/credentials"), Path("/run/secrets"))
"""Of systemd (LoadCredential=) and of containers: one service sees what is in there, whatever the
files' modes say. systemd lets the service's user in by an access list, whose mask the mode's group
bits are, acl(5); Docker's and Kubernetes' secrets are readable by all in the container."""
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


def is_open_to_others(path: Path, bits: int) -> bool:
    """Whether a file has one of these bits of its mode, and stands where that lets somebody in."""
    if any(directory in path.parents for directory in _CLOSED_DIRECTORIES):
        return False
    return bool(path.stat().st_mode & bits)
