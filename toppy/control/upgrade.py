"""Replacing the control plane's own code: first a trial of the new code, then ``execve``.

The trial is the same command line, told by its environment to be one: a whole gateway of the code
that is on disk now, with the real configuration, on a loopback port and in a runtime directory of
its own. Only when it has served does the running one give its place away; nothing can be taken
back after ``execve``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping

from toppy.errors import ToppyError

TRIAL_DIRECTORY = "TOPPY_TRIAL_DIRECTORY"
"""The environment variable that makes ``toppy-gw run`` a trial: it serves once, in this runtime
directory, prints its version and ends."""
_TRIAL_DEADLINE_S = 30.0
_SHOWN_CHARACTERS = 600


class UpgradeError(ToppyError):
    """The new code does not come up; the running one goes on."""


async def try_new_code(environ: Mapping[str, str]) -> str:
    """The version of the code on disk, once a trial gateway of it has served. Raises
    ``UpgradeError`` that says why it did not.
    """
    with tempfile.TemporaryDirectory(prefix="toppy-gw-") as directory:
        kept = {name: value for name, value in environ.items() if name != "NOTIFY_SOCKET"}
        process = await asyncio.create_subprocess_exec(
            *_command_line(),
            env=kept | {TRIAL_DIRECTORY: directory},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_TRIAL_DEADLINE_S):
                said, complained = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise UpgradeError(
                f"the new code did not serve within {_TRIAL_DEADLINE_S:.0f} s; nothing has changed"
            ) from None
    if process.returncode != 0:
        shown = complained.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
        raise UpgradeError(f"the new code does not come up; nothing has changed. It says: {shown}")
    return said.decode(errors="replace").strip()


def become_new_code(environ: Mapping[str, str]) -> None:
    """Replace this process by the same command, as it is on disk now. Raises ``OSError``."""
    os.execve(sys.executable, _command_line(), dict(environ))  # noqa: S606  # no shell is wanted


def _command_line() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]
