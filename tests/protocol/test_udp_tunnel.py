"""What a tunnel holds, and how capsules become payloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import PeerError
from toppy.protocol.udp_tunnel import (
    UdpTunnel,
    count_payloads,
    encode_datagram_capsules,
    split_payloads,
)
from toppy.wire.capsule import (
    DATAGRAM,
    TUNNEL_CLOSED,
    WRAP_UP,
    encode_capsule,
    encode_tunnel_closed,
    encode_wrap_up,
)


def make_tunnel(*, datagrams: int = 4, size: int = 1000, is_client: bool = False) -> UdpTunnel:
    return UdpTunnel(hold_datagrams=datagrams, hold_bytes=size, is_client=is_client)


def test_payloads_held_before_the_tunnel_opens_come_out_in_order() -> None:
    tunnel = make_tunnel()
    assert tunnel.hold(b"aabbc", 2) == 0
    assert tunnel.hold(b"", 0) == 0
    assert tunnel.open() == [(b"aabbc", 2), (b"", 0)]
    assert tunnel.is_open
    assert tunnel.open() == []


def test_a_stretch_beyond_the_count_bound_is_dropped_whole_and_counted() -> None:
    tunnel = make_tunnel(datagrams=4)
    assert tunnel.hold(b"abc", 1) == 0
    assert tunnel.hold(b"de", 1) == 2
    assert tunnel.hold(b"d", 1) == 0
    assert tunnel.open() == [(b"abc", 1), (b"d", 1)]


def test_a_stretch_beyond_the_byte_bound_is_dropped_and_counted() -> None:
    tunnel = make_tunnel(size=10)
    assert tunnel.hold(b"x" * 11, 11) == 1
    assert tunnel.hold(b"x" * 10, 10) == 0


def test_what_was_held_is_gone_once_it_was_discarded() -> None:
    tunnel = make_tunnel()
    tunnel.hold(b"x", 1)
    assert tunnel.discard_held() == [(b"x", 1)]
    assert tunnel.open() == []


@given(st.binary(max_size=300), st.integers(1, 100), st.integers(1, 50))
def test_capsules_carry_every_payload_whatever_the_chunks(
    payloads: bytes, segment_size: int, chunk: int
) -> None:
    sent = [bytes(p) for p in split_payloads(payloads, segment_size)]
    assert len(sent) == count_payloads(len(payloads), segment_size)
    encoded = encode_datagram_capsules(payloads, segment_size)
    tunnel = make_tunnel()
    received: list[bytes] = []
    for start in range(0, len(encoded), chunk):
        received += tunnel.receive_body(encoded[start : start + chunk], ended=False)
    tunnel.receive_body(b"", ended=True)
    assert received == sent


def test_an_empty_payload_is_one_payload() -> None:
    tunnel = make_tunnel()
    assert tunnel.receive_body(encode_datagram_capsules(b"", 0), ended=True) == [b""]


def test_capsules_of_another_context_are_counted_and_dropped() -> None:
    tunnel = make_tunnel()
    assert tunnel.receive_body(encode_capsule(DATAGRAM, b"\x02data"), ended=False) == []
    assert tunnel.unknown_contexts == 1


def test_a_capsule_too_large_for_udp_is_refused_by_its_length_alone() -> None:
    tunnel = make_tunnel()
    with pytest.raises(PeerError):
        tunnel.receive_body(b"\x00\x80\x10\x00\x00", ended=False)


def test_an_end_in_the_middle_of_a_capsule_is_refused() -> None:
    tunnel = make_tunnel()
    with pytest.raises(PeerError):
        tunnel.receive_body(b"\x00\x05\x00ab", ended=True)


def test_wrap_up_tells_a_client_to_leave_and_payloads_go_on() -> None:
    tunnel = make_tunnel(is_client=True)
    body = encode_wrap_up() + encode_datagram_capsules(b"more", 0)
    assert tunnel.receive_body(body, ended=False) == [b"more"]
    assert tunnel.is_wrapping_up
    assert tunnel.closed_because is None


@pytest.mark.parametrize("body", [encode_capsule(WRAP_UP, b"x"), 2 * encode_wrap_up()])
def test_wrap_up_with_a_value_or_a_second_one_is_refused(body: bytes) -> None:
    with pytest.raises(PeerError):
        make_tunnel(is_client=True).receive_body(body, ended=False)


def test_a_gateway_refuses_wrap_up() -> None:
    with pytest.raises(PeerError):
        make_tunnel().receive_body(encode_wrap_up(), ended=False)


def test_a_client_learns_why_the_gateway_ends_its_tunnel() -> None:
    tunnel = make_tunnel(is_client=True)
    body = encode_datagram_capsules(b"last", 0) + encode_tunnel_closed("gw; error=e")
    assert tunnel.receive_body(body, ended=True) == [b"last"]
    assert tunnel.closed_because == "gw; error=e"


def test_a_reason_beyond_its_bound_is_refused_and_a_gateway_skips_reasons() -> None:
    with pytest.raises(PeerError):
        make_tunnel(is_client=True).receive_body(
            encode_capsule(TUNNEL_CLOSED, bytes(1025)), ended=False
        )
    tunnel = make_tunnel()
    assert tunnel.receive_body(encode_tunnel_closed("why"), ended=False) == []
    assert tunnel.closed_because is None


@given(st.lists(st.binary(max_size=40), max_size=20), st.booleans())
def test_garbage_is_payloads_or_a_peer_error(chunks: list[bytes], is_client: bool) -> None:
    tunnel = make_tunnel(is_client=is_client)
    try:
        for chunk in chunks:
            assert all(isinstance(p, bytes) for p in tunnel.receive_body(chunk, ended=False))
    except PeerError:
        pass
