"""Questions that every QUIC server answers, and the answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.quic.link import CLIENT, START, make_engine, server_config
from toppy.quic.aioquic_stateless import version_negotiation
from toppy.wire.version_negotiation import (
    UNKNOWN_VERSION,
    encode_version_probe,
    parse_version_negotiation,
)

IDS = st.binary(min_size=8, max_size=20)
OWN, OTHER = b"own-id-8", b"other-id"


@given(st.integers(1200, 9000), IDS, IDS)
def test_a_probe_has_the_size_and_the_ids_asked_for(size: int, other: bytes, own: bytes) -> None:
    probe = encode_version_probe(size, other, own)
    assert len(probe) == size
    assert probe[1:5] == UNKNOWN_VERSION.to_bytes(4)
    answer = version_negotiation(probe)
    assert answer is not None
    parsed = parse_version_negotiation(answer)
    assert parsed is not None
    assert (parsed.destination_id, parsed.source_id) == (own, other)
    assert 1 in parsed.versions


@pytest.mark.parametrize("engine", ["native", "aioquic"])
@pytest.mark.parametrize("size", [1200, 1472])
def test_both_engines_answer_a_probe_at_once(engine: str, size: int) -> None:
    server = make_engine(engine, server_config())
    server.receive(encode_version_probe(size, OTHER, OWN), 0, CLIENT, START)
    ((data, _, address),) = server.poll_transmits(START)
    assert address == CLIENT
    answer = parse_version_negotiation(data)
    assert answer is not None
    assert answer.destination_id == OWN
    assert not server.poll_events()


@pytest.mark.parametrize(
    ("size", "other", "own"), [(1199, OTHER, OWN), (1200, b"short", OWN), (1200, OTHER, bytes(21))]
)
def test_what_no_server_would_answer_is_refused(size: int, other: bytes, own: bytes) -> None:
    with pytest.raises(ValueError, match="probe"):
        encode_version_probe(size, other, own)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_none(data: bytes) -> None:
    parsed = parse_version_negotiation(data)
    if parsed is not None:
        assert data[0] & 0x80
        assert data[1:5] == bytes(4)
        assert parsed.versions


@given(st.binary(max_size=20), st.binary(max_size=20), st.integers(0, 30))
def test_an_answer_that_is_cut_off_is_none(own: bytes, other: bytes, cut: int) -> None:
    whole = (
        b"\x80" + bytes(4) + bytes([len(own)]) + own + bytes([len(other)]) + other + bytes(4) * 2
    )
    assert parse_version_negotiation(whole) is not None
    if cut % 4:
        part = whole[: max(0, len(whole) - cut)]
        head = len(whole) - 8
        parsed = parse_version_negotiation(part)
        assert parsed is None or (len(part) - head) % 4 == 0 or len(part) < head
