"""What a peer can make an HTTP/3 session hold or do, without an engine."""

from __future__ import annotations

from typing import Any, cast

from toppy.quic.engine import Engine, StreamDataReceived
from toppy.quic.h3 import H3_EXCESSIVE_LOAD, Http3Session

CONTROL = 2
SETTINGS = b"\x00\x04\x00"
"""The control stream's type, and an empty SETTINGS frame."""
EMPTY_FRAME = b"\x21\x00"


class StubEngine:
    """Takes everything and says nothing."""

    def __init__(self) -> None:
        self._next = 3
        self.stopped: list[tuple[int, int]] = []

    def open_stream(self, connection: int, *, is_unidirectional: bool = False) -> int:
        self._next += 4
        return self._next

    def supports_datagrams(self, connection: int) -> bool:
        return True

    def stop_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        self.stopped.append((stream_id, error_code))

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_options: None


def make_session() -> tuple[Http3Session, StubEngine]:
    engine = StubEngine()
    session = Http3Session(cast(Engine, engine), 1, set(), is_client=False, max_header_bytes=16384)
    session.receive(StreamDataReceived(1, CONTROL, SETTINGS, ended=False))
    assert session.has_settings
    return session, engine


def test_a_flood_of_empty_frames_on_the_control_stream_ends_the_connection() -> None:
    session, _ = make_session()
    for _ in range(255):
        session.receive(StreamDataReceived(1, CONTROL, EMPTY_FRAME * 512, ended=False))
        assert session.closing is None
    session.receive(StreamDataReceived(1, CONTROL, EMPTY_FRAME * 512, ended=False))
    session.receive(StreamDataReceived(1, CONTROL, EMPTY_FRAME * 512, ended=False))
    assert session.closing is not None
    assert session.closing[0] == H3_EXCESSIVE_LOAD


def test_a_flood_of_empty_frames_on_a_request_stream_ends_the_connection() -> None:
    session, _ = make_session()
    for _ in range(260):
        session.receive(StreamDataReceived(1, 0, EMPTY_FRAME * 512, ended=False))
    assert session.closing is not None


def test_a_header_section_is_refused_by_its_declared_length() -> None:
    session, engine = make_session()
    session.receive(StreamDataReceived(1, 0, b"\x01\x80\x00\x50\x00", ended=False))
    assert session.closing is None
    assert engine.stopped == [(0, H3_EXCESSIVE_LOAD)]


def test_a_settings_frame_of_absurd_size_ends_the_connection() -> None:
    engine = StubEngine()
    session = Http3Session(cast(Engine, engine), 1, set(), is_client=False, max_header_bytes=16384)
    session.receive(StreamDataReceived(1, CONTROL, b"\x00\x04\x80\x10\x00\x00", ended=False))
    assert session.closing is not None
    assert session.closing[0] == H3_EXCESSIVE_LOAD
