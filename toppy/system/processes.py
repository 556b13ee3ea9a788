"""Worker processes, our own children or those of a control plane that died before us.

A pidfd names one process for ever: no signal ever reaches another that got the same number.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_POLL_INTERVAL_S = 0.05
"""Where there is no pidfd (other systems than Linux, kernels before 5.3)."""
_PIPE_BYTES = 65536
"""What a pipe takes by itself, pipe(7)."""


class Process:
    """A running process that is watched on the event loop. ``wait`` for its end."""

    def __init__(self, pid: int, started: int, stdin: BinaryIO | None = None) -> None:
        self.pid = pid
        self.started = started
        """Tells it from a later process with the same number; see ``start_time``."""
        self.stdin = stdin
        self.returncode: int | None = None
        """As ``subprocess`` has it; stays None for a process that was not our child."""
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd: int | None = None
        if hasattr(os, "pidfd_open"):
            self._pidfd = os.pidfd_open(pid)
            self._loop.add_reader(self._pidfd, self._finish)
        else:
            self._loop.call_later(_POLL_INTERVAL_S, self._poll)

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    async def wait(self) -> int | None:
        """Until it has ended; its exit code, minus the signal's number, or None: not known."""
        await self._ended.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing happens when it has ended."""
        if self.has_ended:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait_blocking(self, deadline_s: float) -> bool:
        """Hold everything up until it has ended, and so has given up what it held; for use
        before there is anything to hold up. False: it has not.
        """
        if self._pidfd is None:
            return self.has_ended
        poll = select.poll()  # select takes no descriptors above 1023
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(deadline_s * 1000))

    def forget(self) -> None:
        """Watch it no longer; it runs on."""
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self.stdin is not None:
            self.stdin.close()

    def _finish(self) -> None:
        self._reap()
        self._ended.set()
        self.forget()

    def _poll(self) -> None:
        if self._reap() or start_time(self.pid) != self.started:
            self._finish()
        else:
            self._loop.call_later(_POLL_INTERVAL_S, self._poll)

    def _reap(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # not our child: somebody else reaps it
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                return True
        return False


def spawn(
    arguments: Sequence[str],
    said: bytes,
    *,
    descriptors: Sequence[int],
    environ: Mapping[str, str],
) -> Process:
    """Start a child that reads ``said`` on its standard input, a pipe that stays open: its end
    tells the child that we are gone. Raises ``OSError``.
    """
    child = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        arguments, stdin=subprocess.PIPE, pass_fds=descriptors, env=environ, bufsize=0
    )
    child.returncode = 0  # `Process` reaps it; Popen need not warn
    assert child.stdin is not None
    stdin: BinaryIO = child.stdin  # type: ignore[assignment]
    if len(said) > _PIPE_BYTES:
        # nobody reads yet: the pipe must take it all
        fcntl.fcntl(stdin, fcntl.F_SETPIPE_SZ, len(said))
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its watcher will say so
        stdin.write(said)
    return Process(child.pid, start_time(child.pid), stdin)


def usable_cores() -> list[int]:
    """Those that this process may run on; empty where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def run_on_core(core: int) -> None:
    """Run this process on one core only. Raises ``OSError`` when it may not."""
    os.sched_setaffinity(0, {core})


def adopt(pid: int, started: int) -> Process | None:
    """A process that runs already; None when it has ended."""
    try:
        process = Process(pid, started)
    except OSError:
        return None
    if start_time(pid) != started or process.wait_blocking(0):
        process.forget()
        return None
    return process


def start_time(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 when there is none (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])
