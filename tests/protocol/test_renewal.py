"""AUTHORIZATION capsules on a tunnel's stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import PeerError
from toppy.protocol.udp_tunnel import UdpTunnel
from toppy.wire.capsule import (
    AUTHORIZATION,
    MAX_AUTHORIZATION_BYTES,
    encode_authorization,
    encode_capsule,
)

tokens = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200)


def gateway() -> UdpTunnel:
    return UdpTunnel(hold_datagrams=1, hold_bytes=1)


@given(st.lists(tokens, min_size=1, max_size=4), st.integers(1, 50))
def test_the_newest_token_is_there_whatever_the_chunks(found: list[str], size: int) -> None:
    tunnel = gateway()
    data = b"".join(encode_authorization(token) for token in found)
    for start in range(0, len(data), size):
        assert tunnel.receive_body(data[start : start + size], ended=False) == []
    assert tunnel.authorization == found[-1]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_token_that_may_be_wrong(value: bytes) -> None:
    tunnel = gateway()
    tunnel.receive_body(encode_capsule(AUTHORIZATION, value), ended=False)
    assert tunnel.authorization is not None
    assert len(tunnel.authorization) == len(value)


def test_a_token_that_is_too_long_is_refused() -> None:
    data = encode_capsule(AUTHORIZATION, b"x" * (MAX_AUTHORIZATION_BYTES + 1))
    with pytest.raises(PeerError, match="AUTHORIZATION"):
        gateway().receive_body(data, ended=False)


def test_a_client_passes_it_over() -> None:
    client = UdpTunnel(hold_datagrams=0, hold_bytes=0, is_client=True)
    assert client.receive_body(encode_authorization("x"), ended=False) == []
    assert client.authorization is None
