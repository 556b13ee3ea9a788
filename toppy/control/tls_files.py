"""Certificates, keys and CAs that ``[tls]`` names, read and checked before anything begins."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from toppy.auth.certificate_chain import fingerprint, is_authority
from toppy.auth.client_certificate import CertificateTrust
from toppy.config.gateway import GatewayConfig, resolve_path
from toppy.config.tls import TlsSection
from toppy.errors import ConfigError
from toppy.system.certificate_files import (
    check_pair,
    date_problem,
    is_encrypted,
    parse_certificates,
    plain_key_pem,
)
from toppy.system.files import is_open_to_others

Read = Callable[..., bytes]
"""``read(path, key, is_secret=False)``; raises ``ConfigError``."""


def read_server_pair(tls: TlsSection, base: str, read: Read) -> tuple[bytes, bytes]:
    """The certificate with its chain, and its key without encryption. Raises ``ConfigError``."""
    chain = read(tls.certificate, "tls.certificate")
    key = read(tls.private_key, "tls.private_key", is_secret=True)
    path = Path(resolve_path(base, tls.private_key))
    if is_open_to_others(path, stat.S_IROTH) and not tls.allow_open_private_key:
        raise ConfigError(
            f"tls.private_key: every user of this machine can read {path}; run: chmod 600 {path} "
            "(or set tls.allow_open_private_key = true where nobody else can get there)",
            key="tls.private_key",
        )
    passphrase = _passphrase(tls, read)
    if passphrase is not None and not is_encrypted(key):
        raise ConfigError(
            f"tls.private_key: {path} is not encrypted, but a passphrase is configured: was it "
            "replaced by another? Remove the passphrase, or encrypt the key",
            key="tls.private_key",
        )
    if passphrase is None and is_encrypted(key):
        raise ConfigError(
            f"tls.private_key: {path} is encrypted: set tls.private_key_passphrase_file "
            "(or TOPPY_GW_TLS_KEY_PASSPHRASE_FILE)",
            key="tls.private_key",
        )
    try:
        check_pair(chain, key, now=time.time(), passphrase=passphrase)
        return chain, plain_key_pem(key, passphrase)
    except ValueError as error:
        raise ConfigError(
            f"tls.certificate = {tls.certificate!r}, tls.private_key = {tls.private_key!r}: "
            f"{error}; `toppy-gw cert check` says more",
            key="tls.certificate",
        ) from None


def _passphrase(tls: TlsSection, read: Read) -> bytes | None:
    if tls.private_key_passphrase is not None:
        return tls.private_key_passphrase.get_secret_value().encode()
    if not tls.private_key_passphrase_file:
        return None
    key = "tls.private_key_passphrase_file"
    passphrase = read(tls.private_key_passphrase_file, key, is_secret=True).rstrip(b"\r\n")
    if not passphrase:
        raise ConfigError(f"{key}: the file is empty", key=key)
    return passphrase


def read_client_ca(
    tls: TlsSection, read: Read, warnings: list[str]
) -> tuple[bytes, CertificateTrust]:
    """The CAs of client certificates, and what they mean. Raises ``ConfigError``.

    Empty where clients are not asked for certificates.
    """
    if tls.wanted_client_certificates == "none":
        if tls.client_ca:
            warnings.append("tls.client_ca has no effect: tls.client_certificates is 'none'")
        return b"", CertificateTrust()
    pem = read(tls.client_ca, "tls.client_ca")
    try:
        authorities = parse_certificates(pem, tls.client_ca)
    except ValueError as error:
        raise ConfigError(f"tls.client_ca: {error}", key="tls.client_ca") from None
    now = time.time()
    for authority in authorities:
        subject = authority.subject.rfc4514_string()
        if not is_authority(authority):
            raise ConfigError(
                f"tls.client_ca: {subject} in {tls.client_ca} is no CA: it must be the certificate "
                "that signs those of clients (ca.pem of `toppy-gw cert ca`)",
                key="tls.client_ca",
            )
        problem = date_problem(authority, now)
        if problem is not None:
            warnings.append(f"tls.client_ca: {subject} {problem}: its clients are refused")
    return pem, CertificateTrust(
        authorities=frozenset(fingerprint(each) for each in authorities),
        is_required=tls.wanted_client_certificates == "required",
    )


_INLINE_SECRETS: tuple[tuple[str, Callable[[GatewayConfig], object]], ...] = (
    ("auth.token", lambda c: c.auth.token),
    ("auth.jwt.secret", lambda c: c.auth.jwt.secret),
    ("tls.private_key_passphrase", lambda c: c.tls.private_key_passphrase),
    ("audit.signing_key", lambda c: c.audit.signing_key),
    ("audit.ship_token", lambda c: c.audit.ship_token),
)


def has_inline_secret(config: GatewayConfig, variables: Mapping[str, str]) -> bool:
    """Whether the file itself has a secret. ``variables`` by key are those of the environment."""
    return any(get(config) is not None and key not in variables for key, get in _INLINE_SECRETS)
