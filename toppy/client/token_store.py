"""Keeps a login on disk: private, whole at every moment, locked, encrypted at rest."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import fcntl
import importlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from toppy.auth.token_cache import (
    KEY_BYTES,
    NONCE_BYTES,
    SALT_BYTES,
    CachedTokens,
    Protection,
    SealedCache,
    TokenCacheError,
    parse_cache,
    seal,
    unseal,
)

MAX_CACHE_BYTES = 256 * 1024
LOCK_TIMEOUT_S = 45.0
"""Longer than another program takes to renew the tokens (a request has 30 s)."""
_LOCK_INTERVAL_S = 0.05
_MACHINE_ID = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_KEYRING_SERVICE = "toppy"
_KEYRING_ENTRY = "token-cache-key"
_LEAST_PRIORITY = 1.0
"""Of a keyring's backend; what keeps passwords in the clear, or not at all, has less."""


class Keyring(Protocol):
    """Where a desktop keeps secrets. Methods raise ``OSError``."""

    def get(self) -> str | None:
        """Our entry, where there is one."""
        ...

    def set(self, value: str) -> None: ...


class _DesktopKeyring:
    """The package ``keyring`` (the extra ``toppy[keyring]``)."""

    def __init__(self, package: Any) -> None:
        self._package = package

    def get(self) -> str | None:
        try:
            value: str | None = self._package.get_password(_KEYRING_SERVICE, _KEYRING_ENTRY)
        except self._package.errors.KeyringError as error:
            raise OSError(type(error).__name__) from None
        return value

    def set(self, value: str) -> None:
        try:
            self._package.set_password(_KEYRING_SERVICE, _KEYRING_ENTRY, value)
        except self._package.errors.KeyringError as error:
            raise OSError(type(error).__name__) from None


def find_keyring() -> Keyring | None:
    """The desktop's keyring, where there is one and the package ``keyring`` is installed."""
    try:
        package = importlib.import_module("keyring")
        importlib.import_module("keyring.errors")
    except ImportError:
        return None
    if float(package.get_keyring().priority) < _LEAST_PRIORITY:
        return None
    return _DesktopKeyring(package)


class TokenStore:
    """One login's file."""

    def __init__(
        self,
        path: Path,
        *,
        key_path: Path,
        passphrase: Callable[[], str | None] = lambda: None,
        keyring: Callable[[], Keyring | None] = find_keyring,
    ) -> None:
        """``key_path`` is the file with this machine's key, made when it is first needed."""
        self.path = path
        self._key_path = key_path
        self._ask_passphrase = passphrase
        self._passphrase: str | None = None
        self._find_keyring = keyring
        self.protection: Protection | None = None
        """Of what was read or written last; None: it was in the clear, or there was nothing."""

    def load(self) -> CachedTokens | None:
        """The tokens; None when there is no file. Raises ``TokenCacheError``."""
        self.protection = None
        data = _read(self.path, MAX_CACHE_BYTES)
        if data is None:
            return None
        found = parse_cache(data)
        if isinstance(found, SealedCache):
            tokens = unseal(found, self._secret(found.protection))
            self.protection = found.protection
            return tokens
        return found

    def signature(self) -> object:
        """Equal as long as the file is the same one; None when there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def save(self, tokens: CachedTokens, protection: Protection) -> None:
        """Replace the file in one step. Raises ``TokenCacheError``."""
        sealed = seal(
            tokens,
            protection,
            self._secret(protection, is_new=True),
            salt=secrets.token_bytes(SALT_BYTES),
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        try:
            _make_directory(self.path.parent)
            _replace(self.path, sealed)
        except OSError as error:
            raise TokenCacheError(
                f"the tokens cannot be kept at {self.path}: {error.strerror}"
            ) from None
        self.protection = protection

    def remove(self) -> bool:
        """Forget the login; whether there was one. Raises ``TokenCacheError``."""
        try:
            self.path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise TokenCacheError(f"cannot remove {self.path}: {error.strerror}") from None
        return True

    def choose(self, wanted: str) -> Protection:
        """What ``token_protection`` means here."""
        if wanted != "auto":
            return Protection(wanted)
        return Protection.KEYRING if self._find_keyring() is not None else Protection.DEVICE

    @contextlib.asynccontextmanager
    async def locked(self, timeout_s: float = LOCK_TIMEOUT_S) -> AsyncIterator[None]:
        """One program at a time; a refresh token works once. Raises ``TokenCacheError``."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            _make_directory(lock.parent)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TokenCacheError(f"cannot lock {self.path}: {error.strerror}") from None
        try:
            end = time.monotonic() + timeout_s
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise TokenCacheError(
                            f"another program holds {lock}; is a `toppy` stuck?"
                        ) from None
                    await asyncio.sleep(_LOCK_INTERVAL_S)
            yield
        finally:
            os.close(descriptor)

    def unlock(self) -> str:
        """The passphrase, asked for once. Raises ``TokenCacheError`` when there is none."""
        if self._passphrase is None:
            self._passphrase = self._ask_passphrase()
        if not self._passphrase:
            raise TokenCacheError(
                "the token cache needs its passphrase: set TOPPY_TOKEN_PASSPHRASE, or run this in "
                "a terminal"
            )
        return self._passphrase

    def _secret(self, protection: Protection, *, is_new: bool = False) -> bytes:
        match protection:
            case Protection.DEVICE:
                return self._device_key(may_make=is_new) + _machine_id()
            case Protection.KEYRING:
                return self._keyring_key(may_make=is_new)
            case Protection.PASSPHRASE:
                return self.unlock().encode("utf-8", "surrogateescape")

    def _device_key(self, *, may_make: bool) -> bytes:
        key = _read(self._key_path, KEY_BYTES)
        if key is None and may_make:
            try:
                _make_directory(self._key_path.parent)
                _create(self._key_path, secrets.token_bytes(KEY_BYTES))
            except OSError as error:
                raise TokenCacheError(
                    f"this machine's key cannot be kept at {self._key_path}: {error.strerror}"
                ) from None
            key = _read(self._key_path, KEY_BYTES)
        if key is None or len(key) != KEY_BYTES:
            raise TokenCacheError(
                f"this machine's key is not at {self._key_path}: remove what is there, and run "
                "toppy login again"
            )
        return key

    def _keyring_key(self, *, may_make: bool) -> bytes:
        keyring = self._find_keyring()
        if keyring is None:
            raise TokenCacheError(
                "there is no desktop keyring here (pip install toppy[keyring], and a desktop "
                'session); use token_protection = "device", and run toppy login again'
            )
        try:
            written = keyring.get()
            if written is None and may_make:
                written = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode("ascii")
                keyring.set(written)
            key = base64.b64decode(written or "", validate=True)
        except binascii.Error:
            key = b""
        except OSError as error:
            raise TokenCacheError(f"the desktop's keyring cannot be used: {error}") from None
        if len(key) != KEY_BYTES:
            raise TokenCacheError("the desktop's keyring has no key of toppy's: toppy login again")
        return key


def _machine_id() -> bytes:
    for path in _MACHINE_ID:
        with contextlib.suppress(OSError):
            return path.read_bytes().strip()[:64]
    return b""


def _read(path: Path, most_bytes: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), 0o600)
            data = file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TokenCacheError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > most_bytes:
        raise TokenCacheError(f"{path} is too large to be toppy's")
    return data


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write_beside(path: Path, data: bytes) -> Path:
    """A whole new file, mode 0600, in the folder of ``path``."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _replace(path: Path, data: bytes) -> None:
    made = _write_beside(path, data)
    try:
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _create(path: Path, data: bytes) -> None:
    """Write a file that is not there yet; what another program made meanwhile stays."""
    made = _write_beside(path, data)
    try:
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(made)
    finally:
        made.unlink(missing_ok=True)
