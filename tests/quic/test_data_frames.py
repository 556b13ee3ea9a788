"""DATA frames: our parser against aioquic's, and against anything."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic import events as quic_events
from hypothesis import given
from hypothesis import strategies as st

from toppy.quic.data_frames import encode_data_header, split_data_frames
from toppy.quic.engine import Engine, StreamDataReceived
from toppy.quic.h3 import Http3Session, _QuicFacade
from toppy.wire.varint import encode_varint


class StubEngine:
    """Takes everything and says nothing."""

    def __init__(self) -> None:
        self._next = 3
        self.sent: list[tuple[int, bytes, bool]] = []

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int:
        self._next += 4
        return self._next

    def supports_datagrams(self, connection: int) -> bool:
        return True

    def send_stream(self, connection: int, stream_id: int, data: Any, *, end: bool = False) -> None:
        self.sent.append((stream_id, bytes(data), end))

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_options: None


def frame(content: bytes) -> bytes:
    return encode_data_header(len(content)) + content


@pytest.mark.parametrize("length", [0, 1, 63, 64, 16383, 16384, 65536, 256 * 1024, (1 << 30) - 1])
def test_a_header_says_type_and_length_in_the_shortest_form(length: int) -> None:
    assert encode_data_header(length) == b"\x00" + encode_varint(length)


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 400))
def test_content_is_the_same_in_any_chunks(contents: list[bytes], chunk: int) -> None:
    stream = b"".join(map(frame, contents))
    found, kept, left = b"", b"", 0
    for start in range(0, len(stream), chunk):
        data = kept + stream[start : start + chunk]
        content, left, used = split_data_frames(data, left)
        found, kept = found + content, data[used:]
    assert (found, kept, left) == (b"".join(contents), b"", 0)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_anything_is_taken_up_to_the_first_other_frame(data: bytes, left: int) -> None:
    content, rest, used = split_data_frames(data, left)
    assert 0 <= used <= len(data)
    assert len(content) <= used
    assert rest == 0 or used == len(data)
    if used < len(data):
        other_type = data[used] != 0
        cut_header = len(data) - used < 9
        assert other_type or cut_header


def test_a_chunk_inside_a_frame_is_handed_on_as_it_is() -> None:
    data = bytes(100)
    content, left, used = split_data_frames(data, 1000)
    assert content is data
    assert (left, used) == (900, 100)


def test_every_form_of_a_length_is_read() -> None:
    for header in (
        b"\x00\x02",
        b"\x00\x40\x02",
        b"\x00\x80\x00\x00\x02",
        b"\x00\xc0" + bytes(6) + b"\x02",
    ):
        assert split_data_frames(header + b"hi", 0) == (b"hi", 0, len(header) + 2)
        for cut in range(1, len(header)):
            assert split_data_frames(header[:cut], 0) == (b"", 0, 0)


def headers_frame() -> bytes:
    """A request as aioquic encodes it."""
    engine = StubEngine()
    session = Http3Session(cast(Engine, engine), 1, set(), is_client=True, max_header_bytes=16384)
    engine.sent.clear()
    engine._next = -4
    session.open_request(
        [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", b"gw"),
            (b":path", b"/"),
        ]
    )
    return engine.sent[-1][1]


HEADERS = headers_frame()


def by_aioquic(chunks: list[bytes], *, ended: bool) -> tuple[bytes, bool, bool]:
    """(content, whether the end was told, whether the connection was closed)."""
    facade = _QuicFacade(cast(Engine, StubEngine()), 1, is_client=False)
    h3 = H3Connection(facade)  # type: ignore[arg-type]
    found: list[Any] = []
    for index, data in enumerate(chunks):
        is_last = index == len(chunks) - 1
        found += h3.handle_event(
            quic_events.StreamDataReceived(data=data, end_stream=ended and is_last, stream_id=0)
        )
    return _sum_up(found, facade.closing is not None)


def by_us(chunks: list[bytes], *, ended: bool) -> tuple[bytes, bool, bool]:
    engine = cast(Engine, StubEngine())
    session = Http3Session(engine, 1, set(), is_client=False, max_header_bytes=16384)
    found: list[Any] = []
    for index, data in enumerate(chunks):
        is_last = index == len(chunks) - 1
        found += session.receive(StreamDataReceived(1, 0, data, ended=ended and is_last))
        if session.closing is not None:
            break
    return _sum_up(found, session.closing is not None)


def _sum_up(found: list[Any], is_closed: bool) -> tuple[bytes, bool, bool]:
    content = b"".join(e.data for e in found if isinstance(e, DataReceived))
    ended = any(e.stream_ended for e in found if isinstance(e, DataReceived | HeadersReceived))
    return content, ended, is_closed


pieces = st.one_of(
    st.binary(max_size=100).map(frame),
    st.tuples(st.sampled_from([0x21, 0x40, 0x4321, 0x1F * 7 + 0x21]), st.binary(max_size=40)).map(
        lambda it: encode_varint(it[0]) + encode_varint(len(it[1])) + it[1]
    ),
    st.sampled_from([b"\x40\x00\x01z", b"\x04\x00", b"\x01\x00", b"\x02\x00", b"\x00\x7f"]),
)


@given(st.lists(pieces, max_size=6), st.integers(1, 200), st.booleans())
def test_a_request_stream_reads_like_aioquic_reads_it(
    frames: list[bytes], chunk: int, ended: bool
) -> None:
    body = b"".join(frames)
    chunks = [HEADERS, *(body[i : i + chunk] for i in range(0, len(body), chunk))]
    if ended and len(chunks) == 1:
        chunks.append(b"")
    ours, theirs = by_us(chunks, ended=ended), by_aioquic(chunks, ended=ended)
    assert ours[1:] == theirs[1:]
    # where the connection ends for a forbidden frame, we may have handed on what came before it
    assert ours[0].startswith(theirs[0]) if ours[2] else ours[0] == theirs[0]


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_garbage_behind_a_request_ends_as_with_aioquic(chunks: list[bytes]) -> None:
    chunks = [HEADERS, *(each for each in chunks if each)]
    ours, theirs = by_us(chunks, ended=False), by_aioquic(chunks, ended=False)
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("size", [1, 63, 4096, 4097, 65536])
def test_a_body_goes_out_as_one_data_frame(size: int) -> None:
    engine = StubEngine()
    session = Http3Session(cast(Engine, engine), 1, set(), is_client=False, max_header_bytes=16384)
    session.receive(StreamDataReceived(1, 0, HEADERS, ended=False))
    session.send_headers(0, [(b":status", b"200")], end=False)
    engine.sent.clear()
    body = bytes(range(256)) * 257
    session.send_data(0, memoryview(body)[:size], end=True)
    assert {stream for stream, _, _ in engine.sent} == {0}
    assert b"".join(data for _, data, _ in engine.sent) == frame(body[:size])
    assert [end for _, _, end in engine.sent] == [False] * (len(engine.sent) - 1) + [True]
    engine.sent.clear()
    session.send_data(0, b"too late", end=False)
    assert engine.sent == []


def test_an_end_alone_goes_out_without_a_frame() -> None:
    engine = StubEngine()
    session = Http3Session(cast(Engine, engine), 1, set(), is_client=False, max_header_bytes=16384)
    session.receive(StreamDataReceived(1, 0, HEADERS, ended=False))
    session.send_data(0, b"before the answer", end=False)
    session.send_headers(0, [(b":status", b"200")], end=False)
    engine.sent.clear()
    session.send_data(0, b"", end=False)
    session.send_data(0, b"", end=True)
    assert engine.sent == [(0, b"", True)]
