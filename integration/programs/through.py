"""Programs of others, and toppy's commands that stand between them and what they talk to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from integration.processes import BIN, Gateway, free_tcp_port, start

SITE: Final = "site.lan.test"
"""Names that only the gateway can resolve: what reaches them has gone through it."""
SHELL: Final = "shell.lan.test"
DATABASE: Final = "database.lan.test"
RESOLVER: Final = "resolver.lan.test"
SPEED: Final = "speed.lan.test"
NAMES: Final = (SITE, SHELL, DATABASE, RESOLVER, SPEED)

in_one_process = pytest.mark.xdist_group("programs")
"""The tests of this directory share one gateway, one `toppy proxy` and the servers."""

_MOST_SECONDS: Final = 60.0
"""For one program, on a loaded machine."""


def need(program: str, package: str) -> str:
    """Where a program is; skips the test, and says why, where it is not installed."""
    places = [os.environ.get("PATH", ""), "/usr/sbin"]
    places += map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    found = shutil.which(program, path=":".join(places))
    if found is None:
        pytest.skip(f"{program} is not installed (package {package})")
    return found


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without proxies and certificates that are meant for something else."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.search(r"(?i)_proxy$|^SSL_CERT|^GIT_|^SSH_|^PG|^CURL_CA", name)
    }
    return {**kept, "LC_ALL": "C.UTF-8", **(extra or {})}


def ran(
    arguments: Sequence[str | Path],
    *,
    stdin: str | None = None,
    directory: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end, which must be a good one; its standard output."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        cwd=directory,
        env=environment(environ),
        capture_output=True,
        text=True,
        timeout=_MOST_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Client:
    """What toppy's client commands need to reach the gateway of these tests."""

    gateway: Gateway
    config: Path


@contextlib.contextmanager
def local_port(client: Client, target: str) -> Iterator[int]:
    """The port of a ``toppy up`` to ``target``."""
    port = free_tcp_port()
    running = start(
        [
            *(BIN / "toppy", "up", "--config", client.config),
            *("--listen", f"127.0.0.1:{port}", "--target", target),
        ],
        client.gateway.directory / f"up-{port}.log",
    )
    try:
        running.wait_for_output("toppy up listening on")
        yield port
    finally:
        running.stop()


@contextlib.contextmanager
def local_proxy(client: Client) -> Iterator[int]:
    """The port of a ``toppy proxy``."""
    port = free_tcp_port()
    running = start(
        [BIN / "toppy", "proxy", "--config", client.config, "--listen", f"127.0.0.1:{port}"],
        client.gateway.directory / "proxy.log",
    )
    try:
        running.wait_for_output("toppy proxy listening on")
        yield port
    finally:
        running.stop()


def ssh_proxy(client: Client) -> str:
    """OpenSSH's ProxyCommand."""
    return f"{BIN / 'toppy'} ssh-proxy --config {client.config} %h %p"
