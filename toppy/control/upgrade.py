"""Replacing the control plane's own code: first a trial of the new code, then ``execve``.

The trial is the same command line, told by its environment to be one: a whole gateway of the code
that is on disk now, with the real configuration, on a loopback port and in a runtime directory of
its own. Only when it has served does the running one give its place away; nothing can be taken
back after ``execve``. Signals that come from then on wait until the new code can hear them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping

from toppy.config.changes import changed_settings
from toppy.config.gateway import GatewayConfig
from toppy.control.admin import AdminError
from toppy.errors import ToppyError
from toppy.system.descriptors import HANDED_OVER
from toppy.system.stop_signals import hold_stop_signals, stop_later

TRIAL_DIRECTORY = "TOPPY_TRIAL_DIRECTORY"
"""The environment variable that makes ``toppy-gw run`` a trial: it serves once, in this runtime
directory, prints its version and ends."""
_TRIAL_DEADLINE_S = 30.0
_SHOWN_CHARACTERS = 600
_OURS = ("NOTIFY_SOCKET", HANDED_OVER)
"""Variables that are about this process."""


class UpgradeError(ToppyError):
    """The new code does not come up; the running one goes on."""


class Upgrade:
    """How far the control plane is on its way to new code."""

    def __init__(self) -> None:
        self.is_decided = False
        """It becomes the new code, whatever happens."""
        self._is_over = asyncio.Event()
        self._is_over.set()

    @property
    def is_under_way(self) -> bool:
        return not self._is_over.is_set()

    def begin(self) -> None:
        """One at a time. Raises ``AdminError``."""
        if self.is_under_way:
            raise AdminError("an upgrade is under way already")
        self._is_over.clear()

    def give_up(self) -> None:
        """The running code goes on."""
        self._is_over.set()

    async def wait_until_over(self) -> None:
        """Until none is under way; never when it succeeds."""
        await self._is_over.wait()

    def decide(self) -> None:
        """No way back; signals wait for the new code."""
        hold_stop_signals()
        self.is_decided = True


def check_nothing_needs_a_restart(running: GatewayConfig, wanted: GatewayConfig) -> None:
    """The new code starts with the file as it is; what a trial does not try must not have changed.
    Raises ``UpgradeError``.
    """
    changed = [
        key for key, applies in changed_settings(running, wanted).items() if applies == "restart"
    ]
    if changed:
        raise UpgradeError(
            f"{', '.join(changed)} changed in the configuration, which takes a restart; restart "
            "the gateway instead (connections end then), or change it back before the upgrade"
        )


async def try_new_code(environ: Mapping[str, str]) -> str:
    """The version of the code on disk, once a trial gateway of it has served. Raises
    ``UpgradeError`` that says why it did not.
    """
    with tempfile.TemporaryDirectory(prefix="toppy-gw-trial-") as directory:
        kept = {name: value for name, value in environ.items() if name not in _OURS}
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
            raise UpgradeError(
                f"the new code did not serve within {_TRIAL_DEADLINE_S:.0f} s; nothing has changed"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode != 0:
        shown = complained.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
        raise UpgradeError(f"the new code does not come up; nothing has changed. It says: {shown}")
    return said.decode(errors="replace").strip()


def become_new_code(environ: Mapping[str, str], *, to_stop: bool) -> None:
    """Replace this process by the same command, as it is on disk now. Raises ``OSError``.

    ``to_stop``: it was told to stop when it had been decided already, and the new code obeys.
    """
    if to_stop:
        stop_later()
    os.execve(sys.executable, _command_line(), dict(environ))  # noqa: S606  # no shell is wanted


def _command_line() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]
