"""Certificates as no command of toppy makes them: over, to come, weak, for nobody."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from toppy.system.certificate_authority import KeyPair, SigningKey, make_ca

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
USAGES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
}


@functools.cache
def authority() -> KeyPair:
    return make_ca("sample CA")


@functools.cache
def weak_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)  # to be refused


def sample(
    *,
    begin_days: float = -1,
    end_days: float = 100,
    names: Sequence[str] = ("gw.example",),
    usages: Sequence[str] = ("server",),
    key: SigningKey | None = None,
    ca: KeyPair | None = None,
    common_name: str = "sample",
    is_ca: bool = False,
) -> KeyPair:
    """Signed by ``ca`` (default ``authority()``); days are counted from ``NOW``."""
    ca = ca or authority()
    own = key or ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(ca.certificate.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + datetime.timedelta(days=begin_days))
        .not_valid_after(NOW + datetime.timedelta(days=end_days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    if names:
        found = [_general_name(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(found), critical=False)
    if usages:
        extended = x509.ExtendedKeyUsage([USAGES[usage] for usage in usages])
        builder = builder.add_extension(extended, critical=False)
    return KeyPair(builder.sign(ca.key, hashes.SHA256()), own)


def _general_name(name: str) -> x509.GeneralName:
    if "@" in name:
        return x509.RFC822Name(name)
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    return x509.DNSName(name)
