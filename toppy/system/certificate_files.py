"""Certificates and keys as files have them: parsed, described, and what is wrong with them.

Pure functions of bytes and of the time that they are given.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from toppy.auth.certificate_chain import BROKEN_CERTIFICATE

MIN_RSA_BITS = 2048
"""Below it webpki, and so the native engine, refuses."""
_DAY_S = 86_400.0
_E = TypeVar("_E", bound=x509.ExtensionType)
_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "server",
    ExtendedKeyUsageOID.CLIENT_AUTH: "client",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "any",
}


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate in words."""

    subject: str
    names: tuple[str, ...]
    """DNS names, addresses, mail addresses and URIs of its subjectAltName."""
    issuer: str
    serial: str
    """Hex digits."""
    sha256: str
    """Fingerprint, 64 hex digits."""
    not_before: datetime.datetime
    not_after: datetime.datetime
    key_type: str
    """``ECDSA P-256``, ``RSA 3072``, ``Ed25519``."""
    is_ca: bool
    is_self_signed: bool
    usages: tuple[str, ...]
    """``server``, ``client``, ``any`` or an OID; empty: for everything."""


def parse_certificates(pem: bytes, what: str = "the certificate file") -> list[x509.Certificate]:
    """One or more. Raises ``ValueError``."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except BROKEN_CERTIFICATE:
        if b"PRIVATE KEY-----" in pem and b"BEGIN CERTIFICATE" not in pem:
            raise ValueError(
                f"{what} has no PEM certificate, but a private key: are the two files swapped?"
            ) from None
        raise ValueError(f"{what} has no PEM certificate, or a broken one") from None


def parse_private_key(
    pem: bytes, passphrase: bytes | None = None, what: str = "the key file"
) -> PrivateKeyTypes:
    """Raises ``ValueError`` that says whether the passphrase is missing or wrong."""
    try:
        return load_pem_private_key(pem, passphrase)
    except TypeError:
        if passphrase is None:
            raise ValueError(f"{what} is encrypted, and no passphrase is given") from None
        # a passphrase for a key that needs none: the key may have been replaced by an open one
        raise ValueError(f"{what} is not encrypted, but a passphrase is given") from None
    except (ValueError, UnsupportedAlgorithm):
        if is_encrypted(pem):
            raise ValueError(f"{what}: the passphrase is wrong") from None
        raise ValueError(f"{what} has no PEM private key, or a broken one") from None


def is_encrypted(key_pem: bytes) -> bool:
    """Whether a private key needs a passphrase."""
    return b"BEGIN ENCRYPTED PRIVATE KEY" in key_pem or b"Proc-Type: 4,ENCRYPTED" in key_pem


def plain_key_pem(key_pem: bytes, passphrase: bytes | None = None) -> bytes:
    """The key as PKCS #8 without encryption, as both engines take it. Raises ``ValueError``."""
    key = parse_private_key(key_pem, passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def names_of(certificate_pem: bytes) -> tuple[str, ...]:
    """DNS names and addresses of the first certificate, in lower case. Raises ``ValueError``."""
    return server_names(parse_certificates(certificate_pem)[0])


def server_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """DNS names and addresses, in lower case. Raises ``ValueError`` for broken extensions."""
    san = _san(certificate)
    if san is None:
        return ()
    return tuple(name.lower() for name in san.get_values_for_type(x509.DNSName)) + tuple(
        str(address) for address in san.get_values_for_type(x509.IPAddress)
    )


def is_for(certificate: x509.Certificate, name: str) -> bool:
    """Whether a certificate is for a host name or address (RFC 6125 section 6.4): a ``*`` stands
    for one whole label, the first.
    """
    wanted = name.lower().rstrip(".")
    try:
        wanted = str(ipaddress.ip_address(wanted))
    except ValueError:
        _, _, parent = wanted.partition(".")
        return any(
            pattern == wanted or (parent and pattern == f"*.{parent}")
            for pattern in server_names(certificate)
        )
    return wanted in server_names(certificate)


def days_left(certificate: x509.Certificate, now: float) -> int:
    """Whole days until its end, at Unix time ``now``; negative: it ended so many days ago."""
    return int((certificate.not_valid_after_utc.timestamp() - now) // _DAY_S)


def end_of(chain_pem: bytes) -> float:
    """Unix time at which the first certificate of a chain ends. Raises ``ValueError``."""
    return parse_certificates(chain_pem)[0].not_valid_after_utc.timestamp()


def describe_certificate(certificate: x509.Certificate) -> CertificateFacts:
    """Raises ``ValueError`` for broken extensions."""
    san = _san(certificate)
    others: tuple[str, ...] = ()
    if san is not None:
        others = (
            *san.get_values_for_type(x509.RFC822Name),
            *san.get_values_for_type(x509.UniformResourceIdentifier),
        )
    return CertificateFacts(
        subject=certificate.subject.rfc4514_string(),
        names=(*server_names(certificate), *others),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key_type=key_type_of(certificate),
        is_ca=_is_ca(certificate),
        is_self_signed=certificate.issuer == certificate.subject,
        usages=usages_of(certificate),
    )


def usages_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """What its extended key usage names; empty: it does not say, and is for everything. Raises
    ``ValueError`` for broken extensions.
    """
    found = _extension(certificate, x509.ExtendedKeyUsage)
    if found is None:
        return ()
    return tuple(_USAGES.get(usage, usage.dotted_string) for usage in found)


def key_type_of(certificate: x509.Certificate) -> str:
    """``ECDSA P-256``, ``RSA 3072``, ``Ed25519``, or what it is instead."""
    try:
        key: Any = certificate.public_key()
    except BROKEN_CERTIFICATE:
        return "unknown"
    match key:
        case rsa.RSAPublicKey():
            return f"RSA {key.key_size}"
        case ec.EllipticCurvePublicKey():
            curves = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
            return f"ECDSA {curves.get(key.curve.name, key.curve.name)}"
        case ed25519.Ed25519PublicKey():
            return "Ed25519"
    return str(type(key).__name__).removesuffix("PublicKey").lstrip("_")


def key_problem(certificate: x509.Certificate) -> str | None:
    """Why its key is of no use to the engines; None: it is."""
    key_type = key_type_of(certificate)
    if key_type.startswith("RSA "):
        bits = int(key_type.removeprefix("RSA "))
        return (
            None if bits >= MIN_RSA_BITS else f"has an RSA key of {bits} bits; 2048 are the least"
        )
    if key_type in ("ECDSA P-256", "ECDSA P-384", "Ed25519"):
        return None
    return f"has a key of the kind {key_type}; use ECDSA P-256 or P-384, RSA or Ed25519"


def check_pair(
    certificate_pem: bytes, key_pem: bytes, *, now: float, passphrase: bytes | None = None
) -> None:
    """Raise ``ValueError`` unless the first certificate belongs to the key, is valid at Unix time
    ``now``, and has a kind of key that the engines take.
    """
    certificate = parse_certificates(certificate_pem)[0]
    key = parse_private_key(key_pem, passphrase)
    if not is_key_of(key, certificate):
        raise ValueError("the private key is not the certificate's")
    problem = key_problem(certificate) or date_problem(certificate, now)
    if problem is not None:
        raise ValueError(f"the certificate {problem}")


def is_key_of(key: PrivateKeyTypes, certificate: x509.Certificate) -> bool:
    """Whether a private key and a certificate belong together."""
    try:
        return bool(key.public_key() == certificate.public_key())
    except BROKEN_CERTIFICATE:
        return False


def date_problem(certificate: x509.Certificate, now: float) -> str | None:
    """Why it is not valid at Unix time ``now``; None: it is."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end.timestamp():
        return f"expired on {end:%Y-%m-%d}"
    if now < begin.timestamp():
        return f"is not valid before {begin:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
    return None


def _san(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    return _extension(certificate, x509.SubjectAlternativeName)


def _is_ca(certificate: x509.Certificate) -> bool:
    found = _extension(certificate, x509.BasicConstraints)
    return found is not None and found.ca


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    """Raises ``ValueError`` where the extensions make no sense."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except BROKEN_CERTIFICATE as error:
        raise ValueError(f"the certificate is broken: {error}") from None
