"""What an earlier control plane left with which nobody can go on: its workers are ended.

Their secrets are lost: the state was removed, damaged, or written by code that this one does not
understand. They would go on reading the listening sockets, and nobody could tell them anything.
Their sockets in the runtime directory, which is this gateway's alone, say who they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Collection
from pathlib import Path

from toppy.control.saved_state import SavedState, UnreadableStateError, read_state
from toppy.ipc.worker_sockets import remove_sockets, takeover_path
from toppy.observe.log import get_logger

_NAME = re.compile(r"worker-([0-9]{1,3})\.sock")
_PATIENCE_S = 2.0
"""For telling their clients; then they are killed."""
_KILL_DEADLINE_S = 1.0
_CREDENTIALS = struct.Struct("3i")
"""ucred of unix(7): PID, user, group."""

_log = get_logger("control")


def usable_state(runtime_dir: Path) -> SavedState | None:
    """What the last control plane left, if this one can go on with it."""
    try:
        return read_state(runtime_dir)
    except UnreadableStateError as error:
        _log.error("the earlier workers cannot be taken over", reason=str(error))
        return None


def end_leftovers(runtime_dir: Path, *, except_slots: Collection[int] = ()) -> list[int]:
    """End every worker that can be found in ``runtime_dir``, but those of ``except_slots``; their
    PIDs. Blocks until they have ended, for three seconds at most.
    """
    found: dict[int, tuple[int, int]] = {}
    for slot in sorted(_slots(runtime_dir) - set(except_slots)):
        worker = _listener(takeover_path(str(runtime_dir), slot))
        if worker is not None:
            found[slot] = worker
    running = {pidfd for _, pidfd in found.values()}
    for number, patience_s in (
        (signal.SIGTERM, _PATIENCE_S),
        (signal.SIGKILL, _KILL_DEADLINE_S),
    ):
        for pidfd in running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
        running = _still_running(running, patience_s)
    for slot, (pid, pidfd) in found.items():
        _log.warning("a worker that nobody could take over was ended", slot=slot, pid=pid)
        with contextlib.suppress(ChildProcessError):  # after an upgrade they are our children
            os.waitpid(pid, os.WNOHANG)
        os.close(pidfd)
        remove_sockets(str(runtime_dir), slot)
    return [pid for pid, _ in found.values()]


def _still_running(pidfds: set[int], patience_s: float) -> set[int]:
    """Those that have not ended within ``patience_s``."""
    running = set(pidfds)
    poll = select.poll()  # select takes no descriptors above 1023
    for pidfd in running:
        poll.register(pidfd, select.POLLIN)
    end = time.monotonic() + patience_s
    while running and (left_s := end - time.monotonic()) > 0:
        for pidfd, _ in poll.poll(left_s * 1000):
            poll.unregister(pidfd)
            running.discard(pidfd)
    return running


def _slots(runtime_dir: Path) -> set[int]:
    try:
        names = [path.name for path in runtime_dir.iterdir()]
    except OSError:  # somebody removed it
        return set()
    return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}


def _listener(path: str) -> tuple[int, int] | None:
    """PID and pidfd of the process that listens on a unix socket; None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, user, _ = _CREDENTIALS.unpack(raw)
            if pid in (0, os.getpid()) or user != os.geteuid():
                return None
            pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):  # it has ended; or another system than Linux
            return None
        # while it lives the line is open: then the number is still that process's
        poll = select.poll()
        poll.register(probe, select.POLLIN)
        if poll.poll(0):
            os.close(pidfd)
            return None
    return pid, pidfd
