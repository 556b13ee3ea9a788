"""One relay between a socket and a stream, both played by the test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest

from tests.net.fake_socket import FakeSocket
from toppy.errors import PeerError
from toppy.net.stream_relay import HIGH_WATER_BYTES, StreamRelay
from toppy.protocol.stream_tunnel import RESET_CODE, Buffer, StreamTunnel, TruncatedStreamError
from toppy.quic.endpoint import BodyReceived, Endpoint, StreamAborted
from toppy.wire.capsule import encode_authorization
from toppy.wire.connect_tcp import HEADROOM_BYTES, StreamFraming


@dataclass
class FakeEndpoint:
    """What a relay does with its stream."""

    body: bytearray = field(default_factory=bytearray)
    has_ended: bool = False
    aborted: int | None = None
    is_paused: bool = True
    backlog: int = 0
    wanted_below: int | None = None

    def send_body(
        self, connection: int, stream_id: int, data: Buffer, *, end: bool = False
    ) -> None:
        assert (connection, stream_id) == (7, 8)
        assert not self.has_ended
        self.body += data
        self.has_ended = end

    def stream_backlog_bytes(self, connection: int, stream_id: int) -> int:
        return self.backlog

    def notify_writable(self, connection: int, stream_id: int, below_bytes: int) -> None:
        self.wanted_below = below_bytes

    def pause_reading(self, connection: int, stream_id: int) -> None:
        self.is_paused = True

    def resume_reading(self, connection: int, stream_id: int) -> None:
        self.is_paused = False

    def abort_stream(self, connection: int, stream_id: int, error_code: int) -> None:
        self.aborted = error_code


class Stage:
    """A relay that has begun, and the other end of its stream. It is its owner, too."""

    def __init__(self, framing: StreamFraming, room: int = 1 << 30, *, begins: bool = True) -> None:
        self.endpoint = FakeEndpoint()
        self.socket = FakeSocket(room)
        protocol = StreamTunnel(framing, is_client=False, hold_bytes=100)
        self.relay = StreamRelay(cast(Endpoint, self.endpoint), 7, 8, protocol, self)
        self.peer = StreamTunnel(framing, is_client=True, hold_bytes=0)
        self.peer.open()
        self.overs: list[tuple[str, bool]] = []
        self.counts = [0, 0]
        self.flushes = 0
        self._seen = 0
        if begins:
            self.relay.begin(self.socket)

    def moved(self, to_socket: int, to_stream: int) -> None:
        self.counts[0] += to_socket
        self.counts[1] += to_stream

    def over(self, reason: str, *, in_order: bool) -> None:
        self.overs.append((reason, in_order))
        self.relay.release()

    def flush(self) -> None:
        self.flushes += 1

    def from_stream(self, data: Buffer, *, ended: bool = False) -> None:
        self.relay.receive_body(BodyReceived(7, 8, bytes(data), ended))

    def peer_finishes(self) -> None:
        last = self.peer.finish()
        self.from_stream(last, ended=self.peer.take_end())

    def peer_ends(self) -> None:
        """The peer's socket is closed."""
        if self.peer.take_end():
            self.from_stream(b"", ended=True)

    def from_socket(self, payload: bytes) -> None:
        self.relay.receive(memoryview(bytearray(HEADROOM_BYTES) + payload), len(payload))

    # calls, so that mypy does not take what it has seen for what will be

    def is_paused(self) -> bool:
        return self.endpoint.is_paused

    def is_read(self) -> bool:
        return self.socket.is_reading

    def has_ended(self) -> bool:
        return self.endpoint.has_ended

    def to_peer(self) -> bytes:
        """Payload that the peer gets out of the stream since the last call."""
        data = bytes(self.endpoint.body[self._seen :])
        self._seen = len(self.endpoint.body)
        return b"".join(self.peer.receive_body(data, ended=self.endpoint.has_ended))


@pytest.fixture(params=list(StreamFraming), ids=lambda framing: framing.name.lower())
def framing(request: pytest.FixtureRequest) -> StreamFraming:
    found: StreamFraming = request.param
    return found


def test_payload_goes_both_ways_and_is_counted(framing: StreamFraming) -> None:
    on = Stage(framing)
    assert on.is_read()
    assert not on.is_paused()
    on.from_stream(on.peer.send(b"question"))
    assert on.socket.written == b"question"
    on.from_socket(b"answer!")
    assert on.to_peer() == b"answer!"
    assert on.counts == [8, 7]
    assert on.flushes == 1


def test_what_came_before_the_beginning_is_written_first(framing: StreamFraming) -> None:
    on = Stage(framing, begins=False)
    on.from_stream(on.peer.send(b"early "))
    on.relay.begin(on.socket)
    on.from_stream(on.peer.send(b"late"))
    assert on.socket.written == b"early late"


def test_what_was_read_before_the_beginning_is_sent_first(framing: StreamFraming) -> None:
    on = Stage(framing)
    on.relay.send(b"early ")
    on.relay.send(b"")
    on.from_socket(b"late")
    assert on.to_peer() == b"early late"
    assert on.counts == [0, 10]


def test_a_socket_that_takes_no_more_pauses_the_stream_until_it_has_drained(
    framing: StreamFraming,
) -> None:
    on = Stage(framing, room=3)
    on.from_stream(on.peer.send(b"12345"))
    assert on.is_paused()
    on.from_stream(on.peer.send(b"678"))  # was on its way
    on.socket.room = 1 << 30
    on.relay.drained()
    assert not on.is_paused()
    assert on.socket.written == b"12345678"


def test_a_stream_that_is_full_pauses_the_socket_until_it_has_room(framing: StreamFraming) -> None:
    on = Stage(framing)
    on.endpoint.backlog = HIGH_WATER_BYTES - 1
    on.from_socket(b"x")
    assert on.is_read()
    on.endpoint.backlog = HIGH_WATER_BYTES
    on.from_socket(b"x")
    assert not on.is_read()
    assert on.endpoint.wanted_below == HIGH_WATER_BYTES // 2
    on.relay.receive_writable()
    assert on.is_read()


def test_in_capsules_it_is_over_when_the_other_end_has_closed_its_socket() -> None:
    on = Stage(StreamFraming.CAPSULES)
    on.relay.receive_end()
    on.to_peer()
    assert on.peer.has_peer_finished
    assert not on.has_ended()  # it could not tell of a reset any more
    on.peer_finishes()
    assert on.has_ended()
    assert on.socket.events == ["finish", "close"]
    on.peer_ends()
    assert on.overs == [("both sides ended it", True)]


def test_in_capsules_the_last_to_finish_waits_for_the_others_end() -> None:
    on = Stage(StreamFraming.CAPSULES)
    on.peer_finishes()
    assert on.socket.events == ["finish"]
    on.from_socket(b"last")
    on.relay.receive_end()
    assert on.has_ended()
    assert on.socket.events == ["finish", "close"]
    assert on.overs == []  # the last bytes are on their way, and need this connection
    assert on.to_peer() == b"last"
    on.peer_ends()
    assert on.overs == [("both sides ended it", True)]
    assert on.socket.events == ["finish", "close"]


def test_a_raw_stream_ends_by_its_directions() -> None:
    on = Stage(StreamFraming.RAW)
    on.relay.receive_end()
    assert on.has_ended()
    on.from_stream(b"still here")
    assert on.overs == []
    on.peer_finishes()
    assert on.socket.written == b"still here"
    assert on.socket.events == ["finish", "close"]
    assert on.overs == [("both sides ended it", True)]


def test_the_end_is_not_passed_on_before_everything_is_written(framing: StreamFraming) -> None:
    on = Stage(framing, room=0)
    on.from_stream(on.peer.send(b"payload"))
    on.peer_finishes()
    on.relay.receive_end()
    assert on.socket.events == []
    # the end of a stream in capsules says that the socket has taken everything
    assert on.has_ended() == (framing is StreamFraming.RAW)
    on.socket.room = 1 << 30
    on.relay.drained()
    assert on.socket.events == ["finish", "close"]
    assert on.has_ended()


def test_capsules_behind_the_payload_are_heard_also_after_the_socket_was_full() -> None:
    on = Stage(StreamFraming.CAPSULES, room=0)
    on.from_stream(on.peer.send(b"payload"))
    on.peer_finishes()
    assert on.is_paused()
    on.socket.room = 1 << 30
    on.relay.drained()
    assert not on.is_paused()
    on.from_stream(encode_authorization("newer"))
    assert on.relay.protocol.authorization == "newer"


def test_a_socket_that_breaks_resets_the_stream(framing: StreamFraming) -> None:
    on = Stage(framing)
    on.relay.receive_failure("Connection reset by peer")
    assert on.endpoint.aborted == RESET_CODE
    assert on.overs == [("Connection reset by peer", False)]
    assert on.socket.events == ["reset"]


def test_a_socket_that_broke_when_it_was_to_end_did_not_end_in_order(
    framing: StreamFraming,
) -> None:
    on = Stage(framing)
    on.socket.can_finish = False
    on.peer_finishes()
    assert on.overs == []
    on.relay.receive_failure("Connection reset by peer")
    assert on.overs == [("Connection reset by peer", False)]
    assert on.endpoint.aborted == RESET_CODE


def test_a_reset_behind_the_end_of_both_directions_is_none(framing: StreamFraming) -> None:
    on = Stage(framing)
    on.socket.can_finish = False
    on.relay.receive_end()  # it has said all, and gone
    on.to_peer()
    on.from_stream(on.peer.send(b"close notify"))
    on.peer_finishes()
    on.peer_ends()
    assert on.overs == [("both sides ended it", True)]
    assert on.endpoint.aborted is None


def test_a_peer_that_gives_up_what_is_finished_ends_nothing(framing: StreamFraming) -> None:
    on = Stage(framing)
    stops, resets = StreamAborted(7, 8, RESET_CODE, True), StreamAborted(7, 8, RESET_CODE)
    assert on.relay.is_over_with(stops)
    on.relay.receive_end()
    assert not on.relay.is_over_with(stops)
    assert on.relay.is_over_with(resets)


def test_a_stream_that_is_cut_off_is_an_error_and_no_end() -> None:
    on = Stage(StreamFraming.CAPSULES)
    with pytest.raises(TruncatedStreamError):
        on.from_stream(on.peer.send(b"payload"), ended=True)
    assert on.socket.events == []
    on.relay.release()
    assert on.socket.events == ["reset"]


def test_payload_behind_the_end_is_an_error() -> None:
    on = Stage(StreamFraming.CAPSULES)
    on.from_stream(StreamTunnel(StreamFraming.CAPSULES, is_client=True, hold_bytes=0).finish())
    with pytest.raises(PeerError):
        on.from_stream(on.peer.send(b"more"))


def test_released_before_the_beginning_or_twice_nothing_happens(framing: StreamFraming) -> None:
    on = Stage(framing, begins=False)
    on.relay.release()
    on.relay.begin(on.socket)
    on.relay.release()
    on.relay.release()
    on.relay.receive_writable()
    on.relay.drained()
    on.from_stream(on.peer.send(b"late"))
    assert on.socket.events == ["reset"]
