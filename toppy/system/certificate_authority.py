"""A private CA and the certificates it signs, for development and small installations."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
SERVER_DAYS = 825
"""What Apple's platforms accept at most from a private CA."""
_CLOCK_SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted: write it with mode 0600."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_ca(common_name: str = "toppy private CA") -> KeyPair:
    """A new root (ECDSA P-256) that may sign end certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common_name)
    builder = (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return KeyPair(builder.sign(key, hashes.SHA256()), key)


def issue_server_certificate(ca: KeyPair, names: Sequence[str]) -> KeyPair:
    """A certificate for DNS names and addresses, signed by ``ca``."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority_id = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    builder = _server_builder(names, ca.certificate.subject, key).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id.value),
        critical=False,
    )
    return KeyPair(builder.sign(ca.key, hashes.SHA256()), key)


def issue_self_signed(names: Sequence[str]) -> KeyPair:
    """A certificate that only those trust who pin it."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _server_builder(names, _name(names[0]), key)
    return KeyPair(builder.sign(key, hashes.SHA256()), key)


def names_of(certificate_pem: bytes) -> tuple[str, ...]:
    """DNS names and addresses of the first certificate, in lower case. Raises ``ValueError``."""
    certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(name.lower() for name in found.get_values_for_type(x509.DNSName)) + tuple(
        str(address) for address in found.get_values_for_type(x509.IPAddress)
    )


def check_pair(certificate_pem: bytes, key_pem: bytes) -> None:
    """Raise ``ValueError`` unless the first certificate belongs to the key and is valid now."""
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
    except ValueError:
        raise ValueError("the certificate file has no PEM certificate") from None
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("the key file has no PEM private key without a passphrase") from None
    if key.public_key() != certificate.public_key():
        raise ValueError("the private key is not the certificate's")
    now = datetime.datetime.now(datetime.UTC)
    if now >= certificate.not_valid_after_utc:
        raise ValueError(f"the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}")


def _server_builder(
    names: Sequence[str], issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    return (
        _builder(_name(names[0]), issuer, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
