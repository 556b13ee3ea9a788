"""Control groups of a test's own: everything that runs in one ends with it."""

from __future__ import annotations

import os
from pathlib import Path

from integration.processes import wait_until


class CannotStartError(Exception):
    """A part of a test cannot be started on this host; the text says why."""


def cgroup_root() -> Path:
    """Where control groups are made. Raises ``CannotStartError``."""
    if os.geteuid() != 0:
        raise CannotStartError("it takes root")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(place.split()[4])
    raise CannotStartError("there is no cgroup2 file system")


def remove_cgroup(cgroup: Path) -> None:
    """With whatever still runs in it: containers of a killed engine, a machine that hangs."""
    (cgroup / "cgroup.kill").write_text("1")
    events = cgroup / "cgroup.events"
    wait_until(f"the end of {cgroup.name}", lambda: "populated 0" in events.read_text())
    for path, _, _ in os.walk(cgroup, topdown=False):
        Path(path).rmdir()
