"""``toppy-gw init``: what a first gateway and its first client need, in one directory."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import pwd
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from toppy.config.address import parse_host_port
from toppy.control.settings import SYSTEM_CONFIG
from toppy.errors import ConfigError
from toppy.system.certificate_authority import issue_server_certificate, make_ca

_SYSTEM_DIRECTORY = Path(SYSTEM_CONFIG).parent
_SERVICE_USER = "toppy-gw"
_FOR_SERVICE = ("server-key.pem", "token")
"""Secrets that the service reads as its own user (systemd/)."""
_CONFIG, _EXAMPLE = "gateway.toml", "gateway.toml.example"

_NAME = re.compile(r"(?=.{1,253}\Z)(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\Z")

_GATEWAY = """\
# toppy-gw; every key is in docs/configuration.md.
# Check it with:  toppy-gw check-config --config gateway.toml

# one worker process per core
workers = "auto"
{runtime_dir}
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

_OWN_RUNTIME_DIR = """\
# unix sockets and the lock, relative to this file
runtime_dir = "run"
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
ca_cert_path = {ca}
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

    ``listen`` and ``health`` are ADDRESS:PORT; ``names`` are more names and addresses for the
    certificate (localhost is always in it), of which the client uses the first that is no wildcard.
    All files or none are written; none when one of them exists and ``force`` is not set. (An
    example that ``make install`` put there and nobody changed does not count.) In ``/etc/toppy``
    the service's user may read what the gateway reads. Raises ``ConfigError``.
    """
    host, port = _parse(listen, "--listen")
    _parse(health, "--health")
    names = [name.lower().rstrip(".") for name in names]
    wanted = dict.fromkeys(("localhost", "127.0.0.1", "::1", *names))
    is_wildcard = ipaddress.ip_address(host).is_unspecified
    if not is_wildcard:
        wanted[host.partition("%")[0]] = None
    for name in wanted:
        if not _is_address(name) and not _NAME.match(name):
            raise ConfigError(f"--name {name!r} is neither a host name nor an address")
    client_name = next((name for name in names if not name.startswith("*")), "")
    is_loopback = ipaddress.ip_address(host).is_loopback
    ca = make_ca()
    server = issue_server_certificate(ca, tuple(wanted))
    token = secrets.token_urlsafe(32)
    where = directory.absolute()
    client_host = host
    if is_wildcard:
        client_host = client_name or ("::1" if ":" in host else "127.0.0.1")
    files: list[tuple[str, bytes, int]] = [
        ("ca.pem", ca.certificate_pem, 0o644),
        ("ca-key.pem", ca.key_pem, 0o600),
        ("server.pem", server.certificate_pem, 0o644),
        ("server-key.pem", server.key_pem, 0o600),
        ("token", f"{token}\n".encode(), 0o600),
        (
            _CONFIG,
            _GATEWAY.format(
                runtime_dir="" if where == _SYSTEM_DIRECTORY else _OWN_RUNTIME_DIR,
                listen=listen,
                health=health,
                rules=_LOOPBACK_RULES if is_loopback else _EXAMPLE_RULES,
            ).encode(),
            0o644,
        ),
        (
            "client.toml",
            _CLIENT.format(
                host=client_host,
                port=port or 4433,
                server_name=client_name or "localhost",
                ca=_toml_text(str(where / "ca.pem")),
                token=token,
            ).encode(),
            0o600,
        ),
    ]
    existing = [name for name, _, _ in files if os.path.lexists(where / name)]
    if _CONFIG in existing and _is_untouched_example(where):
        existing.remove(_CONFIG)
    if existing and not force:
        raise ConfigError(
            f"{where} already has {', '.join(existing)}; nothing was written "
            "(--force overwrites, and makes the old CA and token useless)"
        )
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_all(where, files)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or where}: {error.strerror}") from None
    return [where / name for name, _, _ in files]


def _write_all(directory: Path, files: Sequence[tuple[str, bytes, int]]) -> None:
    """Every file or none; no key is readable by others at any moment."""
    for name, _, _ in files:
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))
    service = _service_user(directory)
    drafts: list[tuple[Path, Path]] = []
    try:
        # all that can fail for want of space or rights comes before the first rename
        for name, content, mode in files:
            draft = directory / f".{name}.{secrets.token_hex(8)}.tmp"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            drafts.append((draft, directory / name))
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                if service is not None and name in _FOR_SERVICE:
                    os.fchown(file.fileno(), service.pw_uid, service.pw_gid)
                file.write(content)
        for draft, path in drafts:
            draft.replace(path)
    finally:
        for draft, _ in drafts:
            with contextlib.suppress(OSError):
                draft.unlink()


def _service_user(directory: Path) -> pwd.struct_passwd | None:
    """Who is to own secrets, where there is such a user and this one may give files away."""
    if directory == _SYSTEM_DIRECTORY and os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(_SERVICE_USER)
    return None


def _is_untouched_example(directory: Path) -> bool:
    try:
        return (directory / _CONFIG).read_bytes() == (directory / _EXAMPLE).read_bytes()
    except OSError:
        return False


def _toml_text(text: str) -> str:
    """A TOML basic string. Raises ``ConfigError`` for what TOML cannot hold (it is UTF-8)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r}: the directory's name is no UTF-8 text") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


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
