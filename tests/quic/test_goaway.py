"""GOAWAY: found in any chunks, obeyed on both ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.quic.certificates import SERVER_NAME
from tests.quic.link import CLIENT, SERVER, START, client_config, make_engine, server_config
from toppy.errors import PeerError
from toppy.quic.endpoint import (
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    GoawayReceived,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.engine import Engine, StreamDataReceived
from toppy.quic.goaway import GoawayFrameError, GoawayIdError, GoawayReader, encode_goaway
from toppy.quic.h3 import H3_REQUEST_REJECTED, Http3Session
from toppy.wire.connect_udp import response_headers
from toppy.wire.varint import encode_varint

CONTROL_TYPE = b"\x00"
SETTINGS = b"\x04\x00"
REQUEST = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"gw"),
    (b":path", b"/"),
]


def read_in_chunks(reader: GoawayReader, stream: bytes, chunk: int) -> list[int]:
    found = []
    for start in range(0, len(stream), chunk):
        found += reader.receive(stream[start : start + chunk])
    return found


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("goaway"), st.integers(0, (1 << 60) - 1)),
            st.tuples(st.integers(0x21, 1 << 61), st.binary(max_size=80)),
        ),
        max_size=6,
    ),
    st.integers(1, 40),
)
def test_goaway_frames_are_found_between_any_others_in_any_chunks(
    frames: list[tuple[Any, Any]], chunk: int
) -> None:
    ids = sorted((4 * number for kind, number in frames if kind == "goaway"), reverse=True)
    left = iter(ids)
    stream = CONTROL_TYPE + SETTINGS
    for kind, value in frames:
        if kind == "goaway":
            stream += encode_goaway(next(left))
        else:
            stream += encode_varint(kind) + encode_varint(len(value)) + value
    assert read_in_chunks(GoawayReader(is_client=True), stream, chunk) == ids


@given(st.lists(st.binary(max_size=40), max_size=20), st.booleans())
def test_garbage_is_skipped_or_refused_with_the_documented_error(
    chunks: list[bytes], is_client: bool
) -> None:
    reader = GoawayReader(is_client=is_client)
    try:
        for chunk in chunks:
            reader.receive(chunk)
    except (GoawayFrameError, GoawayIdError):
        pass


@pytest.mark.parametrize(
    "frame", [b"\x07\x00", b"\x07\x09" + bytes(9), b"\x07\x02\x00\x00", b"\x07\x01\x40"]
)
@pytest.mark.parametrize("chunk", [1, 100])
def test_a_goaway_that_is_not_exactly_one_integer_is_a_frame_error(
    frame: bytes, chunk: int
) -> None:
    with pytest.raises(GoawayFrameError) as refused:
        read_in_chunks(GoawayReader(is_client=True), CONTROL_TYPE + frame, chunk)
    assert refused.value.h3_error_code == 0x106


def test_a_goaway_may_repeat_or_lower_its_id_but_not_raise_it() -> None:
    reader = GoawayReader(is_client=True)
    assert reader.receive(CONTROL_TYPE + encode_goaway(8) + encode_goaway(8)) == [8, 8]
    assert reader.receive(encode_goaway(4)) == [4]
    with pytest.raises(GoawayIdError) as refused:
        reader.receive(encode_goaway(8))
    assert refused.value.h3_error_code == 0x108


def test_a_gateway_names_request_streams_a_client_names_pushes() -> None:
    with pytest.raises(GoawayIdError):
        GoawayReader(is_client=True).receive(CONTROL_TYPE + encode_goaway(5))
    assert GoawayReader(is_client=False).receive(CONTROL_TYPE + encode_goaway(5)) == [5]


class _StubEngine:
    def __init__(self) -> None:
        self._next = 2

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int:
        self._next += 4
        return self._next

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_options: None


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("stream_type", [b"\x00", b"\x40\x00", b"\xc0" + bytes(7)])
def test_a_session_reads_goaway_from_a_control_stream_that_comes_in_pieces(
    chunk: int, stream_type: bytes
) -> None:
    session = Http3Session(
        cast(Engine, _StubEngine()), 1, set(), is_client=True, max_header_bytes=16384
    )
    stream = stream_type + SETTINGS + b"\x21\x03\x07\x01\x00" + encode_goaway(12)
    for start in range(0, len(stream), chunk):
        session.receive(StreamDataReceived(1, 3, stream[start : start + chunk], ended=False))
    assert session.closing is None
    assert session.first_rejected == 12
    assert session.open_request(REQUEST) is None


def test_goaway_before_settings_closes_the_connection() -> None:
    session = Http3Session(
        cast(Engine, _StubEngine()), 1, set(), is_client=True, max_header_bytes=16384
    )
    session.receive(StreamDataReceived(1, 3, CONTROL_TYPE + encode_goaway(0), ended=False))
    assert session.closing is not None
    assert session.first_rejected is None


def test_a_goaway_with_a_larger_id_closes_the_connection_with_an_id_error() -> None:
    session = Http3Session(
        cast(Engine, _StubEngine()), 1, set(), is_client=True, max_header_bytes=16384
    )
    stream = CONTROL_TYPE + SETTINGS + encode_goaway(4) + encode_goaway(8)
    session.receive(StreamDataReceived(1, 3, stream, ended=False))
    assert session.closing is not None
    assert session.closing[0] == 0x108


@dataclass
class Ends:
    """Two endpoints in memory with a connection between them."""

    engines: tuple[str, str]
    now: float = START
    at_client: list[EndpointEvent] = field(default_factory=list)
    at_gateway: list[EndpointEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Endpoint(make_engine(self.engines[0], client_config()), is_client=True)
        self.gateway = Endpoint(make_engine(self.engines[1], server_config()), is_client=False)
        self.connection = self.client.connect(SERVER, SERVER_NAME, self.now)
        self.run()
        (self.accepted,) = [
            e.connection for e in self.at_gateway if isinstance(e, ConnectionOpened)
        ]

    def run(self) -> None:
        for _ in range(300):
            self.now += 0.001
            self.to_gateway()
            self.to_client()
            for endpoint in (self.client, self.gateway):
                due = endpoint.next_timeout()
                if due is not None and due <= self.now:
                    endpoint.handle_timeout(self.now)

    def to_gateway(self) -> None:
        for data, size, _ in self.client.poll_transmits(self.now):
            self.gateway.receive(data, size, CLIENT, self.now)
        self.at_gateway += self.gateway.poll_events(self.now)

    def to_client(self) -> None:
        for data, size, _ in self.gateway.poll_transmits(self.now):
            self.client.receive(data, size, SERVER, self.now)
        self.at_client += self.client.poll_events(self.now)


@pytest.fixture(params=[("aioquic", "aioquic"), ("native", "native")], ids=lambda pair: pair[0])
def ends(request: pytest.FixtureRequest) -> Ends:
    return Ends(request.param)


def test_goaway_is_told_to_the_client_which_asks_for_nothing_more(ends: Ends) -> None:
    assert ends.client.send_request(ends.connection, REQUEST) == 0
    ends.run()
    ends.gateway.send_goaway(ends.accepted)
    ends.gateway.send_goaway(ends.accepted)
    ends.run()
    told = [e for e in ends.at_client if isinstance(e, GoawayReceived)]
    assert told == [GoawayReceived(ends.connection, first_rejected=4)]
    assert ends.client.send_request(ends.connection, REQUEST) is None


def test_requests_below_the_id_are_served_and_those_above_are_rejected(ends: Ends) -> None:
    first = ends.client.send_request(ends.connection, REQUEST)
    ends.run()
    late = ends.client.send_request(ends.connection, REQUEST)
    ends.gateway.send_goaway(ends.accepted)
    ends.run()
    requests = [e.stream_id for e in ends.at_gateway if isinstance(e, HeadersReceived)]
    assert requests == [first]
    assert late is not None
    aborted = [e for e in ends.at_client if isinstance(e, StreamAborted)]
    assert aborted
    assert {(e.stream_id, e.error_code) for e in aborted} == {(late, H3_REQUEST_REJECTED)}
    ends.client.abort_stream(ends.connection, late, H3_REQUEST_REJECTED)
    assert first is not None
    ends.gateway.send_headers(ends.accepted, first, response_headers(200))
    ends.run()
    answers = [e.stream_id for e in ends.at_client if isinstance(e, HeadersReceived)]
    assert answers == [first]
    assert [e for e in ends.at_gateway if isinstance(e, StreamAborted)] == []


def test_a_connection_without_requests_may_be_sent_away(ends: Ends) -> None:
    ends.gateway.send_goaway(ends.accepted)
    ends.run()
    assert GoawayReceived(ends.connection, first_rejected=0) in ends.at_client


def test_goaway_errors_are_the_peers() -> None:
    assert issubclass(GoawayFrameError, PeerError)
    assert issubclass(GoawayIdError, PeerError)
