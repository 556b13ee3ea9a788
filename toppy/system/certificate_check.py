"""What is wrong with a certificate, and what to do about it (pure: bytes and the time come in)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from toppy.auth.certificate_chain import BROKEN_CERTIFICATE, find_chain
from toppy.system.certificate_files import (
    date_problem,
    days_left,
    describe_certificate,
    is_encrypted,
    is_for,
    is_key_of,
    key_problem,
    key_type_of,
    parse_certificates,
    parse_private_key,
    usages_of,
)

Purpose = Literal["server", "client"]
WARN_DAYS = 30
URGENT_DAYS = 7
_WEAK_HASHES = (hashes.MD5, hashes.SHA1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    id: str
    status: Literal["pass", "warn", "fail"]
    summary: str
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


def check_certificate(
    chain_pem: bytes,
    *,
    now: float,
    purpose: Purpose = "server",
    key_pem: bytes | None = None,
    passphrase: bytes | None = None,
    ca_pem: bytes | None = None,
    names: Sequence[str] = (),
) -> list[Finding]:
    """Look at everything that there is; ``now`` is Unix time.

    ``names`` are those that clients use for the gateway (a certificate for clients has none to
    check). Without ``key_pem`` and ``ca_pem`` these are not looked at.
    """
    try:
        chain = parse_certificates(chain_pem)
        facts = describe_certificate(chain[0])
    except ValueError as error:
        remedy = "name the PEM file that begins with -----BEGIN CERTIFICATE-----"
        return [Finding("file", "fail", str(error), remedy)]
    leaf = chain[0]
    found = [Finding("file", "pass", f"{facts.subject}, {facts.key_type}")]
    if key_pem is not None:
        found.append(_key(leaf, key_pem, passphrase))
    found.append(_dates(leaf, now))
    found.append(_strength(leaf))
    found.append(_usage(leaf, purpose))
    if purpose == "server":
        found += _names(leaf, facts.names, names)
    if ca_pem is not None:
        found.append(_chain(chain, ca_pem, now))
    return found


def _key(leaf: x509.Certificate, key_pem: bytes, passphrase: bytes | None) -> Finding:
    try:
        key = parse_private_key(
            key_pem, passphrase if is_encrypted(key_pem) else None, "the key file"
        )
    except ValueError as error:
        remedy = "name the key's PEM file"
        if is_encrypted(key_pem):
            remedy = "give the passphrase with --passphrase-file"
        return Finding("key", "fail", str(error), remedy)
    if not is_key_of(key, leaf):
        return Finding(
            "key",
            "fail",
            "the private key is not the certificate's",
            "put the key beside the certificate that it was made for, or make a new pair "
            "(toppy-gw cert server)",
        )
    return Finding("key", "pass", "the private key is the certificate's")


def _dates(leaf: x509.Certificate, now: float) -> Finding:
    problem = date_problem(leaf, now)
    left = days_left(leaf, now)
    end = f"{leaf.not_valid_after_utc:%Y-%m-%d}"
    renew = "make a new one (toppy-gw cert server or client), then toppy-gw reload"
    if problem is not None:
        if "clock" in problem:
            renew = "set this machine's clock, or wait"
        return Finding("dates", "fail", f"the certificate {problem}", renew)
    summary = f"valid until {end}, {left} days left"
    if left < WARN_DAYS:
        return Finding("dates", "warn", summary, renew)
    return Finding("dates", "pass", summary)


def _strength(leaf: x509.Certificate) -> Finding:
    problem = key_problem(leaf)
    remedy = "make a new one: toppy-gw cert server --key-type ecdsa-p256"
    if problem is not None:
        return Finding("strength", "fail", f"the certificate {problem}", remedy)
    try:
        signed_with = leaf.signature_hash_algorithm
    except BROKEN_CERTIFICATE:
        return Finding("strength", "fail", "it is signed in a way that nobody here knows", remedy)
    if isinstance(signed_with, _WEAK_HASHES):
        name = signed_with.name.upper()
        return Finding("strength", "fail", f"it is signed with {name}, which is broken", remedy)
    return Finding("strength", "pass", f"{key_type_of(leaf)} is strong enough")


def _usage(leaf: x509.Certificate, purpose: Purpose) -> Finding:
    usages = usages_of(leaf)
    if describe_certificate(leaf).is_ca:
        return Finding(
            "usage",
            "fail",
            "it is the certificate of a CA, which QUIC peers refuse as a party's own",
            f"have it sign another: toppy-gw cert {purpose}",
        )
    # webpki does not take "any" for an answer
    if usages and purpose not in usages:
        return Finding(
            "usage",
            "fail",
            f"it is for {', '.join(usages)}, not for a {purpose}",
            f"make one that is: toppy-gw cert {purpose}",
        )
    return Finding("usage", "pass", f"it may be used by a {purpose}")


def _names(leaf: x509.Certificate, has: Sequence[str], wanted: Sequence[str]) -> list[Finding]:
    if not has:
        return [
            Finding(
                "names",
                "fail",
                "it has no subjectAltName; clients do not look at the common name",
                "make one with names: toppy-gw cert server --name gw.example.com",
            )
        ]
    missing = [name for name in wanted if not is_for(leaf, name)]
    if missing:
        return [
            Finding(
                "names",
                "fail",
                f"it is not for {', '.join(missing)}, but for {', '.join(has)}",
                "add the name (toppy-gw cert server --name), or set server_name at the client",
            )
        ]
    return [Finding("names", "pass", f"it is for {', '.join(has)}")]


def _chain(chain: Sequence[x509.Certificate], ca_pem: bytes, now: float) -> Finding:
    try:
        authorities = parse_certificates(ca_pem, "the CA file")
    except ValueError as error:
        return Finding("chain", "fail", str(error), "name the CA's certificate with --ca")
    path = find_chain(chain[0], chain[1:], authorities)
    if path is None:
        issuer = chain[-1].issuer.rfc4514_string()
        return Finding(
            "chain",
            "fail",
            f"no way leads from it to the CA: {issuer} issued the last certificate of the file",
            "give clients the CA that issued it (ca_cert_path), or append the missing intermediate "
            "certificates to the file",
        )
    for certificate in path[1:]:
        problem = date_problem(certificate, now)
        if problem is not None:
            subject = certificate.subject.rfc4514_string()
            return Finding(
                "chain", "fail", f"{subject} of the chain {problem}", "get a new chain from its CA"
            )
    return Finding("chain", "pass", f"it leads to {path[-1].subject.rfc4514_string()}")
