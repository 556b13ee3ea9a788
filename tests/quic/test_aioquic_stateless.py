from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.quic.aioquic_stateless import (
    ConnectionIdIssuer,
    FirstPacket,
    InvalidRetryTokenError,
    RateLimit,
    RetryTokens,
    initial_close,
    parse_first_packet,
    system_entropy,
    version_negotiation,
)
from toppy.quic.engine import Address

ISSUER = ConnectionIdIssuer(
    b"\x54\0\x03\x07", 10, b"k" * 64, random.Random(1).randbytes, reset_prefix=b"\x54\0"
)
ADDRESS: Address = ("198.51.100.7", 50000)
FIRST = FirstPacket(b"destination", b"source", b"")


def token_of(retry: bytes) -> tuple[bytes, bytes]:
    """(source connection ID, token) of a Retry packet."""
    offset = 6 + retry[5]
    retry_id = retry[offset + 1 : offset + 1 + retry[offset]]
    return retry_id, retry[offset + 1 + len(retry_id) : -16]


def test_connection_ids_carry_the_prefix_and_differ() -> None:
    ids = {ISSUER.new() for _ in range(50)}
    assert len(ids) == 50
    assert all(len(each) == 10 and each.startswith(ISSUER.prefix) for each in ids)


def test_system_entropy_gives_as_many_bytes_as_asked() -> None:
    assert [len(system_entropy(count)) for count in (0, 1, 16, 32, 64, 65)] == [
        0,
        1,
        16,
        32,
        64,
        65,
    ]
    assert system_entropy(16) != system_entropy(16)


@given(st.integers(0, 100))
def test_a_reset_is_shorter_than_its_cause_and_looks_like_a_packet(length: int) -> None:
    connection_id = ISSUER.new()
    packet = (b"\x41" + connection_id + bytes(100))[:length]
    reset = ISSUER.stateless_reset(packet)
    if length < 22:
        assert reset is None
    else:
        assert reset is not None
        assert 21 <= len(reset) < length
        assert reset[0] & 0xC0 == 0x40
        assert reset[-16:] == ISSUER.reset_token(connection_id)


def test_strangers_ids_are_not_answered_with_a_reset() -> None:
    assert ISSUER.stateless_reset(b"\x41" + bytes(100)) is None


class TestRetry:
    def retried(self, tokens: RetryTokens, now: float = 100.0) -> FirstPacket:
        retry_id, token = token_of(tokens.retry_packet(FIRST, ADDRESS, now))
        return FirstPacket(retry_id, b"source", token)

    def test_a_token_gives_back_the_original_id(self) -> None:
        again = self.retried(RetryTokens(b"t" * 64, ISSUER))
        worker = RetryTokens(b"t" * 64, ISSUER)
        assert worker.original_destination_id(again, ADDRESS, 101.0) == b"destination"

    def test_no_token_proves_nothing(self) -> None:
        assert RetryTokens(b"t" * 64, ISSUER).original_destination_id(FIRST, ADDRESS, 0.0) is None

    @pytest.mark.parametrize("address", [("198.51.100.8", 50000), ("198.51.100.7", 50001)])
    def test_a_token_proves_nothing_for_another_address(self, address: Address) -> None:
        tokens = RetryTokens(b"t" * 64, ISSUER)
        assert tokens.original_destination_id(self.retried(tokens), address, 101.0) is None

    def test_a_token_of_another_key_proves_nothing(self) -> None:
        again = self.retried(RetryTokens(b"u" * 64, ISSUER))
        assert RetryTokens(b"t" * 64, ISSUER).original_destination_id(again, ADDRESS, 101.0) is None

    @pytest.mark.parametrize("now", [90.0, 116.0, 1e9])
    def test_a_token_lives_fifteen_seconds(self, now: float) -> None:
        tokens = RetryTokens(b"t" * 64, ISSUER)
        again = self.retried(tokens)
        assert tokens.original_destination_id(again, ADDRESS, 114.9) == b"destination"
        with pytest.raises(InvalidRetryTokenError, match="old"):
            tokens.original_destination_id(again, ADDRESS, now)

    def test_a_token_is_good_for_its_own_connection_id_only(self) -> None:
        tokens = RetryTokens(b"t" * 64, ISSUER)
        again = self.retried(tokens)
        other = FirstPacket(ISSUER.new(), b"source", again.token)
        with pytest.raises(InvalidRetryTokenError, match="connection ID"):
            tokens.original_destination_id(other, ADDRESS, 101.0)

    @given(st.binary(max_size=80))
    def test_any_other_token_proves_nothing(self, token: bytes) -> None:
        first = FirstPacket(b"destination", b"source", token)
        tokens = RetryTokens(b"t" * 64, ISSUER)
        assert tokens.original_destination_id(first, ADDRESS, 0.0) is None

    def test_ipv6_addresses_are_proven_too(self) -> None:
        tokens = RetryTokens(b"t" * 64, ISSUER)
        address = ("2001:db8::1", 443)
        retry_id, token = token_of(tokens.retry_packet(FIRST, address, 5.0))
        first = FirstPacket(retry_id, b"source", token)
        assert tokens.original_destination_id(first, address, 5.0) == b"destination"


@given(st.binary(max_size=60), st.integers(0, 255), st.integers(0, 255))
def test_any_long_header_is_parsed_or_ignored(start: bytes, first: int, length: int) -> None:
    data = bytes((0xC0 | first & 0x3F,)) + b"\0\0\0\x01" + bytes((length,)) + start
    padded = data + bytes(1200 - len(data))
    found = parse_first_packet(padded)
    if found is not None:
        assert len(found.destination_id) >= 8
    assert parse_first_packet(data) is None


@given(st.binary(min_size=6, max_size=1500))
def test_version_negotiation_is_never_larger_than_its_cause(data: bytes) -> None:
    answer = version_negotiation(data)
    assert answer is None or len(answer) < len(data)


def test_version_negotiation_takes_ids_of_255_bytes() -> None:
    data = b"\xc0\x12\x34\x56\x78\xff" + b"d" * 255 + b"\xff" + b"s" * 255
    answer = version_negotiation(data + bytes(1200 - len(data)))
    assert answer is not None
    expected = bytes(4) + b"\xff" + b"s" * 255 + b"\xff" + b"d" * 255 + b"\0\0\0\x01"
    assert answer[1:] == expected


def test_a_refusal_is_small() -> None:
    assert len(initial_close(FIRST, 2)) < 200


def test_a_rate_limit_lets_a_burst_pass_and_then_so_many_a_second() -> None:
    limit = RateLimit(10.0, 5, now=0.0)
    assert [limit.may_pass(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert not limit.may_pass(0.05)
    assert limit.may_pass(0.15)
    assert not limit.may_pass(0.15)
    assert [limit.may_pass(100.0) for _ in range(6)] == [True] * 5 + [False]
