"""Who is at the other end of a connection, where clients have certificates."""

from __future__ import annotations

from collections.abc import Callable

from cryptography import x509

from toppy.auth.client_certificate import parse_client_certificate
from toppy.model.client_certificate import ClientCertificate
from toppy.quic.engine import Engine


def certificate_reader(
    engine: Engine, client_ca_pem: bytes
) -> Callable[[int], ClientCertificate | None]:
    """What says of a connection whose handshake is done which certificate its client has shown;
    the engine has verified it. Without ``client_ca_pem`` nobody is asked for any.
    """
    if not client_ca_pem:
        return lambda _: None
    authorities = x509.load_pem_x509_certificates(client_ca_pem)
    return lambda connection: parse_client_certificate(
        engine.peer_certificates(connection), authorities
    )
