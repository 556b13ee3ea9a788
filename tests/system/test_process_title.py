from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
from pathlib import Path
from toppy.system.process_title import set_process_title

set_process_title("toppy-gw: worker 1 gen 3")
print(Path("/proc/self/cmdline").read_bytes().rstrip(b"\\0").decode())
"""


def test_ps_shows_the_title_and_nothing_of_the_command_line() -> None:
    # in a process of its own: the title would stay
    shown = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "a-secret-argument"],
        capture_output=True,
        check=True,
        text=True,
        timeout=30,
    )
    assert shown.stdout.strip() == "toppy-gw: worker 1 gen 3"
