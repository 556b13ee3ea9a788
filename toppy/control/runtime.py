"""What a control plane needs before it can run: its directory, its own sockets, its keys."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from toppy.control.admin import ADMIN_SOCKET
from toppy.control.saved_state import SavedState
from toppy.control.settings import GatewaySettings
from toppy.errors import ConfigError

_UNIX_PATH_BYTES = 107  # sockaddr_un
_LONGEST_NAME = "worker-255.sock"


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys that all generations share."""

    reset_key: bytes = field(repr=False)
    token_key: bytes = field(repr=False)
    self_signed: tuple[bytes, bytes] | None = field(repr=False)
    """Certificate chain and private key, where the gateway made them for itself."""

    @staticmethod
    def of(settings: GatewaySettings, saved: SavedState | None) -> Keys:
        """The saved ones, so that earlier connections can still be reset, or fresh ones."""
        made = None
        if saved is not None and saved.private_key_pem:
            made = saved.certificate_chain_pem, saved.private_key_pem
        elif not settings.config.tls.certificate:
            made = settings.certificate_chain_pem, settings.private_key_pem
        return Keys(
            saved.reset_key if saved is not None else settings.reset_key,
            saved.token_key if saved is not None else settings.token_key,
            made,
        )


def socket_address(runtime_dir: Path, name: str) -> str:
    """ZeroMQ's address of a unix socket in the runtime directory."""
    return f"ipc://{runtime_dir / name}.sock"


def lock_runtime_dir(directory: Path) -> int:
    """Make the runtime directory, mode 0700, and take it for this gateway alone."""
    longest = len(str(directory / _LONGEST_NAME))
    if longest > _UNIX_PATH_BYTES:
        raise ConfigError(
            f"runtime_dir: {directory} is too long for unix sockets "
            f"({longest} bytes, at most {_UNIX_PATH_BYTES}); choose a shorter one",
            key="runtime_dir",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"runtime_dir: cannot use {directory}: {error.strerror}; "
            "choose a directory that this user may write",
            key="runtime_dir",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"runtime_dir: another toppy-gw runs in {directory}; stop it first, "
            "or give this one a runtime_dir of its own",
            key="runtime_dir",
        ) from None
    return lock


def bind_admin(directory: Path) -> socket.socket:
    """The operators' unix socket."""
    path = directory / ADMIN_SOCKET
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    return sock


def bind_health(host: str, port: int, inherited: socket.socket | None = None) -> socket.socket:
    """The socket of ``/healthz``; an inherited one where it is the same. Raises ``ConfigError``."""
    if inherited is not None:
        if inherited.getsockname()[:2] == (host, port):
            return inherited
        inherited.close()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"listen.health: cannot listen on {host}:{port}: {error.strerror}", key="listen.health"
        ) from None
    return sock
