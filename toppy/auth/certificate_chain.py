"""Which authority a chain of certificates leads to (pure; RFC 5280 section 6, in small).

The QUIC engines verify the chains of their peers. This finds out afterwards which root it was, and
says in words what a person got wrong. No name constraints, policies or revocation lists here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

BROKEN_CERTIFICATE = (
    ValueError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
"""What ``cryptography`` raises for certificates that make no sense, some of it late."""
MAX_CHAIN = 8
"""Certificates between a leaf and its root, both included."""


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256, as 64 hex digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def find_chain(
    leaf: x509.Certificate,
    presented: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
) -> list[x509.Certificate] | None:
    """From ``leaf`` over those ``presented`` to one of ``authorities``; None: there is no way.

    Signatures and the right to sign are checked, dates are not; of several that have signed (a CA
    that was renewed with its key) the one that ends last is taken. A leaf that is itself among the
    authorities is a chain of one: somebody trusts that very certificate.
    """
    chain = [leaf]
    for _ in range(MAX_CHAIN):
        last = chain[-1]
        if last in authorities:
            return chain
        authority = _last_to_end(each for each in authorities if is_issuer(each, last))
        if authority is not None:
            return [*chain, authority]
        issuer = _last_to_end(e for e in presented if e not in chain and is_issuer(e, last))
        if issuer is None:
            return None
        chain.append(issuer)
    return None


def _last_to_end(certificates: Iterable[x509.Certificate]) -> x509.Certificate | None:
    return max(certificates, key=lambda each: each.not_valid_after_utc, default=None)


def is_issuer(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Whether ``issuer`` may sign certificates and has signed this one."""
    if not is_authority(issuer):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*BROKEN_CERTIFICATE, TypeError, InvalidSignature):
        return False
    return True


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it says that it may sign others (basicConstraints)."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except (x509.ExtensionNotFound, *BROKEN_CERTIFICATE):
        return False
    return found.value.ca
