"""A private CA and the certificates it signs, for development and small installations."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from toppy.auth.certificate_chain import is_authority
from toppy.model.key_type import KeyType
from toppy.system.certificate_files import is_key_of, parse_certificates, parse_private_key

CA_DAYS = 3650
SERVER_DAYS = 825
"""What Apple's platforms accept at most from a private CA."""
CLIENT_DAYS = 365
_CLOCK_SKEW = datetime.timedelta(hours=1)
_PUBLIC_EXPONENT = 65537

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: SigningKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """PKCS #8, not encrypted: write it with mode 0600."""
        return self._key_pem(NoEncryption())

    def encrypted_key_pem(self, passphrase: bytes) -> bytes:
        """PKCS #8, encrypted."""
        return self._key_pem(BestAvailableEncryption(passphrase))

    def _key_pem(self, encryption: KeySerializationEncryption) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def make_ca(
    common_name: str = "toppy private CA",
    *,
    key_type: KeyType = KeyType.ECDSA_P256,
    days: int = CA_DAYS,
) -> KeyPair:
    """A new root that may sign end certificates only."""
    key = _new_key(key_type)
    name = _name(common_name)
    builder = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return KeyPair(builder.sign(key, _hash_for(key)), key)


def load_ca(certificate_pem: bytes, key_pem: bytes, passphrase: bytes | None = None) -> KeyPair:
    """An authority from its files. Raises ``ValueError`` that says what to do."""
    certificate = parse_certificates(certificate_pem, "the CA's certificate file")[0]
    key = parse_private_key(key_pem, passphrase, "the CA's key file")
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ValueError("the CA's key is neither ECDSA nor RSA; make one: toppy-gw cert ca")  # noqa: TRY004
    if not is_key_of(key, certificate):
        raise ValueError("the CA's key is not that of the CA's certificate")
    if not is_authority(certificate):
        raise ValueError("the CA's certificate may not sign others; make one: toppy-gw cert ca")
    return KeyPair(certificate, key)


def issue_server_certificate(
    ca: KeyPair,
    names: Sequence[str],
    *,
    key_type: KeyType = KeyType.ECDSA_P256,
    days: int = SERVER_DAYS,
) -> KeyPair:
    """A certificate for DNS names and addresses, signed by ``ca``. Raises ``ValueError`` when it
    would outlive the CA.
    """
    key = _new_key(key_type)
    return _signed(ca, _server_builder(names, ca.certificate.subject, key, days), key, days)


def issue_client_certificate(
    ca: KeyPair,
    name: str,
    *,
    key_type: KeyType = KeyType.ECDSA_P256,
    days: int = CLIENT_DAYS,
) -> KeyPair:
    """A certificate that proves to a gateway who a client is: ``name`` is its common name and its
    subjectAltName. Raises ``ValueError`` when it would outlive the CA.
    """
    key = _new_key(key_type)
    san = x509.RFC822Name(name) if "@" in name else x509.DNSName(name)
    builder = (
        _builder(_name(name), ca.certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([san]), critical=False)
    )
    return _signed(ca, builder, key, days)


def issue_self_signed(names: Sequence[str]) -> KeyPair:
    """A certificate that only those trust who pin it."""
    key = _new_key(KeyType.ECDSA_P256)
    builder = _server_builder(names, _name(names[0]), key, SERVER_DAYS)
    return KeyPair(builder.sign(key, _hash_for(key)), key)


def _signed(ca: KeyPair, builder: x509.CertificateBuilder, key: SigningKey, days: int) -> KeyPair:
    end = ca.certificate.not_valid_after_utc
    left = end - datetime.datetime.now(datetime.UTC)
    if left < datetime.timedelta(days=days):
        if left.days < 1:
            raise ValueError(f"the CA ends on {end:%Y-%m-%d}; make a new one: toppy-gw cert ca")
        raise ValueError(
            f"the CA ends on {end:%Y-%m-%d}, before the certificate would; use --days {left.days} "
            "or less, or make a new CA"
        )
    builder = builder.add_extension(_authority_key_id(ca.certificate), critical=False)
    return KeyPair(builder.sign(ca.key, _hash_for(ca.key)), key)


def _authority_key_id(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """What names the CA's key; a CA of another tool may have no name for it."""
    try:
        own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        own = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _new_key(key_type: KeyType) -> SigningKey:
    match key_type:
        case KeyType.ECDSA_P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.ECDSA_P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyType.RSA_3072:
            return rsa.generate_private_key(_PUBLIC_EXPONENT, 3072)
        case KeyType.RSA_4096:
            return rsa.generate_private_key(_PUBLIC_EXPONENT, 4096)


def _hash_for(key: SigningKey) -> hashes.SHA256 | hashes.SHA384:
    """As strong as the key (RFC 8446 section 4.2.3 pairs the curves with these)."""
    is_p384 = isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1)
    return hashes.SHA384() if is_p384 else hashes.SHA256()


def _server_builder(
    names: Sequence[str], issuer: x509.Name, key: SigningKey, days: int
) -> x509.CertificateBuilder:
    return (
        _builder(_name(names[0]), issuer, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: SigningKey, days: int
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
