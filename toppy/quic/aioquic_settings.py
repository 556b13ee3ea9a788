"""From the engine's settings to aioquic's, with everything checked that aioquic would trip over."""

from __future__ import annotations

import ssl
from typing import Any, Final

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from toppy.quic.engine import EngineConfig

KEY_BYTES: Final = 64
_MAX_CONNECTION_ID_BYTES: Final = 20
_MAX_DATAGRAM_FRAME_BYTES: Final = 65536


def check(config: EngineConfig) -> None:
    """Raises ``ValueError`` with the name of a setting that makes no sense."""
    length = config.connection_id_bytes
    if not 8 <= length <= _MAX_CONNECTION_ID_BYTES:
        raise ValueError("connection_id_bytes must be from 8 to 20")
    if length - len(config.connection_id_prefix) < 4:
        raise ValueError("connection_id_bytes must leave 4 random bytes behind the prefix")
    for name, key in (("reset_key", config.reset_key), ("token_key", config.token_key)):
        if key and len(key) != KEY_BYTES:
            raise ValueError(f"{name} must be {KEY_BYTES} bytes")
    if config.initial_packet_bytes < 1200:
        raise ValueError("initial_packet_bytes must be at least 1200")
    if not config.alpn_protocols:
        raise ValueError("alpn_protocols must name at least one protocol")


def quic_configuration(config: EngineConfig) -> QuicConfiguration:
    """The same for aioquic; raises ``ValueError`` for a certificate or key that is no use."""
    configuration = QuicConfiguration(
        alpn_protocols=list(config.alpn_protocols),
        congestion_control_algorithm="reno" if config.congestion_control == "newreno" else "cubic",
        connection_id_length=config.connection_id_bytes,
        idle_timeout=config.idle_timeout_s,
        is_client=config.is_client,
        max_data=config.connection_window_bytes,
        max_stream_data=config.stream_window_bytes,
        max_datagram_size=config.initial_packet_bytes,
        max_datagram_frame_size=_MAX_DATAGRAM_FRAME_BYTES,
        supported_versions=[QuicProtocolVersion.VERSION_1],
    )
    if config.cipher_suites:
        try:
            configuration.cipher_suites = [
                CipherSuite[name.removeprefix("TLS_")] for name in config.cipher_suites
            ]
        except KeyError as error:
            name = f"TLS_{error.args[0]}"
            raise ValueError(f"cipher_suites: TLS 1.3 has none called {name}") from None
    if config.is_client:
        if config.ca_certificates_pem is None:
            paths = ssl.get_default_verify_paths()
            configuration.load_verify_locations(cafile=paths.cafile, capath=paths.capath)
        else:
            roots = _certificates(config.ca_certificates_pem, "ca_certificates_pem")
            # aioquic wants nothing but certificates in there, not the comments of a bundle
            pem = [root.public_bytes(serialization.Encoding.PEM) for root in roots]
            configuration.load_verify_locations(cadata=b"".join(pem))
        if not config.certificate_chain_pem:
            return configuration
    elif config.client_ca_pem:
        roots = _certificates(config.client_ca_pem, "client_ca_pem")
        pem = [root.public_bytes(serialization.Encoding.PEM) for root in roots]
        configuration.load_verify_locations(cadata=b"".join(pem))
        # on a server aioquic has no use for it; EngineConnection asks the client then
        configuration.verify_mode = (
            ssl.CERT_REQUIRED if config.requires_client_certificate else ssl.CERT_OPTIONAL
        )
    chain = _certificates(config.certificate_chain_pem, "certificate_chain_pem")
    try:
        key = serialization.load_pem_private_key(config.private_key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError("private_key_pem is not an unencrypted private key in PEM") from error
    if _public_bytes(chain[0].public_key()) != _public_bytes(key.public_key()):
        raise ValueError("private_key_pem does not belong to the first certificate")
    configuration.certificate = chain[0]
    configuration.certificate_chain = list(chain[1:])
    configuration.private_key = key
    return configuration


def _certificates(pem: bytes, name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{name} holds no certificate in PEM, or a broken one") from error


def _public_bytes(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded
