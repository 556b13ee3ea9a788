"""A path between two network namespaces for everything that IP carries: rate, delay, loss, queue.

A TUN device in each namespace, a ``Link`` for each direction between them: what UDP and the
kernel's TCP send meets in one queue. ``python -m integration.bench.tun_path JSON`` is the process;
it needs root and ``/dev/net/tun``, and runs until its standard input ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from integration.lossy_path import TICK_S, Link, PathSettings
from integration.path_process import PathProcess, running_path_process

TUN: Final = Path("/dev/net/tun")
NEAR_HOST: Final = "198.18.0.1"
FAR_HOST: Final = "198.18.0.2"
"""Of the block for benchmarks (RFC 2544)."""
DEVICE: Final = "path"
_MTU: Final = 1500
_QUEUE_PACKETS: Final = 10_000
"""Of the device: all that drops is to be the path."""
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_READS_PER_WAKE_UP: Final = 256


def _open_tun(namespace: str) -> int:
    """A device in the namespace with this file. Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN_NO_PI))
        finally:
            libc.setns(home, _CLONE_NEWNET)
    finally:
        os.close(home)
        os.close(there)
    return tun


class _Relay:
    """The links and their devices."""

    def __init__(self, near: int, far: int, settings: PathSettings) -> None:
        self._ways = {
            near: (Link(settings, settings.seed), far),
            far: (Link(settings, settings.seed + 1), near),
        }
        self._packets = 0
        self._unsent = 0

    def run(self) -> None:
        """Until the standard input ends."""
        questions = sys.stdin.fileno()
        next_release = 0.0
        while True:
            dues = [due for link, _ in self._ways.values() if (due := link.next_due()) is not None]
            wait_s = max(0.0, max(min(dues), next_release) - time.monotonic()) if dues else None
            for descriptor in select.select([questions, *self._ways], [], [], wait_s)[0]:
                if descriptor == questions:
                    if not os.read(questions, 4096):
                        return
                    print(json.dumps(self._answer()), flush=True)
                else:
                    self._read(descriptor)
            now = time.monotonic()
            if now >= next_release:
                next_release = now + TICK_S
                self._release(now)

    def _read(self, tun: int) -> None:
        link = self._ways[tun][0]
        now = time.monotonic()
        for _ in range(_READS_PER_WAKE_UP):
            try:
                packet = os.read(tun, _MTU)
            except BlockingIOError:
                return
            self._packets += 1  # each its own flow: nothing is joined
            link.take(self._packets, packet, 0, now)

    def _release(self, now: float) -> None:
        for link, to in self._ways.values():
            for _, packet, _ in link.release(now):
                try:
                    os.write(to, packet)
                except OSError:
                    self._unsent += 1

    def _answer(self) -> dict[str, Any]:
        to_far, to_near = (asdict(link.take_counts()) for link, _ in self._ways.values())
        unsent, self._unsent = self._unsent, 0
        return {
            "to_far": to_far,
            "to_near": to_near,
            "failures": unsent,
            "cpu_s": time.process_time(),
        }


@contextlib.contextmanager
def running_tun_path(near: str, far: str, settings: PathSettings) -> Iterator[PathProcess]:
    """A path from ``NEAR_HOST`` to ``FAR_HOST``, the namespaces with these files."""
    arguments = {"near": near, "far": far, "settings": asdict(settings)}
    with running_path_process(__name__, arguments) as path:
        path.ask()  # it is there
        for namespace, own, other in ((near, NEAR_HOST, FAR_HOST), (far, FAR_HOST, NEAR_HOST)):
            for command in (
                f"ip address add {own} peer {other} dev {DEVICE}",
                f"ip link set {DEVICE} mtu {_MTU} txqueuelen {_QUEUE_PACKETS} up",
            ):
                subprocess.run(["nsenter", f"--net={namespace}", *command.split()], check=True)
        yield path


def main() -> None:
    """Entry point of the path's process."""
    arguments = json.loads(sys.argv[1])
    near, far = _open_tun(arguments["near"]), _open_tun(arguments["far"])
    _Relay(near, far, PathSettings(**arguments["settings"])).run()


if __name__ == "__main__":
    main()
