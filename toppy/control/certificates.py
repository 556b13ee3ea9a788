"""``toppy-gw cert``: certificates as files. All files of a command are written, or none."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toppy.control.service_files import service_user
from toppy.errors import ConfigError
from toppy.model.key_type import KeyType
from toppy.system.certificate_authority import (
    KeyPair,
    issue_client_certificate,
    issue_server_certificate,
    load_ca,
    make_ca,
)
from toppy.system.files import read_file
from toppy.system.new_files import NewFile, existing_files, write_files

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_PASSPHRASE_CHARACTERS = 8
_TAKEN_NAMES = ("ca", "server")
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\Z")
_CLIENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}(@[A-Za-z0-9.-]{1,190})?\Z")


@dataclass(frozen=True, slots=True)
class Wish:
    """What all three commands are told."""

    directory: Path
    key_type: KeyType = KeyType.ECDSA_P256
    days: int | None = None
    """None: what is usual."""
    passphrase: bytes | None = field(default=None, repr=False)
    """Encrypts the new key."""
    force: bool = False
    """Replace files that exist."""


@dataclass(frozen=True, slots=True)
class AuthorityFiles:
    """Where the CA is that signs."""

    certificate: Path
    key: Path
    passphrase: bytes | None = field(default=None, repr=False)


def write_ca(wish: Wish, common_name: str) -> list[Path]:
    """``ca.pem`` and ``ca-key.pem``. Raises ``ConfigError``."""
    if not 1 <= len(common_name) <= 64 or not common_name.isprintable():
        raise ConfigError("--name must be from 1 to 64 printable characters")
    _check_free(wish, "ca")
    made = make_ca(common_name, key_type=wish.key_type, **_days(wish))
    return _write(wish, "ca", made, is_for_service=False)


def write_server(wish: Wish, ca: AuthorityFiles, names: Sequence[str]) -> list[Path]:
    """``server.pem`` and ``server-key.pem``, for ``names``, localhost and the loopback addresses.
    Raises ``ConfigError``.
    """
    wanted = tuple(dict.fromkeys((*(checked_name(name) for name in names), *LOCAL_NAMES)))
    _check_free(wish, "server")
    authority = _load(ca)
    try:
        made = issue_server_certificate(authority, wanted, key_type=wish.key_type, **_days(wish))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return _write(wish, "server", made, is_for_service=True)


def write_client(wish: Wish, ca: AuthorityFiles, name: str) -> list[Path]:
    """``NAME.pem`` and ``NAME-key.pem``. Raises ``ConfigError``."""
    if name in _TAKEN_NAMES or name.endswith("-key"):
        raise ConfigError(
            f"{name!r}: a file of that name is for something else; choose another name"
        )
    if not _CLIENT_NAME.match(name):
        raise ConfigError(
            f"{name!r} is no name for a client; write letters, digits, - _ . or a mail address"
        )
    _check_free(wish, name)
    authority = _load(ca)
    try:
        made = issue_client_certificate(authority, name, key_type=wish.key_type, **_days(wish))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return _write(wish, name, made, is_for_service=False)


def checked_name(name: str) -> str:
    """A host name or address, in lower case. Raises ``ConfigError``."""
    plain = name.lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(plain))
    except ValueError:
        if not _HOST_NAME.match(plain):
            raise ConfigError(f"--name {name!r} is neither a host name nor an address") from None
    return plain


def read_passphrase(path: Path) -> bytes:
    """The first line of a file. Raises ``ConfigError``."""
    passphrase = read_file(path, "passphrase").split(b"\n", 1)[0].rstrip(b"\r")
    if not passphrase:
        raise ConfigError(f"{path}: its first line, the passphrase, is empty")
    return passphrase


def check_new_passphrase(passphrase: bytes) -> bytes:
    """The same. Raises ``ConfigError`` for one that is too short to protect a key."""
    if len(passphrase.decode("utf-8", "replace")) < MIN_PASSPHRASE_CHARACTERS:
        raise ConfigError(
            f"the passphrase is too short: at least {MIN_PASSPHRASE_CHARACTERS} characters"
        )
    return passphrase


def _days(wish: Wish) -> dict[str, int]:
    return {} if wish.days is None else {"days": wish.days}


def _load(ca: AuthorityFiles) -> KeyPair:
    certificate, key = (
        read_file(path, what) for path, what in ((ca.certificate, "--ca"), (ca.key, "--ca-key"))
    )
    try:
        return load_ca(certificate, key, ca.passphrase)
    except ValueError as error:
        raise ConfigError(f"{ca.certificate}, {ca.key}: {error}") from None


def _files(stem: str, pair: KeyPair | None, wish: Wish, *, is_for_service: bool) -> list[NewFile]:
    certificate = key = b""
    if pair is not None:
        certificate = pair.certificate_pem
        key = pair.key_pem if wish.passphrase is None else pair.encrypted_key_pem(wish.passphrase)
    return [
        NewFile(f"{stem}.pem", certificate),
        NewFile(f"{stem}-key.pem", key, 0o600, is_for_service=is_for_service),
    ]


def _check_free(wish: Wish, stem: str) -> None:
    """Before a key is made, which takes a while. Raises ``ConfigError``."""
    where = wish.directory.absolute()
    existing = existing_files(where, _files(stem, None, wish, is_for_service=False))
    if existing and not wish.force:
        raise ConfigError(
            f"{where} already has {', '.join(existing)}; nothing was written (--force replaces "
            "them)"
        )


def _write(wish: Wish, stem: str, pair: KeyPair, *, is_for_service: bool) -> list[Path]:
    where = wish.directory.absolute()
    files = _files(stem, pair, wish, is_for_service=is_for_service)
    try:
        # somebody else may have written them while the key was made
        replaces = None if wish.force else ()
        return write_files(where, files, owner=service_user(where), replaces=replaces)
    except FileExistsError as error:
        raise ConfigError(
            f"{error.filename} has just been written by somebody else; nothing was written "
            "(--force replaces it)"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or where}: {error.strerror}") from None
