"""Real gateways and clients as processes: for tests, demo and benchmark."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

BIN = Path(sys.executable).parent
DEADLINE_S = 20.0
"""For anything to come up, on a loaded machine."""


_PORTS_PER_PROCESS = 3000
_FIRST_PORT = 20_000
"""Below the kernel's ephemeral ports (32,768 up), which any socket may take at any time."""


def _port_candidates() -> Iterator[int]:
    """Every port of this test process's own share, again and again."""
    index = int(os.environ.get("PYTEST_XDIST_WORKER", "gw3").removeprefix("gw")) % 4
    first = _FIRST_PORT + index * _PORTS_PER_PROCESS
    start = os.getpid() * 37 % _PORTS_PER_PROCESS
    for step in itertools.count(start):
        yield first + step % _PORTS_PER_PROCESS


_candidates = _port_candidates()


def _free_port(host: str, kind: socket.SocketKind) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in itertools.islice(_candidates, _PORTS_PER_PROCESS):
        with socket.socket(family, kind) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise AssertionError("no free port")


def free_udp_port(host: str = "127.0.0.1") -> int:
    """A UDP port that nobody has, and that no other test process will try."""
    return _free_port(host, socket.SOCK_DGRAM)


def free_tcp_port() -> int:
    """A TCP port that nobody has, and that no other test process will try."""
    return _free_port("127.0.0.1", socket.SOCK_STREAM)


def wait_until(what: str, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Poll ``condition``; raises ``TimeoutError`` that names ``what``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(0.02)


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command of this installation (``toppy``, ``toppy-gw``), to its end."""
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


@dataclass
class Running:
    """A process whose output goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        """Everything that it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for_output(self, text: str) -> None:
        """Until it has printed ``text``; fails at once when it has ended instead."""

        def said_or_ended() -> bool:
            return text in self.output() or self.process.poll() is not None

        wait_until(f"output {text!r}", said_or_ended)
        if text not in self.output():
            raise AssertionError(f"ended without saying {text!r}:\n{self.output()}")

    def stop(self, signal_number: int = signal.SIGTERM, deadline_s: float = 10.0) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def start(
    arguments: Sequence[str | Path], log: Path, environ: dict[str, str] | None = None
) -> Running:
    """Start a process with its output in ``log``."""
    own = {"TOPPY_AUDIT_LOG": f"{log}.audit.jsonl", "PYTHONUNBUFFERED": "1"}
    environ = {**os.environ, **own, **(environ or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(a) for a in arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    return Running(process, log)


@dataclass
class Gateway:
    """A running ``toppy-gw`` with a directory of its own."""

    directory: Path
    host: str
    port: int
    health_port: int
    running: Running
    token: str = field(repr=False)

    def healthz(self) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.health_port}/healthz", trust_env=False)

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name with labels."""
        text = httpx.get(f"http://127.0.0.1:{self.health_port}/metrics", trust_env=False).text
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for sample, value in self.metrics().items()
            if sample.partition("{")[0] == name and all(w in sample for w in wanted)
        )

    def status(self) -> dict[str, Any]:
        """What ``toppy-gw status --json`` says, asked directly."""
        return self.ask("GET", "/status")

    def ask(self, method: str, path: str) -> dict[str, Any]:
        """What the admin socket answers."""
        transport = httpx.HTTPTransport(uds=str(self.directory / "run" / "admin.sock"))
        with httpx.Client(transport=transport, timeout=60, trust_env=False) as client:
            facts: dict[str, Any] = client.request(method, f"http://toppy-gw{path}").json()
            return facts


def write_gateway_config(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int,
    health_port: int,
    workers: int = 1,
    engine: str = "auto",
    rules: str | None = None,
    extra: str = "",
    is_steered: bool = True,
) -> None:
    """``gateway.toml`` over the files that ``toppy-gw init`` wrote. ``rules`` is TOML; without it
    UDP to this host's loopback addresses is allowed. ``extra`` is TOML that begins in ``[quic]``.
    """
    if rules is None:
        rules = """
[[policy.rules]]
name = "loopback"
action = "allow"
cidr = ["127.0.0.0/8", "::1/128"]
"""
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    (directory / "gateway.toml").write_text(
        f"""
workers = {workers}
runtime_dir = "run"
[listen]
quic = ["{listen}"]
health = "127.0.0.1:{health_port}"
steering = {str(is_steered).lower()}
[tls]
certificate = "server.pem"
private_key = "server-key.pem"
[auth]
token_file = "token"
[quic]
engine = "{engine}"
{extra}
{rules}
"""
    )


@contextlib.contextmanager
def running_gateway(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    workers: int = 1,
    engine: str = "auto",
    rules: str | None = None,
    extra: str = "",
    is_steered: bool = True,
    environ: dict[str, str] | None = None,
    program: Path = BIN / "toppy-gw",
) -> Iterator[Gateway]:
    """A gateway that serves, and is stopped at the end."""
    port, health_port = free_udp_port(host), free_tcp_port()
    made = run_command("toppy-gw", "init", str(directory), "--listen", f"127.0.0.1:{port}")
    assert made.returncode == 0, made.stderr
    write_gateway_config(
        directory,
        host=host,
        port=port,
        health_port=health_port,
        workers=workers,
        engine=engine,
        rules=rules,
        extra=extra,
        is_steered=is_steered,
    )
    running = start(
        [program, "run", "--config", directory / "gateway.toml"],
        directory / "gateway.log",
        environ,
    )
    token = (directory / "token").read_text().strip()
    gateway = Gateway(directory, host, port, health_port, running, token)
    try:
        running.wait_for_output("gateway serves")
        yield gateway
    finally:
        running.stop()


def write_client_config(
    gateway: Gateway, path: Path, *, engine: str = "auto", extra: str = ""
) -> Path:
    """A client configuration that allows any target: the gateway's policy is what is tested.
    ``extra`` is TOML that begins in the table ``[quic]``.
    """
    path.write_text(
        f"""
gateway = "{gateway.host}"
port = {gateway.port}
server_name = "localhost"
ca_cert_path = "{gateway.directory / "ca.pem"}"
auth_token = "{gateway.token}"
mtu = 1350
[quic]
engine = "{engine}"
{extra}
[policy]
[[policy.allow]]
cidr = "0.0.0.0/0"
ports = ["1-65535"]
[[policy.allow]]
cidr = "::/0"
ports = ["1-65535"]
[[policy.allow]]
host = "*"
ports = ["1-65535"]
"""
    )
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def running_udp_client(
    gateway: Gateway,
    target: str,
    *,
    engine: str = "auto",
    name: str = "client",
    extra: str = "",
    environ: dict[str, str] | None = None,
) -> Iterator[tuple[int, Running]]:
    """``toppy udp`` to ``target``: its local port, and the process."""
    config = write_client_config(
        gateway, gateway.directory / f"{name}.toml", engine=engine, extra=extra
    )
    port = free_udp_port()
    running = start(
        [
            *(BIN / "toppy", "udp", "--config", config),
            *("--listen", f"127.0.0.1:{port}", "--target", target),
        ],
        gateway.directory / f"{name}.log",
        environ,
    )
    try:
        running.wait_for_output("toppy udp listening on")
        yield port, running
    finally:
        running.stop()


UNLIMITED = "[rate]\nbytes_per_sec = 0\nburst_bytes = 0\n"


@contextlib.contextmanager
def running_direct_up(
    directory: Path, target: str, *options: str, extra: str = UNLIMITED, name: str = "up"
) -> Iterator[tuple[int, Running]]:
    """``toppy up --direct`` to a loopback ``target``: its local port, and the process. ``extra`` is
    TOML of its configuration.
    """
    config = directory / f"{name}.toml"
    config.write_text(
        f"""
gateway = "localhost"
[[policy.allow]]
cidr = ["127.0.0.0/8", "::1/128"]
ports = ["1-65535"]
protocol = "tcp"
{extra}
"""
    )
    port = free_tcp_port()
    running = start(
        [
            *(BIN / "toppy", "up", "--config", config, "--direct"),
            *("--listen", f"127.0.0.1:{port}", "--target", target, *options),
        ],
        directory / f"{name}.log",
    )
    try:
        running.wait_for_output("toppy up listening on")
        yield port, running
    finally:
        running.stop()
