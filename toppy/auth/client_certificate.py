"""Who a client's certificate says that it is, and whether it still counts (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.x509.oid import NameOID

from toppy.auth.certificate_chain import BROKEN_CERTIFICATE, find_chain, fingerprint
from toppy.model.client_certificate import ClientCertificate

SUBJECT_PREFIX = "cert:"
"""Subjects of certificates begin with it, and no token's may."""
_MAX_NAMES = 16
_MAX_NAME_CHARACTERS = 253

NameFrom = Literal["san", "common_name"]


def parse_client_certificate(
    chain: Sequence[bytes], authorities: Sequence[x509.Certificate]
) -> ClientCertificate | None:
    """What the control plane must know of a chain (DER, the leaf first) that the engine verified.

    None where there is no certificate, or none that leads to one of ``authorities``.
    """
    if not chain:
        return None
    try:
        leaf, *others = (x509.load_der_x509_certificate(each) for each in chain)
        found = find_chain(leaf, others, authorities)
        names = _names(leaf)
        common_name = _common_name(leaf)
    except BROKEN_CERTIFICATE:
        return None
    if found is None:
        return None
    return ClientCertificate(
        common_name=common_name,
        names=names,
        fingerprint=fingerprint(leaf),
        authority=fingerprint(found[-1]),
        not_after=min(each.not_valid_after_utc for each in found).timestamp(),
    )


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    names = [
        *(name.lower() for name in san.get_values_for_type(x509.DNSName)),
        *san.get_values_for_type(x509.RFC822Name),
        *san.get_values_for_type(x509.UniformResourceIdentifier),
    ]
    return tuple(name for name in names if _is_usable(name))[:_MAX_NAMES]


def _common_name(leaf: x509.Certificate) -> str:
    for attribute in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        if isinstance(attribute.value, str) and _is_usable(attribute.value):
            return attribute.value
    return ""


def _is_usable(name: str) -> bool:
    return bool(name) and len(name) <= _MAX_NAME_CHARACTERS and name.isprintable()


@dataclass(frozen=True, slots=True)
class CertificateTrust:
    """Which client certificates count now."""

    authorities: frozenset[str] = frozenset()
    """Fingerprints of the CAs; none: certificates are not asked for."""
    is_required: bool = False
    """Nobody gets in without one, whatever else they show."""

    def current(
        self, certificate: ClientCertificate | None, now: float
    ) -> ClientCertificate | None:
        """``certificate`` while it counts at Unix time ``now``."""
        if (
            certificate is None
            or now >= certificate.not_after
            or certificate.authority not in self.authorities
        ):
            return None
        return certificate


def subject_of(certificate: ClientCertificate, name_from: NameFrom) -> str | None:
    """``cert:NAME``; None where the certificate has no such name."""
    if name_from == "common_name":
        name = certificate.common_name
    else:
        name = certificate.names[0] if certificate.names else ""
    return f"{SUBJECT_PREFIX}{name}" if name else None
