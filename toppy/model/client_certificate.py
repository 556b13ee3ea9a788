"""What a worker says of a client's certificate, once its chain was verified."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A verified certificate of a client."""

    common_name: str
    """Of its subject; empty: it has none, or one that is not printable."""
    names: tuple[str, ...]
    """DNS names, mail addresses and URIs of its subjectAltName, in that order."""
    fingerprint: str
    """SHA-256 of the certificate, 64 hex digits."""
    authority: str
    """The same of the CA that its chain leads to."""
    not_after: float
    """Unix time of its end."""
