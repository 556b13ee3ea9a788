"""The signals that operators and service managers send, held back while nobody could obey them.

What is held waits: for handlers that come later, and across ``execve``, which keeps mask and
waiting signals (signal(7)).
"""

from __future__ import annotations

import signal

_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def hold_stop_signals() -> None:
    """From here on they wait. Of this thread, and of those that it starts from here on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def release_stop_signals() -> None:
    """Their handlers are there; what waits is delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def stop_later() -> None:
    """Have SIGTERM wait for whoever releases it; it is being held."""
    signal.raise_signal(signal.SIGTERM)
