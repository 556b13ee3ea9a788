"""Client certificates at an aioquic server: asked for, verified, required.

aioquic 1.7 asks for them "for test purposes only" and verifies a client's signature, but not its
certificate; this adds what is missing, by private parts of its TLS. Like ``aioquic_connection``, it
depends on their shape, which ``tests/quic/test_client_certificates.py`` checks.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

from aioquic import tls
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from toppy.auth.certificate_chain import BROKEN_CERTIFICATE, is_authority

_MAX_CERTIFICATES: Final = 8


class _CertificateRequiredAlert(tls.Alert):
    description = tls.AlertDescription.certificate_required


def ask_client(context: tls.Context, authorities_pem: bytes, verify_mode: int) -> None:
    """Have a server's TLS ask its client for a certificate that one of the authorities issued.
    ``verify_mode``: ``ssl.CERT_REQUIRED``, or ``ssl.CERT_OPTIONAL``.
    """
    inner: Any = context
    take_certificate = inner._server_handle_certificate
    take_signature = inner._server_handle_certificate_verify

    def handle_certificate(input_buf: Any) -> None:
        take_certificate(input_buf)
        if inner._peer_certificate is None and verify_mode == ssl.CERT_REQUIRED:
            raise _CertificateRequiredAlert("a client certificate is required")

    def handle_certificate_verify(input_buf: Any) -> None:
        _verify(inner._peer_certificate, inner._peer_certificate_chain, authorities_pem)
        take_signature(input_buf)

    inner._server_handle_certificate = handle_certificate
    inner._server_handle_certificate_verify = handle_certificate_verify
    inner._request_client_certificate = True


def _verify(leaf: x509.Certificate, chain: list[x509.Certificate], authorities_pem: bytes) -> None:
    """As webpki does for the native engine: dates, chain, and the right to be a client."""
    if len(chain) >= _MAX_CERTIFICATES:
        raise tls.AlertBadCertificate("the client certificate's chain is too long")
    tls.verify_certificate(certificate=leaf, chain=chain, cadata=authorities_pem)
    try:
        usages = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    except BROKEN_CERTIFICATE as error:
        raise tls.AlertBadCertificate("the client certificate is malformed") from error
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        raise tls.AlertUnsupportedCertificate("the certificate is not one for clients")
    if is_authority(leaf):
        raise tls.AlertBadCertificate("the client certificate is that of a CA")


def shown_by_peer(context: tls.Context) -> tuple[bytes, ...]:
    """The chain that the peer has shown, DER, the leaf first."""
    inner: Any = context
    if inner._peer_certificate is None:
        return ()
    shown = [inner._peer_certificate, *inner._peer_certificate_chain]
    return tuple(each.public_bytes(Encoding.DER) for each in shown)
