"""Tells the service manager (systemd) how the gateway is doing; see sd_notify(3).

Everything is silent where there is none, and a service manager that does not listen is no reason
to stop: nothing here raises for what it does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping

import sdnotify

_SEND_TIMEOUT_S = 1.0
"""The manager reads at once unless it is stuck; then the gateway goes on without it."""


class ServiceManager:
    """One process's line to its service manager, found in the environment.

    ``clock`` gives seconds of CLOCK_MONOTONIC.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notifier: sdnotify.SystemdNotifier | None = None
        if os.environ.get("NOTIFY_SOCKET"):
            notifier = sdnotify.SystemdNotifier()
            if notifier.socket is not None:
                notifier.socket.settimeout(_SEND_TIMEOUT_S)
                self._notifier = notifier
        self._watchdog_interval_s = _watchdog_interval_s()

    @property
    def is_present(self) -> bool:
        """Whether anybody listens."""
        return self._notifier is not None

    def ready(self) -> None:
        """The gateway serves; also the end of ``reloading``."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """A reload has begun; ``ready`` ends it (``Type=notify-reload`` wants the time)."""
        microseconds = int(self._clock() * 1_000_000)
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={microseconds}")

    def stopping(self) -> None:
        """The gateway has begun to stop."""
        self._tell("STOPPING=1")

    def keep(self, sockets: Mapping[str, socket.socket]) -> None:
        """Keep copies of sockets, and give them to the next start of this service (FDSTORE=1)."""
        if self._notifier is None:
            return
        for name, sock in sockets.items():
            with contextlib.suppress(OSError):
                said = f"FDSTORE=1\nFDNAME={name}".encode()
                socket.send_fds(self._notifier.socket, [said], [sock.fileno()])

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._tell("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Still alive; to be called every ``watchdog_interval_s()``."""
        self._tell("WATCHDOG=1")

    def watchdog_interval_s(self) -> float | None:
        """How often the manager is to hear ``watchdog``: half of what it allows, as
        sd_watchdog_enabled(3) advises. None: never.
        """
        return self._watchdog_interval_s if self._notifier is not None else None

    def close(self) -> None:
        """Hang up; everything is silent from here on."""
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _tell(self, state: str) -> None:
        if self._notifier is not None:
            # sdnotify writes Latin-1 and drops what it cannot write
            self._notifier.notify(state.encode("ascii", "replace").decode("ascii"))


def _watchdog_interval_s() -> float | None:
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", "")
    if not (microseconds.isascii() and microseconds.isdigit()) or int(microseconds) == 0:
        return None
    if meant_for and meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000
