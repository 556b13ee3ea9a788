"""Servers that programs talk to: web sites, OpenSSH, PostgreSQL, iperf3."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from integration.processes import Running, free_tcp_port, start
from integration.programs.through import DATABASE, SITE, need, ran
from toppy.system.certificate_authority import issue_server_certificate, make_ca

_SEPARATION: Final = Path("/run/sshd")
"""sshd wants this empty directory when it is root; its package makes it at boot."""


@dataclass(frozen=True, slots=True)
class Sites:
    """The same site twice."""

    http_port: int
    https_port: int
    ca: Path
    git_root: Path
    http: Running
    https: Running

    @property
    def http_url(self) -> str:
        return f"http://{SITE}:{self.http_port}"

    @property
    def https_url(self) -> str:
        return f"https://{SITE}:{self.https_port}"


@contextlib.contextmanager
def running_sites(directory: Path) -> Iterator[Sites]:
    """``web``, with and without TLS."""
    ca = make_ca("toppy test sites")
    server = issue_server_certificate(ca, (SITE, "127.0.0.1"))
    (directory / "ca.pem").write_bytes(ca.certificate_pem)
    (directory / "site.pem").write_bytes(server.certificate_pem)
    (directory / "site-key.pem").write_bytes(server.key_pem)
    root = directory / "git"
    root.mkdir()
    ports = free_tcp_port(), free_tcp_port()
    with contextlib.ExitStack() as ends:
        running = []
        for port, pair in zip(ports, ((), ("site.pem", "site-key.pem")), strict=True):
            command = [sys.executable, "-m", "integration.programs.web", str(port), str(root)]
            command += [str(directory / name) for name in pair]
            running.append(start(command, directory / f"site-{port}.log"))
            ends.callback(running[-1].stop)
            running[-1].wait_for_output("site is ready")
        yield Sites(*ports, directory / "ca.pem", root, *running)


@dataclass(frozen=True, slots=True)
class SshServer:
    """An sshd that one key opens."""

    port: int
    config: Path
    """For ``ssh -F``: the server's address, the key, the way; nothing of the user's own."""


@contextlib.contextmanager
def running_sshd(directory: Path, host: str, proxy_command: str) -> Iterator[SshServer]:
    """sshd with keys and a configuration of its own; ``host`` is what clients call it."""
    sshd = need("sshd", "openssh-server")
    keygen = need("ssh-keygen", "openssh-client")
    for name in ("host-key", "user-key"):
        ran([keygen, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", directory / name])
    shutil.copy(directory / "user-key.pub", directory / "authorized_keys")
    port = free_tcp_port()
    key = " ".join((directory / "host-key.pub").read_text().split()[:2])
    (directory / "known_hosts").write_text(f"{host} {key}\n")
    (directory / "sshd_config").write_text(
        f"""
ListenAddress 127.0.0.1:{port}
HostKey {directory / "host-key"}
AuthorizedKeysFile {directory / "authorized_keys"}
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
    )
    config = directory / "ssh_config"
    config.write_text(
        f"""
Host *.lan.test
    ProxyCommand {proxy_command}
Host inner
    HostName 127.0.0.1
Host *
    Port {port}
    User {getpass.getuser()}
    IdentityFile {directory / "user-key"}
    IdentitiesOnly yes
    UserKnownHostsFile {directory / "known_hosts"}
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    HostKeyAlias {host}
    BatchMode yes
    LogLevel ERROR
"""
    )
    is_ours = os.geteuid() == 0 and not _SEPARATION.exists()
    if is_ours:
        _SEPARATION.mkdir(mode=0o755)
    running = start([sshd, "-D", "-e", "-f", directory / "sshd_config"], directory / "sshd.log")
    try:
        running.wait_for_output("Server listening on")
        yield SshServer(port, config)
    finally:
        running.stop()
        if is_ours:
            with contextlib.suppress(OSError):
                _SEPARATION.rmdir()


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A server of which everybody on loopback is the superuser."""

    port: int
    user: str
    ca: Path


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A new cluster on 127.0.0.1, in a directory that its user owns. PostgreSQL does not run as
    root.
    """
    initdb, postgres = need("initdb", "postgresql"), need("postgres", "postgresql")
    as_user: list[str] = []
    user = getpass.getuser()
    with tempfile.TemporaryDirectory(prefix="toppy-postgres-") as name:
        directory = Path(name)
        if os.geteuid() == 0:
            user = "postgres"
            # unlike runuser it becomes the program, which then gets our signals
            setpriv = need("setpriv", "util-linux")
            as_user = [setpriv, f"--reuid={user}", f"--regid={user}", "--init-groups"]
            try:
                shutil.chown(directory, user)
            except LookupError:
                pytest.skip("there is no user postgres (package postgresql)")
        data = directory / "data"
        ran(
            [
                *as_user,
                *(initdb, "-D", data, "-U", user, "--auth=trust", "--no-sync"),
                *("--locale=C", "--encoding=UTF8"),
            ],
            directory=directory,
        )
        ca = make_ca("toppy test database")
        server = issue_server_certificate(ca, (DATABASE,))
        (directory / "ca.pem").write_bytes(ca.certificate_pem)
        (data / "server.crt").write_bytes(server.certificate_pem)
        key = data / "server.key"
        key.write_bytes(server.key_pem)
        key.chmod(0o600)
        shutil.chown(key, user)
        port = free_tcp_port()
        settings = {
            "ssl": "on",
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_wal_size": "2GB",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with tempfile.TemporaryDirectory(prefix="toppy-postgres-log-") as log:
            running = start([*as_user, postgres, "-D", data, *options], Path(log) / "log")
            try:
                running.wait_for_output("ready to accept connections")
                yield PostgresServer(port, user, directory / "ca.pem")
            finally:
                running.stop(signal.SIGINT)  # at once, whoever is connected


@contextlib.contextmanager
def running_iperf3(directory: Path) -> Iterator[int]:
    """The port of an iperf3 server on 127.0.0.1."""
    iperf3 = need("iperf3", "iperf3")
    port = free_tcp_port()
    running = start(
        [iperf3, "--server", "--bind", "127.0.0.1", "--port", str(port), "--forceflush"],
        directory / "iperf3.log",
    )
    try:
        running.wait_for_output("Server listening on")
        yield port
    finally:
        running.stop()
