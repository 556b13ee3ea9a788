"""``toppy-gw init``: everything that a first gateway and its first client need, in one directory."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from toppy.config.address import parse_host_port
from toppy.errors import ConfigError
from toppy.system.certificate_authority import issue_server_certificate, make_ca

_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\Z", re.IGNORECASE)

_GATEWAY = """\
# toppy-gw; every key is in docs/configuration.md.
# Check it with:  toppy-gw check-config --config {directory}/gateway.toml

# one worker process per core
workers = "auto"
# unix sockets and the lock, relative to this file
runtime_dir = "run"

[listen]
quic = ["{listen}"]
health = "{health}"

[tls]
certificate = "server.pem"
private_key = "server-key.pem"

[auth]
token_file = "token"

# What clients may reach. The first rule that matches decides; what no rule allows is denied.
# Loopback, private and other special addresses need a rule whose cidr names them.
{rules}
"""

_LOOPBACK_RULES = """\
[[policy.rules]]
name = "this machine"
action = "allow"
cidr = ["127.0.0.0/8", "::1/128"]
protocol = ["udp"]"""

_EXAMPLE_RULES = """\
# [[policy.rules]]
# name = "office DNS"
# action = "allow"
# cidr = ["10.0.0.53/32"]
# ports = [53]
# protocol = ["udp"]"""

_CLIENT = """\
# toppy; every key is in docs/configuration.md.

gateway = "{host}"
port = {port}
server_name = "{server_name}"
ca_cert_path = "{ca}"
mtu = 1350

[auth]
mode = "token"
token = "{token}"

# What this client may ask for. Without a policy everything is denied.
[[policy.allow]]
cidr = "127.0.0.1/32"
ports = ["1-65535"]
"""


def write_development_files(
    directory: Path, *, listen: str, health: str, names: Sequence[str], force: bool
) -> list[Path]:
    """Write CA, certificate, token and both configurations; the paths, in order.

    Nothing is written when one of them exists and ``force`` is not set. Raises ``ConfigError``.
    """
    host, port = _parse(listen, "--listen")
    _parse(health, "--health")
    wanted = dict.fromkeys(("localhost", "127.0.0.1", "::1", *names))
    is_wildcard = ipaddress.ip_address(host).is_unspecified
    if not is_wildcard:
        wanted[host] = None
    for name in wanted:
        if not _is_address(name) and not _NAME.match(name):
            raise ConfigError(f"--name {name!r} is neither a host name nor an address")
    is_loopback = ipaddress.ip_address(host).is_loopback
    ca = make_ca()
    server = issue_server_certificate(ca, tuple(wanted))
    token = secrets.token_urlsafe(32)
    where = directory.absolute()
    client_host = "127.0.0.1" if is_wildcard else host
    files: list[tuple[str, bytes, int]] = [
        ("ca.pem", ca.certificate_pem, 0o644),
        ("ca-key.pem", ca.key_pem, 0o600),
        ("server.pem", server.certificate_pem, 0o644),
        ("server-key.pem", server.key_pem, 0o600),
        ("token", f"{token}\n".encode(), 0o600),
        (
            "gateway.toml",
            _GATEWAY.format(
                directory=where,
                listen=listen,
                health=health,
                rules=_LOOPBACK_RULES if is_loopback else _EXAMPLE_RULES,
            ).encode(),
            0o644,
        ),
        (
            "client.toml",
            _CLIENT.format(
                host=names[0] if names and is_wildcard else client_host,
                port=port or 4433,
                server_name=names[0] if names else "localhost",
                ca=where / "ca.pem",
                token=token,
            ).encode(),
            0o600,
        ),
    ]
    existing = [name for name, _, _ in files if (where / name).exists()]
    if existing and not force:
        raise ConfigError(
            f"{where} already has {', '.join(existing)}; nothing was written "
            "(--force overwrites, and makes the old CA and token useless)"
        )
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content, mode in files:
            _write(where / name, content, mode)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or where}: {error.strerror}") from None
    return [where / name for name, _, _ in files]


def _write(path: Path, content: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others in between."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _parse(text: str, option: str) -> tuple[str, int]:
    try:
        host, port = parse_host_port(text)
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is no ADDRESS:PORT; write 127.0.0.1:4433 or [::1]:4433"
        ) from None
    return host, port


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
