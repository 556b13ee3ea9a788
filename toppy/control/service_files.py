"""Whose the files are that the system's service reads."""

from __future__ import annotations

import contextlib
import os
import pwd
from pathlib import Path

from toppy.control.settings import SYSTEM_CONFIG

SYSTEM_DIRECTORY = Path(SYSTEM_CONFIG).parent
_SERVICE_USER = "toppy-gw"


def service_user(directory: Path) -> pwd.struct_passwd | None:
    """Who is to own secrets there, where there is such a user and this one may give files away."""
    if directory == SYSTEM_DIRECTORY and os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(_SERVICE_USER)
    return None
