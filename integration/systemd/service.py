"""toppy-gw as a service of the machine, and what a test does to it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.conftest import ENGINES
from integration.load import RunningLoad, running_load
from integration.processes import BIN, Running, free_udp_port, start, wait_until
from integration.systemd.machine import Machine

UNIT = "toppy-gw.service"
PROJECT = Path(__file__).parents[2]
IN_MACHINE = "/mnt/toppy"
"""Where the machine sees the project, with wheels of it and of what it needs."""
LISTEN = "127.0.0.1:443"
ECHO_PORT = 9999
RATE = 5_000.0 if ENGINES[0] == "native" else 1_000.0
"""Datagrams per second, beside a whole operating system on two cores."""
CONFIG = Path("etc/toppy/gateway.toml")


@dataclass(frozen=True, slots=True)
class Service:
    """The gateway in the machine."""

    machine: Machine
    directory: Path
    """For logs and configurations of the clients, on this host."""

    def path(self, name: str | Path) -> Path:
        """A file of the machine, as this host reaches it."""
        return self.machine.root / str(name).lstrip("/")

    @property
    def main_pid(self) -> int:
        """Of the control plane, as the machine counts."""
        return int(self.machine.property("MainPID"))

    @property
    def state(self) -> str:
        """As ``systemctl is-active`` says it."""
        return self.machine.property("ActiveState")

    def status(self) -> dict[str, Any]:
        """What ``toppy-gw status --json`` says inside."""
        facts: dict[str, Any] = json.loads(self.machine.do("toppy-gw", "status", "--json"))
        return facts

    def worker_pids(self) -> dict[str, int]:
        """Of all workers, by name."""
        return {worker["name"]: worker["pid"] for worker in self.status()["workers"]}

    def generations(self) -> list[int]:
        """All that still run."""
        return [each["generation"] for each in self.status()["generations"]]

    def start(self) -> None:
        """Returns when it serves."""
        self.machine.do("systemctl", "start", UNIT)

    def stop(self) -> None:
        """Returns when it has ended."""
        self.machine.do("systemctl", "stop", UNIT)

    def wait_for_new_control_plane(self, before: int) -> None:
        """Until another control plane than ``before`` serves."""

        def serves() -> bool:
            return self.state == "active" and self.main_pid not in (0, before)

        wait_until("a new control plane", serves, 30.0)

    def wait_for_only(self, generation: int) -> None:
        """Until every older generation has ended."""
        wait_until(f"only generation {generation}", lambda: self.generations() == [generation])

    @contextlib.contextmanager
    def changed_config(self, old: str, new: str) -> Iterator[None]:
        """Another configuration file, meanwhile."""
        config = self.path(CONFIG)
        before = config.read_text()
        assert old in before
        config.write_text(before.replace(old, new, 1))
        try:
            yield
        finally:
            config.write_text(before)

    @contextlib.contextmanager
    def dropin(self, text: str) -> Iterator[None]:
        """The unit with more or other lines, from its next start on; stopped before and after."""
        directory = self.path(f"run/systemd/system/{UNIT}.d")
        self.stop()
        directory.mkdir(parents=True)
        (directory / "test.conf").write_text(text)
        self.machine.do("systemctl", "daemon-reload")
        try:
            yield
        finally:
            self.stop()
            (directory / "test.conf").unlink()
            directory.rmdir()
            self.machine.do("systemctl", "daemon-reload")

    @contextlib.contextmanager
    def client(self, name: str = "client") -> Iterator[int]:
        """``toppy udp`` beside the gateway, to the echo: its local port."""
        token = self.path("etc/toppy/token").read_text().strip()
        ca = self.directory / "ca.pem"
        ca.write_bytes(self.path("etc/toppy/ca.pem").read_bytes())
        config = self.directory / f"{name}.toml"
        host, _, port = LISTEN.rpartition(":")
        config.write_text(
            f'gateway = "{host}"\nport = {port}\nserver_name = "localhost"\n'
            f'ca_cert_path = "{ca}"\nauth_token = "{token}"\nmtu = 1350\n'
            '[[policy.allow]]\ncidr = "127.0.0.1/32"\nports = ["1-65535"]\n'
        )
        config.chmod(0o600)
        local = free_udp_port()
        arguments: list[str | Path] = [
            *(BIN / "toppy", "udp", "--config", config),
            *("--listen", f"127.0.0.1:{local}", "--target", f"127.0.0.1:{ECHO_PORT}"),
        ]
        running = start(self.machine.beside(*arguments), self.directory / f"{name}.log")
        try:
            running.wait_for_output("toppy udp listening on")
            yield local
        finally:
            running.stop()

    @contextlib.contextmanager
    def load(self) -> Iterator[RunningLoad]:
        """Numbered datagrams through a client and the gateway to the echo and back."""
        enter = tuple(map(str, self.machine.beside()))
        with self.client() as port, running_load(port, RATE, enter=enter) as running:
            yield running

    def relays(self) -> bool:
        """Whether a client that comes now gets all that it sends echoed, in order."""
        enter = tuple(map(str, self.machine.beside()))
        with self.client("later") as port, running_load(port, 100.0, enter=enter) as running:
            wait_until("echoes", lambda: running.report().received >= 20)
            return running.stop().is_whole


@contextlib.contextmanager
def running_echo(machine: Machine, directory: Path) -> Iterator[Running]:
    """The private service that clients reach through the gateway."""
    arguments = [sys.executable, "-m", "integration.peers", "echo", "127.0.0.1", str(ECHO_PORT)]
    running = start(machine.beside(*arguments), directory / "echo.log")
    try:
        running.wait_for_output("echo ready")
        yield running
    finally:
        running.stop()


def install(machine: Machine, *variables: str) -> str:
    """``make install`` inside, as root, without a package index; what it says."""
    wheels = f"{IN_MACHINE}/docker/wheels"
    return machine.do(
        *("make", "--no-print-directory", "--directory", IN_MACHINE, "install"),
        f"PACKAGE={wheels}/toppy-*.whl",
        *variables,
        environ={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels},
    )
