"""A QUIC client that is not ours: plain aioquic, with the oddities of other implementations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    DatagramFrameReceived,
    HandshakeCompleted,
    QuicEvent,
)
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.tls import Epoch

from tests.quic.certificates import SERVER_NAME, certificates
from tests.quic.link import Link, split
from toppy.model.drop_reason import DropReason
from toppy.quic.engine import Address, Buffer, DatagramGroup, Engine, Event, Transmit


class _ShortIds(QuicConnection):
    """As quic-go's clients and browsers: no connection IDs of their own, or short ones."""

    def __init__(self, *, configuration: QuicConfiguration) -> None:
        super().__init__(configuration=configuration)
        self._peer_cid.cid = os.urandom(8)
        self._original_destination_connection_id = self._peer_cid.cid

    def _replenish_connection_ids(self) -> None:
        if self._configuration.connection_id_length:
            super()._replenish_connection_ids()


class Stranger:
    """Looks like an engine to ``Link``; ``quic`` is for the test to play with.

    ``mangle`` may change every UDP datagram that it sends.
    """

    name = "stranger"

    def __init__(
        self,
        *,
        id_bytes: int = 8,
        mangle: Callable[[bytes], bytes] | None = None,
        **settings: object,
    ) -> None:
        configuration = QuicConfiguration(
            alpn_protocols=["h3"],
            connection_id_length=id_bytes,
            max_datagram_frame_size=65536,
            server_name=SERVER_NAME,
            cadata=certificates().ca_pem,
            supported_versions=[1],
        )
        for key, value in settings.items():
            assert hasattr(configuration, key)
            setattr(configuration, key, value)
        factory = QuicConnection if id_bytes >= 8 else _ShortIds
        self.quic = factory(configuration=configuration)
        self.seen: list[QuicEvent] = []
        self._mangle = mangle or (lambda data: data)

    def join(self, link: Link, address: Address) -> None:
        """Take part in a link; the few calls that it makes are all here."""
        link.attach(cast(Engine, self), address)

    @property
    def is_ready(self) -> bool:
        return any(isinstance(event, HandshakeCompleted) for event in self.seen)

    @property
    def termination(self) -> ConnectionTerminated | None:
        found = [event for event in self.seen if isinstance(event, ConnectionTerminated)]
        return found[0] if found else None

    @property
    def frames(self) -> list[bytes]:
        """Contents of DATAGRAM frames that arrived."""
        return [event.data for event in self.seen if isinstance(event, DatagramFrameReceived)]

    def raw_packet(self, frames: bytes) -> bytes:
        """A 1-RTT packet with any bytes for frames, well protected; ``frames`` is not empty."""
        builder = QuicPacketBuilder(
            host_cid=self.quic.host_cid,
            is_client=True,
            max_datagram_size=1200,
            packet_number=self.quic._packet_number,
            peer_cid=self.quic._peer_cid.cid,
            version=1,
        )
        builder.start_packet(QuicPacketType.ONE_RTT, self.quic._cryptos[Epoch.ONE_RTT])
        buffer = builder.start_frame(QuicFrameType.PING, capacity=len(frames))
        buffer.seek(buffer.tell() - 1)
        buffer.push_bytes(frames)
        datagrams, _ = builder.flush()
        self.quic._packet_number = builder.packet_number
        return datagrams[0]

    def connect(self, address: Address, server_name: str, now: float) -> int:
        self.quic.connect(address, now)
        return 1

    def receive(self, buffer: Buffer, segment_size: int, source: Address, now: float) -> None:
        for data in split(bytes(buffer), segment_size):
            self.quic.receive_datagram(data, source, now)

    def handle_timeout(self, now: float) -> None:
        self.quic.handle_timer(now)

    def next_timeout(self) -> float | None:
        return self.quic.get_timer()

    def poll_events(self) -> list[Event]:
        while (event := self.quic.next_event()) is not None:
            self.seen.append(event)
        return []

    def poll_datagrams(self) -> list[DatagramGroup]:
        return []

    def poll_transmits(self, now: float) -> list[Transmit]:
        return [
            (self._mangle(data), 0, address) for data, address in self.quic.datagrams_to_send(now)
        ]

    def take_drops(self) -> dict[DropReason, int]:
        return {}
