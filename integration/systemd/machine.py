"""A machine of the tests' own: a minimal Debian whose first process is a real systemd, in
namespaces and a cgroup of its own. Nothing of the host's systemd, if it has one, is used or seen.

The file system is made once and kept in the user's cache directory; each machine sees it through
an overlay that ends with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from integration.cgroup import CannotStartError, cgroup_root, remove_cgroup
from integration.processes import start, wait_until

_SUITE = "trixie"
"""Debian 13: systemd 257, Python 3.13."""
_INCLUDE = "systemd,systemd-sysv,dbus,python3,python3-venv,make,procps,iproute2"
_TOOLS = ("systemd-nspawn", "unshare", "nsenter", "mount")
_MAKE_DEADLINE_S = 240.0
_COMMAND_DEADLINE_S = 90.0
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# $1 cgroup, $2 directory of this machine, $3 file system, $4 what it sees at /mnt. nspawn wants a
# cgroup that it owns, and writes to /run/systemd; in a mount namespace that goes with it.
_START = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare --mount --propagation private sh -ec '
  mkdir -p /run/systemd
  mount -t tmpfs tmpfs /run/systemd
  mount -t tmpfs tmpfs "$1/scratch"
  mkdir "$1/scratch/upper" "$1/scratch/work"
  mount -t overlay overlay "$1/root" \
    -o "lowerdir=$2,upperdir=$1/scratch/upper,workdir=$1/scratch/work"
  export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_API_VFS_WRITABLE=1 SYSTEMD_NSPAWN_LOCK=0
  exec systemd-nspawn --quiet --directory="$1/root" --machine=gateway --register=no --keep-unit \
    --private-network --bind-ro="$3:/mnt" --capability=all --system-call-filter=bpf \
    --console=pipe --kill-signal=SIGRTMIN+3 --boot
' sh "$2" "$3" "$4"
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that has booted."""

    leader: int
    """Its first process, as this host counts."""

    @property
    def root(self) -> Path:
        """Its file system, as this host reaches it."""
        return Path(f"/proc/{self.leader}/root")

    def run(
        self, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command inside, as root, to its end."""
        return subprocess.run(
            ["nsenter", "--target", str(self.leader), "--all", "--", *arguments],
            capture_output=True,
            text=True,
            timeout=_COMMAND_DEADLINE_S,
            check=False,
            env={"PATH": "/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8", **(environ or {})},
        )

    def do(self, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        """What a command inside says, which must succeed."""
        done = self.run(*arguments, environ=environ)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{' '.join(arguments)}: {said}"
        return done.stdout.strip()

    def beside(self, *arguments: str | Path) -> list[str | Path]:
        """A command line of this host, in the machine's network."""
        return ["nsenter", f"--net=/proc/{self.leader}/ns/net", *arguments]

    def property(self, name: str, unit: str = "toppy-gw") -> str:
        """What systemd knows about a unit."""
        return self.do("systemctl", "show", "--value", f"--property={name}", unit)

    def processes(self, unit: str = "toppy-gw.service") -> dict[int, str]:
        """A unit's processes, as the machine counts, by their command lines."""
        cgroup = f"/sys/fs/cgroup/system.slice/{unit}/cgroup.procs"
        pids = self.run("cat", cgroup).stdout.split()
        found = {}
        for pid in pids:
            told = self.run("cat", f"/proc/{pid}/cmdline")
            if told.stdout:
                found[int(pid)] = told.stdout.replace("\0", " ").strip()
        return found

    def journal(self, unit: str = "toppy-gw") -> str:
        """What a unit has said since the machine booted."""
        return self.do("journalctl", "--no-pager", "--output=cat", f"--unit={unit}")


def file_system() -> Path:
    """A minimal Debian with systemd and Python, made where there is none yet. Raises
    ``CannotStartError``.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "toppy" / "integration-systemd"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = cache / _SUITE
        if made.exists():
            return made
        if shutil.which("mmdebstrap") is None:
            raise CannotStartError("mmdebstrap, for a file system, is not installed")
        draft = cache / f"{_SUITE}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        done = subprocess.run(
            [
                *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_INCLUDE}"),
                *(_SUITE, str(draft), debian_mirror()),
            ],
            capture_output=True,
            text=True,
            timeout=_MAKE_DEADLINE_S,
            check=False,
        )
        if done.returncode != 0:
            raise CannotStartError(f"mmdebstrap: {_last_line(done.stderr)}")
        draft.rename(made)
        return made


def debian_mirror() -> str:
    """The one that this host uses."""
    for place in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        text = place.read_text(errors="replace") if place.is_file() else ""
        found = re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(https?://\S+/debian/?)\s", text, re.M)
        if found:
            return found[1]
    return "http://deb.debian.org/debian"


@contextlib.contextmanager
def running_machine(shared: Path) -> Iterator[Machine]:
    """Boot; ``shared`` is /mnt inside, read-only. Leaves nothing behind. Raises
    ``CannotStartError``.
    """
    cgroups = cgroup_root()
    for tool in _TOOLS:
        if shutil.which(tool, path=_PATH) is None:
            raise CannotStartError(f"{tool} is not installed")
    root = file_system()
    with contextlib.ExitStack() as cleanup:
        directory = Path(tempfile.mkdtemp(prefix="toppy-sd-"))
        cleanup.callback(shutil.rmtree, directory)
        for name in ("root", "scratch"):
            (directory / name).mkdir()
        cgroup = cgroups / directory.name
        cgroup.mkdir()
        cleanup.callback(remove_cgroup, cgroup)
        log = directory / "console.log"
        arguments = ["sh", "-c", _START, "sh", cgroup, directory, root, shared]
        running = start(list(map(str, arguments)), log, {"PATH": _PATH})

        def stop() -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.stop(deadline_s=20.0)

        cleanup.callback(stop)

        def has_booted_or_ended() -> bool:
            if running.process.poll() is not None:
                return True
            leader = _leader(cgroup)
            if leader is None:
                return False
            asked = Machine(leader).run("systemctl", "is-system-running")
            return asked.stdout.strip() in {"running", "degraded"}

        try:
            wait_until("the machine's boot", has_booted_or_ended, 60.0)
        except TimeoutError:
            raise CannotStartError(
                f"systemd does not boot: {_last_line(log.read_text())}"
            ) from None
        leader = _leader(cgroup)
        if leader is None:
            raise CannotStartError(f"systemd-nspawn: {_last_line(log.read_text())}")
        yield Machine(leader)


def _leader(cgroup: Path) -> int | None:
    """The process that is number 1 in a namespace of its own."""
    for path, _, _ in os.walk(cgroup):
        for pid in (Path(path) / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                numbers = re.search(
                    r"^NSpid:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
                )
                if numbers is not None and numbers[1].split()[1:] == ["1"]:
                    return int(pid)
    return None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"
