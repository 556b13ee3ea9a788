"""Signals that wait until somebody can obey them; in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

HANDLE = """
import os, signal, sys
from toppy.system.stop_signals import hold_stop_signals, release_stop_signals, stop_later
heard = []
def handle(*names):
    for name in names:
        signal.signal(getattr(signal, name), lambda number, _: heard.append(number))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANDLE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_that_is_held_waits_for_its_handler(name: str) -> None:
    done = run(
        f"""
        hold_stop_signals()
        os.kill(os.getpid(), signal.{name})
        handle("{name}")
        assert heard == []
        release_stop_signals()
        assert heard == [signal.{name}]
        """
    )
    assert done.returncode == 0, done.stderr


def test_it_waits_across_a_change_of_program() -> None:
    done = run(
        f"""
        hold_stop_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        stop_later()
        after = {HANDLE!r} + "handle('SIGTERM', 'SIGHUP')\\nrelease_stop_signals()\\nprint(heard)"
        os.execv(sys.executable, [sys.executable, "-c", after])
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([int(signal.SIGHUP), int(signal.SIGTERM)])


def test_without_a_handler_it_does_what_it_does_everywhere() -> None:
    done = run("hold_stop_signals()\nstop_later()\nrelease_stop_signals()\nprint('not reached')")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == ""
