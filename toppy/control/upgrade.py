"""Replacing the control plane's own code: first a trial of the new code, then ``execve``.

The trial runs a whole gateway of the code that is on disk now, with the real configuration, on a
loopback port of its own and with a runtime directory of its own. Only when it has come up does the
running one give its place away; nothing can be taken back after ``execve``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import uvloop

from toppy.control.settings import GatewaySettings, load_settings
from toppy.errors import ToppyError
from toppy.observe.log import configure_logging

_TRIAL_DEADLINE_S = 30.0
_TRIAL = "from toppy.control.upgrade import main; main()"
_SHOWN_CHARACTERS = 600


class UpgradeError(ToppyError):
    """The new code does not come up; the running one goes on."""


async def try_new_code(path: str | None, environ: Mapping[str, str]) -> str:
    """The version of the code on disk, once a trial gateway of it has served. Raises
    ``UpgradeError`` that says why it did not.
    """
    arguments = [] if path is None else [path]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *_interpreter_options(),
        "-c",
        _TRIAL,
        *arguments,
        env=dict(environ),
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
    os.execve(  # noqa: S606  # no shell is wanted
        sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ)
    )


def _interpreter_options() -> list[str]:
    return ["-I"] if sys.flags.isolated else []


async def _serve_once(settings: GatewaySettings, path: Path | None) -> None:
    from toppy.control.control_plane import ControlPlane  # noqa: PLC0415  # it imports this module

    gateway = ControlPlane(settings, path, {})
    await gateway.run(until_serving=True)


def main() -> None:
    """The trial itself: a gateway of this code, until it serves; prints the version."""
    from toppy import __version__  # noqa: PLC0415

    configure_logging("warning", "console", process="trial")
    os.environ.pop("NOTIFY_SOCKET", None)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        with tempfile.TemporaryDirectory(prefix="toppy-gw-trial-") as directory:
            settings = load_settings(path, os.environ).for_trial(Path(directory))
            uvloop.run(_serve_once(settings, path))
    except (ToppyError, OSError) as error:
        sys.exit(str(error))
    print(__version__)
