"""Asks a QUIC server for its certificates, whatever they are worth: for `toppy doctor`.

Nothing is verified, so nothing is ever sent on this connection; it is closed as soon as the chain
is there. An engine that verifies would end the handshake before anybody could say what is wrong
with an expired certificate. Sans-I/O, on aioquic, which is always installed.
"""

from __future__ import annotations

import ssl
from typing import Final

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import (
    QuicProtocolVersion,
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from cryptography import x509

from toppy.quic.engine import Address

SMALLEST_PACKET_BYTES: Final = 1200
_MAX_PARAMETERS_BYTES: Final = 1024
_IDLE_TIMEOUT_S: Final = 10.0


class _Connection(QuicConnection):
    """Tells the server to send no larger packets than this probe does."""

    def _serialize_transport_parameters(self) -> bytes:
        parameters = pull_quic_transport_parameters(
            Buffer(data=super()._serialize_transport_parameters())
        )
        parameters.max_udp_payload_size = SMALLEST_PACKET_BYTES
        buffer = Buffer(capacity=_MAX_PARAMETERS_BYTES)
        push_quic_transport_parameters(buffer, parameters)
        return buffer.data


class CertificateProbe:
    """One handshake in packets of 1,200 bytes, in both directions: a path that carries nothing
    larger carries this one.

    Feed ``receive`` and ``handle_timeout``; send what ``poll_transmits`` gives; until ``is_over``.
    """

    def __init__(
        self, address: Address, server_name: str, alpn_protocols: tuple[str, ...], now: float
    ) -> None:
        configuration = QuicConfiguration(
            alpn_protocols=list(alpn_protocols),
            idle_timeout=_IDLE_TIMEOUT_S,
            is_client=True,
            max_datagram_size=SMALLEST_PACKET_BYTES,
            server_name=server_name,
            supported_versions=[QuicProtocolVersion.VERSION_1],
            verify_mode=ssl.CERT_NONE,
        )
        self._address = address
        self._connection = _Connection(configuration=configuration)
        self._connection.connect(address, now)
        self.chain: tuple[x509.Certificate, ...] = ()
        """The server's certificates, its own first, once they are there."""
        self.failure = ""
        """Why the server ended the handshake, where it did so before the chain came."""

    @property
    def is_over(self) -> bool:
        """The chain is there, or will not come."""
        return bool(self.chain or self.failure)

    def receive(self, data: bytes, now: float) -> None:
        """A UDP payload from the server."""
        self._connection.receive_datagram(data, self._address, now)
        self._look(now)

    def handle_timeout(self, now: float) -> None:
        """Do what was due by ``now``."""
        due = self._connection.get_timer()
        if due is not None and due <= now:
            self._connection.handle_timer(now)
            self._look(now)

    def next_timeout(self) -> float | None:
        """When ``handle_timeout`` is to be called next."""
        due: float | None = self._connection.get_timer()
        return due

    def poll_transmits(self, now: float) -> list[bytes]:
        """UDP payloads to send now."""
        return [data for data, _ in self._connection.datagrams_to_send(now)]

    def close(self, now: float) -> None:
        """Say goodbye; send what ``poll_transmits`` gives for it."""
        self._connection.close()

    def _look(self, now: float) -> None:
        while (event := self._connection.next_event()) is not None:
            if isinstance(event, ConnectionTerminated) and not self.chain:
                reason = "".join(c if c.isprintable() else "?" for c in event.reason_phrase)
                self.failure = reason[:200] or "the gateway closed the connection"
        certificate = self._connection.tls._peer_certificate
        if certificate is not None and not self.chain:
            self.chain = (certificate, *self._connection.tls._peer_certificate_chain)
