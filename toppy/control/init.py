"""``toppy-gw init``: what a first gateway and its first client need, in one directory."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from toppy.config.address import parse_host_port
from toppy.control.audit_settings import SYSTEM_STATE_DIRECTORY
from toppy.control.certificates import LOCAL_NAMES, checked_name
from toppy.control.service_files import service_user
from toppy.control.settings import SYSTEM_CONFIG
from toppy.errors import ConfigError
from toppy.system.certificate_authority import issue_server_certificate, make_ca
from toppy.system.new_files import NewFile, existing_files, write_files

_SYSTEM_DIRECTORY = Path(SYSTEM_CONFIG).parent
_CONFIG, _EXAMPLE = "gateway.toml", "gateway.toml.example"

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

{audit}

# What clients may reach. A deny rule wins; what no rule allows is denied.
# Loopback, private and other special addresses need a rule whose cidr names them.
{rules}
"""

_OWN_RUNTIME_DIR = """\
# unix sockets and the lock, relative to this file
runtime_dir = "run"
"""

_OWN_AUDIT = """\
# who reached what, relative to this file; `toppy-gw audit verify` checks it
[audit]
path = "audit.jsonl\""""

_SYSTEM_AUDIT = f"""\
# who reached what; `toppy-gw audit verify` checks it
[audit]
path = "{SYSTEM_STATE_DIRECTORY}/audit.jsonl\""""

# a log that root has begun by hand could not be written by the service
_SERVICE_AUDIT = f"""\
# The service writes an audit log, $STATE_DIRECTORY/audit.jsonl; a run by hand writes none without:
# [audit]
# path = "{SYSTEM_STATE_DIRECTORY}/audit.jsonl\""""

_LOOPBACK_RULES = """\
[[policy.rules]]
name = "this machine"
action = "allow"
cidr = ["127.0.0.0/8", "::1/128"]
protocol = ["udp", "tcp"]"""

_EXAMPLE_RULES = """\
# [[policy.rules]]
# name = "office DNS"
# action = "allow"
# cidr = ["10.0.0.53/32"]
# ports = [53]"""

_CLIENT = """\
# toppy; every key is in docs/configuration.md.

gateway = "{host}"
port = {port}
server_name = "{server_name}"
ca_cert_path = "ca.pem"
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
    names = [checked_name(name) for name in names]
    wanted = dict.fromkeys((*LOCAL_NAMES, *names))
    is_wildcard = ipaddress.ip_address(host).is_unspecified
    if not is_wildcard:
        wanted[host.partition("%")[0]] = None
    client_name = next((name for name in names if not name.startswith("*")), "")
    is_loopback = ipaddress.ip_address(host).is_loopback
    ca = make_ca()
    server = issue_server_certificate(ca, tuple(wanted))
    token = secrets.token_urlsafe(32)
    where = directory.absolute()
    toml_text(str(where))  # its paths end up in other configurations
    client_host = host
    if is_wildcard:
        client_host = client_name or ("::1" if ":" in host else "127.0.0.1")
    files = [
        NewFile("ca.pem", ca.certificate_pem),
        NewFile("ca-key.pem", ca.key_pem, 0o600),
        NewFile("server.pem", server.certificate_pem),
        NewFile("server-key.pem", server.key_pem, 0o600, is_for_service=True),
        NewFile("token", f"{token}\n".encode(), 0o600, is_for_service=True),
        NewFile(
            _CONFIG,
            _GATEWAY.format(
                runtime_dir="" if where == _SYSTEM_DIRECTORY else _OWN_RUNTIME_DIR,
                listen=listen,
                health=health,
                audit=_audit_table(where),
                rules=_LOOPBACK_RULES if is_loopback else _EXAMPLE_RULES,
            ).encode(),
        ),
        NewFile(
            "client.toml",
            _CLIENT.format(
                host=client_host,
                port=port or 4433,
                server_name=client_name or "localhost",
                token=token,
            ).encode(),
            0o600,
        ),
    ]
    existing = existing_files(where, files)
    replaces: list[str] = []
    if _CONFIG in existing and _is_untouched_example(where):
        existing.remove(_CONFIG)
        replaces.append(_CONFIG)
    if existing and not force:
        raise ConfigError(
            f"{where} already has {', '.join(existing)}; nothing was written "
            "(--force overwrites, and makes the old CA and token useless)"
        )
    try:
        return write_files(
            where, files, owner=service_user(where), replaces=None if force else replaces
        )
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or where}: {error.strerror}") from None


def _audit_table(directory: Path) -> str:
    if directory != _SYSTEM_DIRECTORY:
        return _OWN_AUDIT
    return _SYSTEM_AUDIT if service_user(directory) is None else _SERVICE_AUDIT


def _is_untouched_example(directory: Path) -> bool:
    try:
        return (directory / _CONFIG).read_bytes() == (directory / _EXAMPLE).read_bytes()
    except OSError:
        return False


def toml_text(text: str) -> str:
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
