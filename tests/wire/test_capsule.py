"""Capsules in any chunks; lies about length are refused before anything is buffered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import DatagramError, PeerError
from toppy.wire.capsule import (
    DATAGRAM,
    MAX_TUNNEL_CLOSED_BYTES,
    TUNNEL_CLOSED,
    WRAP_UP,
    Capsule,
    CapsuleParser,
    encode_capsule,
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.varint import encode_varint

UNKNOWN = 0x2F37


@given(
    st.lists(st.tuples(st.sampled_from([DATAGRAM, UNKNOWN]), st.binary(max_size=100)), max_size=8),
    st.integers(1, 64),
)
def test_known_capsules_arrive_whole_and_unknown_ones_are_skipped(
    sent: list[tuple[int, bytes]], chunk: int
) -> None:
    stream = b"".join(encode_capsule(kind, value) for kind, value in sent)
    parser = CapsuleParser(100)
    received: list[Capsule] = []
    for start in range(0, len(stream), chunk):
        received += parser.receive(stream[start : start + chunk])
    parser.receive_end()
    assert received == [Capsule(DATAGRAM, value) for kind, value in sent if kind == DATAGRAM]
    assert parser.skipped == sum(kind == UNKNOWN for kind, _ in sent)


def test_a_known_capsule_beyond_the_bound_is_refused_by_its_header() -> None:
    parser = CapsuleParser(100)
    with pytest.raises(DatagramError, match="101 bytes"):
        parser.receive(encode_varint(DATAGRAM) + encode_varint(101))


def test_an_unknown_capsule_of_any_length_is_skipped_without_being_kept() -> None:
    parser = CapsuleParser(100)
    assert parser.receive(encode_varint(UNKNOWN) + encode_varint(10_000_000)) == []
    for _ in range(100):
        assert parser.receive(bytes(100_000)) == []
    assert parser.receive(encode_capsule(DATAGRAM, b"next")) == [Capsule(DATAGRAM, b"next")]


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_an_end_inside_a_capsule_is_an_error(cut: int) -> None:
    parser = CapsuleParser(1000)
    parser.receive(encode_capsule(DATAGRAM, b"x" * 300)[:cut])
    with pytest.raises(PeerError):
        parser.receive_end()


def test_an_end_between_capsules_is_fine() -> None:
    parser = CapsuleParser(1000)
    parser.receive(encode_capsule(DATAGRAM, b"x"))
    parser.receive_end()


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_is_taken_or_refused_with_the_documented_error(chunks: list[bytes]) -> None:
    parser = CapsuleParser(64)
    try:
        for chunk in chunks:
            parser.receive(chunk)
        parser.receive_end()
    except PeerError:
        pass


def test_after_a_refusal_nothing_more_is_taken() -> None:
    parser = CapsuleParser(100)
    for _ in range(3):
        with pytest.raises(DatagramError, match="101 bytes"):
            parser.receive(encode_varint(DATAGRAM) + encode_varint(101) + bytes(101))


@pytest.mark.parametrize("chunk", [1, 1000, 65_536, 200_000])
def test_large_capsules_arrive_whole_in_any_chunks(chunk: int) -> None:
    values = [bytes([n]) * 65_535 for n in range(2)]
    stream = b"".join(encode_capsule(DATAGRAM, value) for value in values)
    parser = CapsuleParser(65_535)
    received = []
    for start in range(0, len(stream), chunk):
        received += parser.receive(stream[start : start + chunk])
    assert [capsule.value for capsule in received] == values


def test_a_length_in_a_longer_encoding_is_the_same_length() -> None:
    parser = CapsuleParser(100)
    data = b"\x40\x00" + b"\xc0" + bytes(6) + b"\x02" + b"ab"
    assert parser.receive(data) == [Capsule(DATAGRAM, b"ab")]


def test_other_types_are_known_when_asked_for() -> None:
    parser = CapsuleParser(100, known_types=frozenset({UNKNOWN}))
    stream = encode_capsule(DATAGRAM, b"a") + encode_capsule(UNKNOWN, b"b")
    assert parser.receive(stream) == [Capsule(UNKNOWN, b"b")]
    assert parser.skipped == 1


def test_wrap_up_is_empty() -> None:
    parser = CapsuleParser(100, known_types=frozenset({WRAP_UP}))
    assert parser.receive(encode_wrap_up()) == [Capsule(WRAP_UP, b"")]
    assert encode_wrap_up() == bytes.fromhex("a72dda5e00")


@given(st.text(max_size=2000))
def test_tunnel_closed_says_why_in_at_most_1024_bytes_of_ascii(reason: str) -> None:
    parser = CapsuleParser(MAX_TUNNEL_CLOSED_BYTES, known_types=frozenset({TUNNEL_CLOSED}))
    (capsule,) = parser.receive(encode_tunnel_closed(reason))
    assert capsule.value.isascii()
    assert len(capsule.value) == min(len(reason), 1024)


def test_those_who_do_not_know_tunnel_closed_skip_it() -> None:
    parser = CapsuleParser(100)
    assert parser.receive(encode_tunnel_closed("gw; error=http_request_denied")) == []
    assert parser.skipped == 1
