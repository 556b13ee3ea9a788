"""Ways of a TCP connection from an application to its target, with and without a tunnel between.

Settings that differ from what each program does by itself are those in ``forward`` and ``peers``;
``ssh -L`` has OpenSSH's defaults, one connection and no compression.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import psutil

from integration.bench.forward import DIRECT, HOST, haproxy, no_forwarder, socat
from integration.bench.peers import (
    HYSTERIA2,
    TUIC,
    PeerMissing,
    find_sing_box,
    last_words,
    running_all,
    sing_box_configs,
    write_certificates,
)
from integration.bench.tcp_load import start_tcp_load
from integration.bench.ways import Way, worker_processes
from integration.processes import (
    BIN,
    DEADLINE_S,
    UNLIMITED,
    Gateway,
    Running,
    free_tcp_port,
    running_gateway,
    start,
    write_client_config,
)

TOPPY: Final = "toppy up"
_TRY_S: Final = 0.5
_SPARE_S: Final = 60.0
"""What a load process may take longer than it should."""
_LIMITS: Final = """
[limits]
max_tunnels_per_connection = 4000
max_streams_per_connection = 4000
"""
_SSHD: Final = """
ListenAddress {host}:{port}
HostKey {directory}/host-key
AuthorizedKeysFile {directory}/user-key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
"""
_SEPARATION: Final = Path("/run/sshd")
"""sshd wants this empty directory when it is root; its package makes it at boot."""


@contextlib.contextmanager
def running_up(
    gateway: Gateway,
    target: str,
    *,
    name: str = "up",
    engine: str = "auto",
    prefix: Sequence[str] = (),
) -> Iterator[tuple[int, Running]]:
    """``toppy up`` through a gateway: its local port, and the process. ``prefix``: a command that
    runs it, in another namespace maybe.
    """
    config = write_client_config(
        gateway, gateway.directory / f"{name}.toml", engine=engine, extra=UNLIMITED
    )
    port = free_tcp_port()
    running = start(
        [
            *prefix,
            *(BIN / "toppy", "up", "--config", config),
            *("--listen", f"{HOST}:{port}", "--target", target),
        ],
        gateway.directory / f"{name}.log",
        {"TOPPY_TCP_MAX_CONNECTIONS": "4000"},
    )
    try:
        running.wait_for_output("toppy up listening on")
        yield port, running
    finally:
        running.stop()


@contextlib.contextmanager
def toppy_up(engine: str = "auto") -> Iterator[Way]:
    """A gateway with one worker, and ``toppy up``."""
    target = free_tcp_port()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        running_gateway(Path(directory), engine=engine, extra=_LIMITS) as gateway,
        running_up(gateway, f"{HOST}:{target}", engine=engine) as (port, client),
    ):
        way = Way(
            TOPPY,
            HOST,
            port,
            HOST,
            target,
            {"gateway": worker_processes(gateway), "client": (psutil.Process(client.pid),)},
        )
        _wait_until_open(way, {"client": client})
        yield way


@contextlib.contextmanager
def ssh() -> Iterator[Way]:
    """``ssh -L``, and an sshd."""
    sshd, client, keygen = _find("sshd"), _find("ssh"), _find("ssh-keygen")
    way = _new_way("ssh -L")
    port = free_tcp_port()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for name in ("host-key", "user-key"):
            subprocess.run(
                [keygen, "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True
            )
        (directory / "known_hosts").write_text(
            f"[{HOST}]:{port} {(directory / 'host-key.pub').read_text()}"
        )
        config = directory / "sshd_config"
        config.write_text(_SSHD.format(host=HOST, port=port, directory=directory))
        if not _SEPARATION.exists():
            with contextlib.suppress(PermissionError):  # then sshd does not want it either
                _SEPARATION.mkdir(mode=0o755)
                stack.callback(_remove_separation)
        commands: dict[str, Sequence[str | Path]] = {
            "gateway": [sshd, "-D", "-e", "-f", config],
            "client": [
                *(client, "-F", "none", "-N", "-o", "BatchMode=yes", "-p", str(port)),
                *("-o", f"UserKnownHostsFile={directory / 'known_hosts'}"),
                *("-o", "IdentitiesOnly=yes", "-i", directory / "user-key"),
                *("-o", "ConnectionAttempts=10", "-o", "ExitOnForwardFailure=yes"),
                *("-L", f"{HOST}:{way.port}:{HOST}:{way.target_port}"),
                f"{getpass.getuser()}@{HOST}",
            ],
        }
        yield stack.enter_context(running_all(way, commands, _wait_until_open))


def _remove_separation() -> None:
    with contextlib.suppress(OSError):  # somebody else was faster
        _SEPARATION.rmdir()


@contextlib.contextmanager
def sing_box(kind: str) -> Iterator[Way]:
    """sing-box as "hysteria2" or "tuic", server and client."""
    program = find_sing_box()
    way = _new_way(f"sing-box {kind}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        write_certificates(directory)
        settings = HYSTERIA2 if kind == "hysteria2" else TUIC
        server, client = sing_box_configs(kind, way, directory, settings, network="tcp")
        commands: dict[str, Sequence[str | Path]] = {}
        for role, config in (("gateway", server), ("client", client)):
            path = directory / f"{role}.json"
            path.write_text(json.dumps(config))
            path.chmod(0o600)
            commands[role] = [program, "run", "--disable-color", "-c", path]
        with running_all(way, commands, _wait_until_open) as opened:
            yield opened


WAYS: Final[Mapping[str, Callable[[], AbstractContextManager[Way]]]] = {
    DIRECT: no_forwarder,
    TOPPY: toppy_up,
    "ssh -L": ssh,
    "sing-box, Hysteria2": lambda: sing_box("hysteria2"),
    "sing-box, TUIC": lambda: sing_box("tuic"),
    "haproxy": haproxy,
    "socat": socat,
}
"""By the name in the report. Each raises ``PeerMissing`` when it is entered where it cannot run."""


@contextlib.contextmanager
def running_sink(
    host: str, port: int, *, prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A target of every load."""
    sink = start_tcp_load("sink", host=host, port=port, prefix=prefix)
    try:
        wait_until_ready(sink)
        yield sink
    finally:
        sink.kill()
        sink.communicate()


def wait_until_ready(load: subprocess.Popen[str]) -> None:
    """Until a load process that runs on says so. Raises ``RuntimeError`` when it fails."""
    assert load.stderr is not None
    if not load.stderr.readline().startswith("ready"):
        raise RuntimeError(f"a load process failed:\n{load.stderr.read()}")


def finish(load: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """What a load process found. Raises ``RuntimeError`` when it failed."""
    try:
        out, error = load.communicate(timeout=seconds + _SPARE_S)
    finally:
        load.kill()
    if load.returncode:
        raise RuntimeError(f"a load process failed:\n{error}")
    result: dict[str, Any] = json.loads(out)
    return result


def _find(program: str) -> str:
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise PeerMissing(f"{program} is not installed")
    return found


def _new_way(name: str) -> Way:
    return Way(name, HOST, free_tcp_port(), HOST, free_tcp_port())


def _wait_until_open(way: Way, runnings: Mapping[str, Running]) -> None:
    """Until bytes come through. Raises ``PeerMissing`` with what the processes said."""
    with socket.create_server((way.target_host, way.target_port)) as target:
        target.settimeout(_TRY_S)
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if any(running.process.poll() is not None for running in runnings.values()):
                break
            try:
                with socket.create_connection((way.host, way.port), _TRY_S) as app:
                    app.sendall(b"hello")
                    with target.accept()[0] as arrived:
                        arrived.settimeout(_TRY_S)
                        if arrived.recv(64):
                            return
            except OSError:  # not yet
                time.sleep(0.05)
    said = "; ".join(f"{role}: {last_words(running)}" for role, running in runnings.items())
    raise PeerMissing(f"{way.name} was started, but no byte came through ({said})")
