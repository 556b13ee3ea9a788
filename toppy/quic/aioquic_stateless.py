"""What a QUIC server answers without a connection: version negotiation, Retry, refusals, resets."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicFrameType,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from toppy.quic.engine import Address

QUIC_V1: Final = 1
MIN_INITIAL_BYTES: Final = 1200
"""UDP datagrams with Initial packets are at least so long (RFC 9000 section 14.1)."""
MIN_FIRST_CONNECTION_ID_BYTES: Final = 8
"""Of the ID that a client invents for its first packet (RFC 9000 section 7.2)."""
RESET_TOKEN_BYTES: Final = 16
MIN_RESET_BYTES: Final = 21
"""The shortest stateless reset (RFC 9000 section 10.3)."""
_MAX_RESET_BYTES: Final = 42
"""Long enough to look like a packet, whatever the length of the receiver's connection IDs."""
_RETRY_LIFETIME_S: Final = 15.0
"""A client answers a Retry at once; the token need not live longer (RFC 9000 section 8.1.4)."""
_NONCE_BYTES: Final = 12

Entropy = Callable[[int], bytes]
"""So many random bytes, fit for keys."""


def system_entropy(count: int) -> bytes:
    """Random bytes of the operating system, by way of the key generator of ``cryptography``."""
    pieces = [AESGCM.generate_key(bit_length=256) for _ in range(-(-count // 32))]
    return b"".join(pieces)[:count]


@dataclass(frozen=True, slots=True)
class ConnectionIdIssuer:
    """Makes connection IDs that carry the worker's prefix, and their reset tokens."""

    prefix: bytes
    length: int
    reset_key: bytes
    entropy: Entropy
    reset_prefix: bytes = b""
    """What every ID that may be reset begins with, whichever worker issued it."""

    def new(self) -> bytes:
        """A connection ID: the prefix, then random bytes."""
        return self.prefix + self.entropy(self.length - len(self.prefix))

    def reset_token(self, connection_id: bytes) -> bytes:
        """The stateless reset token of a connection ID that we issued."""
        return hmac.digest(self.reset_key, connection_id, hashlib.sha256)[:RESET_TOKEN_BYTES]

    def stateless_reset(self, packet: bytes) -> bytes | None:
        """The answer to a short-header packet of a connection that we do not know.

        None when the packet does not carry an ID of ours, or is too short: the answer is always
        shorter than the packet, so that two endpoints cannot reset each other for ever.
        """
        connection_id = packet[1 : 1 + self.length]
        if len(packet) <= MIN_RESET_BYTES or len(connection_id) < self.length:
            return None
        if not connection_id.startswith(self.reset_prefix):
            return None
        noise = bytearray(self.entropy(min(len(packet) - 1, _MAX_RESET_BYTES) - RESET_TOKEN_BYTES))
        noise[0] = 0x40 | noise[0] & 0x3F
        return bytes(noise) + self.reset_token(connection_id)


@dataclass(frozen=True, slots=True)
class FirstPacket:
    """The Initial packet of a connection attempt."""

    destination_id: bytes
    source_id: bytes
    token: bytes


def parse_first_packet(data: bytes) -> FirstPacket | None:
    """The header of a client's first UDP datagram, or None when it is not one (QUIC v1 only)."""
    if len(data) < MIN_INITIAL_BYTES:
        return None
    try:
        header = pull_quic_header(Buffer(data=data))
    except ValueError:
        return None
    if header.packet_type is not QuicPacketType.INITIAL:
        return None
    if len(header.destination_cid) < MIN_FIRST_CONNECTION_ID_BYTES:
        return None
    return FirstPacket(header.destination_cid, header.source_cid, header.token)


def version_negotiation(data: bytes) -> bytes | None:
    """The answer to a long-header packet of a version that we do not speak; None when none is due.

    Version 0 is itself a version negotiation, and small datagrams could be used for amplification
    (RFC 9000 section 6.1). IDs of other versions may be up to 255 bytes long (RFC 8999).
    """
    if len(data) < MIN_INITIAL_BYTES or data[1:5] == bytes(4):
        return None
    destination_end = 6 + data[5]
    source_end = destination_end + 1 + data[destination_end]
    if source_end > len(data):
        return None
    return encode_quic_version_negotiation(
        source_cid=data[6:destination_end],
        destination_cid=data[destination_end + 1 : source_end],
        supported_versions=[QUIC_V1],
    )


def initial_close(first: FirstPacket, error_code: int) -> bytes:
    """An Initial packet that closes a connection attempt with a transport error code."""
    crypto = CryptoPair()
    crypto.setup_initial(cid=first.destination_id, is_client=False, version=QUIC_V1)
    builder = QuicPacketBuilder(
        host_cid=first.destination_id,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
        peer_cid=first.source_id,
        version=QUIC_V1,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    frame = builder.start_frame(
        QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY
    )
    frame.push_uint_var(error_code)
    frame.push_uint_var(QuicFrameType.PADDING)
    frame.push_uint_var(0)
    datagrams, _ = builder.flush()
    return datagrams[0]


class InvalidRetryTokenError(ValueError):
    """A token of ours that does not fit: another address, another connection ID, or too old."""


class RetryTokens:
    """Retry packets and their tokens (RFC 9000 section 8.1.2).

    A token is sealed with a key that all workers share, so that any of them can take it up. Times
    are seconds on the caller's monotonic clock, which on one machine all processes share.
    """

    def __init__(self, token_key: bytes, issuer: ConnectionIdIssuer) -> None:
        self._aead = AESGCM(hmac.digest(token_key, b"toppy retry token", hashlib.sha256))
        self._issuer = issuer

    def retry_packet(self, first: FirstPacket, source: Address, now: float) -> bytes:
        """The Retry packet that answers ``first``."""
        retry_id = self._issuer.new()
        nonce = self._issuer.entropy(_NONCE_BYTES)
        fields = (
            max(0, int(now * 1000)).to_bytes(8, "big"),
            bytes((len(first.destination_id),)),
            first.destination_id,
            retry_id,
        )
        token = nonce + self._aead.encrypt(nonce, b"".join(fields), _encode_address(source))
        return encode_quic_retry(
            version=QUIC_V1,
            source_cid=retry_id,
            destination_cid=first.source_id,
            original_destination_cid=first.destination_id,
            retry_token=token,
        )

    def original_destination_id(
        self, first: FirstPacket, source: Address, now: float
    ) -> bytes | None:
        """The connection ID of the client's very first packet, when the token proves its address.

        None: no token, or one that is not for this address or not ours: the address is not
        proven. Raises InvalidRetryTokenError when it is ours and for this address, but too old or
        for another connection.
        """
        token = first.token
        if len(token) <= _NONCE_BYTES:
            return None
        try:
            plain = self._aead.decrypt(
                token[:_NONCE_BYTES], token[_NONCE_BYTES:], _encode_address(source)
            )
        except InvalidTag:
            return None
        issued = int.from_bytes(plain[:8], "big") / 1000
        end = 9 + plain[8]
        if plain[end:] != first.destination_id:
            raise InvalidRetryTokenError("the token is for another connection ID")
        if not -1.0 <= now - issued <= _RETRY_LIFETIME_S:
            raise InvalidRetryTokenError("the token is too old")
        return plain[9:end]


def _encode_address(address: Address) -> bytes:
    host = ipaddress.ip_address(address[0].partition("%")[0])
    return host.packed + address[1].to_bytes(2, "big")


class RateLimit:
    """At most ``per_s`` a second on average, ``burst`` at once."""

    def __init__(self, per_s: float, burst: int, now: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = float(burst)
        self._then = now

    def may_pass(self, now: float) -> bool:
        """Whether one more is within the limit; if so, it is counted."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._then) * self._per_s)
        self._then = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
