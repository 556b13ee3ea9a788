"""A Docker engine of the tests' own, in namespaces of its own: nothing of the host's engine, if it
has one, is used or seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.cgroup import CannotStartError, cgroup_root, remove_cgroup
from integration.processes import start, wait_until

COMMAND_DEADLINE_S = 120.0
_TOOLS = ("dockerd", "docker", "docker-compose", "iptables", "ip", "unshare", "nsenter")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# $1 cgroup, $2 network namespace, $3 directory. The engine wants a cgroup tree that it owns (its
# root must have no process, hence `init`), and a mount namespace so that no mount outlives it;
# `ip netns exec` has put a new /sys there.
_START = """
set -e
echo $$ > "$1/cgroup.procs"
exec ip netns exec "$2" unshare --mount --cgroup sh -ec '
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mkdir /sys/fs/cgroup/init
  echo $$ > /sys/fs/cgroup/init/cgroup.procs
  exec dockerd --host "unix://$1/docker.sock" --data-root "$1/data" --exec-root "$1/exec" \
    --pidfile "$1/dockerd.pid" --exec-opt native.cgroupdriver=cgroupfs
' sh "$3"
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    directory: Path
    namespace: str
    """Of the network: what an engine publishes on its host's addresses is reachable there."""

    @property
    def environ(self) -> dict[str, str]:
        """For programs that talk to the engine."""
        return {**os.environ, "PATH": _PATH, "DOCKER_HOST": f"unix://{self.directory}/docker.sock"}

    def run_on_host(
        self,
        *arguments: str | Path,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """A command beside the engine, in its network namespace, to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            check=False,
            env={**self.environ, **(environ or {})},
            **options,
        )

    def docker(self, *arguments: str, **options: Any) -> str:
        """What a ``docker`` command says, which must succeed."""
        done = self.run_on_host("docker", *arguments, **options)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def inspect(self, container: str) -> dict[str, Any]:
        """Everything that the engine knows about a container."""
        facts: dict[str, Any] = json.loads(self.docker("inspect", container))[0]
        return facts

    def health(self, container: str) -> str:
        """``starting``, ``healthy`` or ``unhealthy``; empty when it has no check."""
        found: str = self.inspect(container)["State"].get("Health", {}).get("Status", "")
        return found

    def pid(self, container: str) -> int:
        """Of its first process, as this host counts."""
        found: int = self.inspect(container)["State"]["Pid"]
        return found


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """Raises ``CannotStartError``; leaves nothing behind."""
    cgroups = cgroup_root()
    for tool in _TOOLS:
        if shutil.which(tool, path=_PATH) is None:
            raise CannotStartError(f"{tool} is not installed")
    with contextlib.ExitStack() as cleanup:
        # short, because unix socket paths are limited to 107 bytes
        directory = Path(tempfile.mkdtemp(prefix="toppy-dk-"))
        cleanup.callback(shutil.rmtree, directory)
        engine = Engine(directory, directory.name)
        _run("ip", "netns", "add", engine.namespace)
        cleanup.callback(_run, "ip", "netns", "del", engine.namespace)
        _run("ip", "-n", engine.namespace, "link", "set", "lo", "up")
        cgroup = cgroups / engine.namespace
        cgroup.mkdir()
        cleanup.callback(remove_cgroup, cgroup)
        log = directory / "dockerd.log"
        arguments = ["sh", "-c", _START, "sh", str(cgroup), engine.namespace, str(directory)]
        running = start(arguments, log, {"PATH": _PATH})

        def stop() -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.stop(deadline_s=20.0)

        cleanup.callback(stop)

        def answers_or_ended() -> bool:
            return (
                running.process.poll() is not None
                or engine.run_on_host("docker", "info").returncode == 0
            )

        try:
            wait_until("the engine's first answer", answers_or_ended)
        except TimeoutError:
            raise CannotStartError(f"dockerd does not answer: {_last_line(log)}") from None
        if running.process.poll() is not None:
            raise CannotStartError(f"dockerd ended: {_last_line(log)}")
        yield engine


def _run(*arguments: str) -> None:
    try:
        subprocess.run(arguments, check=True, capture_output=True, env={"PATH": _PATH}, timeout=30)
    except subprocess.CalledProcessError as error:
        raise CannotStartError(f"{' '.join(arguments)}: {error.stderr.decode().strip()}") from None


def _last_line(log: Path) -> str:
    lines: Sequence[str] = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it says nothing"
