"""One TCP tunnel: payload both ways, FIN and RST told apart, in both framings and on both ends."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.errors import DatagramError, LocalError, PeerError, ResourceLimitError
from toppy.protocol.stream_tunnel import RESET_CODE, StreamTunnel, TruncatedStreamError
from toppy.wire.capsule import (
    AUTHORIZATION,
    BARRIER,
    DATAGRAM,
    TUNNEL_CLOSED,
    WRAP_UP,
    encode_authorization,
    encode_barrier,
    encode_capsule,
    encode_tunnel_closed,
    encode_wrap_up,
)
from toppy.wire.connect_tcp import DATA, FINAL_DATA, HEADROOM_BYTES, StreamFraming
from toppy.wire.varint import MAX_VARINT, encode_varint

CAPSULES, RAW = StreamFraming.CAPSULES, StreamFraming.RAW
FRAMINGS = pytest.mark.parametrize("framing", [CAPSULES, RAW], ids=lambda framing: framing.value)
H3_MESSAGE_ERROR = 0x10E


def opened(framing: StreamFraming = CAPSULES, *, is_client: bool = False) -> StreamTunnel:
    tunnel = StreamTunnel(framing, is_client=is_client, hold_bytes=1000)
    assert tunnel.open() == []
    return tunnel


def data(payload: bytes) -> bytes:
    return encode_capsule(DATA, payload)


def final(payload: bytes = b"") -> bytes:
    return encode_capsule(FINAL_DATA, payload)


def received(tunnel: StreamTunnel, body: bytes, *, ended: bool = False) -> bytes:
    return b"".join(tunnel.receive_body(body, ended=ended))


class TestPayload:
    @FRAMINGS
    def test_what_one_end_sends_the_other_writes(self, framing: StreamFraming) -> None:
        one, other = opened(framing), opened(framing, is_client=True)
        assert received(other, bytes(one.send(b"to the client"))) == b"to the client"
        assert received(one, bytes(other.send(b"to the target"))) == b"to the target"

    @settings(deadline=None)
    @given(
        st.sampled_from([CAPSULES, RAW]),
        st.lists(st.binary(max_size=40), max_size=10),
        st.lists(st.integers(1, 30), max_size=40),
    )
    def test_any_split_of_the_body_gives_the_same(
        self, framing: StreamFraming, payloads: list[bytes], chunks: list[int]
    ) -> None:
        sender, receiver = opened(framing), opened(framing, is_client=True)
        body = b"".join(bytes(sender.send(payload)) for payload in payloads) + sender.finish()
        written = b""
        for size in chunks:
            written += received(receiver, body[:size])
            body = body[size:]
        written += received(receiver, body, ended=True)
        assert written == b"".join(payloads)
        assert receiver.has_peer_finished

    @FRAMINGS
    def test_a_placed_payload_is_the_same_body_without_a_copy(self, framing: StreamFraming) -> None:
        buffer = bytearray(HEADROOM_BYTES + 300)
        for size in (0, 1, 63, 64, 300):
            buffer[HEADROOM_BYTES : HEADROOM_BYTES + size] = bytes(range(1, 256))[:size].ljust(size)
            payload = bytes(buffer[HEADROOM_BYTES : HEADROOM_BYTES + size])
            body = opened(framing).send_placed(memoryview(buffer), size)
            assert body.obj is buffer
            assert body == opened(framing).send(payload)

    def test_raw_payload_goes_on_as_the_same_object(self) -> None:
        chunk = bytes(65536)
        tunnel = opened(RAW)
        assert tunnel.send(chunk) is chunk
        assert tunnel.receive_body(chunk, ended=False)[0] is chunk

    def test_a_body_inside_a_capsule_goes_on_as_the_same_object(self) -> None:
        tunnel = opened()
        tunnel.receive_body(encode_varint(DATA) + encode_varint(MAX_VARINT), ended=False)
        chunk = bytes(65536)
        assert tunnel.receive_body(chunk, ended=False)[0] is chunk

    def test_a_large_body_with_one_capsule_costs_as_many_calls_as_a_small_one(self) -> None:
        def calls(size: int) -> int:
            tunnel, body = opened(), data(bytes(size))
            count = 0

            def trace(*_: object) -> None:
                nonlocal count
                count += 1

            before = sys.getprofile()
            sys.setprofile(trace)
            try:
                tunnel.receive_body(body, ended=False)
            finally:
                sys.setprofile(before)
            return count

        assert calls(262_144) == calls(16_384)

    @FRAMINGS
    def test_an_empty_payload_is_no_body(self, framing: StreamFraming) -> None:
        assert opened(framing).send(b"") == b""

    def test_an_empty_capsule_is_no_payload_and_no_end(self) -> None:
        tunnel = opened()
        assert tunnel.receive_body(data(b""), ended=False) == []
        assert not tunnel.has_peer_finished


class TestEnds:
    def test_final_data_is_a_fin_behind_its_payload(self) -> None:
        tunnel = opened()
        assert received(tunnel, data(b"ab") + final(b"c")) == b"abc"
        assert tunnel.has_peer_finished

    def test_half_of_final_data_is_no_fin(self) -> None:
        tunnel = opened()
        body = final(b"abc")
        assert received(tunnel, body[:-1]) == b"ab"
        assert not tunnel.has_peer_finished
        assert received(tunnel, body[-1:]) == b"c"
        assert tunnel.has_peer_finished

    def test_the_end_of_a_raw_stream_is_a_fin(self) -> None:
        tunnel = opened(RAW)
        assert received(tunnel, b"last", ended=True) == b"last"
        assert tunnel.has_peer_finished

    @FRAMINGS
    def test_one_direction_goes_on_after_the_other_has_finished(
        self, framing: StreamFraming
    ) -> None:
        one, other = opened(framing), opened(framing, is_client=True)
        fin = one.finish()
        assert received(other, fin, ended=one.take_end()) == b""
        assert other.has_peer_finished
        assert received(one, bytes(other.send(b"still here"))) == b"still here"
        fin = other.finish()
        assert received(one, fin, ended=other.take_end()) == b""
        assert one.has_peer_finished

    def test_a_stream_of_capsules_ends_when_both_directions_have_finished(self) -> None:
        tunnel = opened()
        tunnel.finish()
        assert not tunnel.take_end()
        tunnel.receive_body(final(), ended=False)
        assert tunnel.take_end()
        assert not tunnel.take_end()

    def test_a_stream_of_capsules_does_not_end_before_our_side_has_finished(self) -> None:
        tunnel = opened()
        tunnel.receive_body(final(), ended=False)
        assert not tunnel.take_end()
        tunnel.finish()
        assert tunnel.take_end()

    def test_a_raw_stream_ends_with_our_side(self) -> None:
        tunnel = opened(RAW)
        assert not tunnel.take_end()
        assert tunnel.finish() == b""
        assert tunnel.take_end()
        assert not tunnel.take_end()

    @FRAMINGS
    def test_nothing_is_sent_after_finishing(self, framing: StreamFraming) -> None:
        tunnel = opened(framing)
        tunnel.finish()
        assert tunnel.has_finished
        with pytest.raises(LocalError):
            tunnel.send(b"x")
        with pytest.raises(LocalError):
            tunnel.send_placed(memoryview(bytearray(20)), 1)
        with pytest.raises(LocalError):
            tunnel.finish()

    @FRAMINGS
    def test_nothing_is_received_after_the_end(self, framing: StreamFraming) -> None:
        tunnel = opened(framing)
        tunnel.receive_body(final(), ended=True)
        with pytest.raises(LocalError):
            tunnel.receive_body(b"", ended=False)


class TestBrokenStreams:
    @pytest.mark.parametrize("body", [b"", data(b"abc")], ids=["nothing", "data"])
    def test_a_stream_that_ends_without_final_data_is_truncated(self, body: bytes) -> None:
        tunnel = opened()
        with pytest.raises(TruncatedStreamError) as truncated:
            tunnel.receive_body(body, ended=True)
        assert truncated.value.h3_error_code == RESET_CODE == 0x10F
        assert not tunnel.has_peer_finished

    @pytest.mark.parametrize(
        "after",
        [data(b"x"), final(b"x"), data(b""), final(b"")],
        ids=["data", "final data", "empty data", "empty final data"],
    )
    @pytest.mark.parametrize("is_split", [False, True])
    def test_nothing_may_follow_final_data(self, after: bytes, is_split: bool) -> None:
        tunnel = opened()
        bodies = [final(), after] if is_split else [final() + after]
        with pytest.raises(PeerError, match="follow FINAL_DATA") as broken:
            for body in bodies:
                tunnel.receive_body(body, ended=False)
        assert broken.value.h3_error_code == H3_MESSAGE_ERROR

    @pytest.mark.parametrize("cut", range(1, len(final(b"abc"))))
    def test_a_capsule_that_the_end_cuts_off_is_malformed(self, cut: int) -> None:
        with pytest.raises(PeerError, match="middle of a capsule"):
            opened().receive_body(final(b"abc")[:cut], ended=True)

    def test_a_capsule_may_claim_any_length_and_holds_nothing(self) -> None:
        tunnel = opened()
        body = encode_varint(DATA) + encode_varint(MAX_VARINT) + b"abc"
        assert received(tunnel, body) == b"abc"
        assert tunnel.held_bytes == 0

    def test_datagrams_have_no_meaning_here(self) -> None:
        with pytest.raises(DatagramError):
            opened().receive_body(encode_capsule(DATAGRAM, b"\x00x"), ended=False)

    def test_unknown_capsules_are_skipped_and_counted_even_after_final_data(self) -> None:
        tunnel = opened()
        unknown = encode_capsule(0x2F37, bytes(5000))
        body = data(b"a") + unknown + encode_barrier() + data(b"b") + final() + unknown
        assert received(tunnel, body, ended=True) == b"ab"
        assert tunnel.skipped == 3

    @settings(deadline=None)
    @given(
        st.sampled_from([CAPSULES, RAW]),
        st.booleans(),
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.builds(
                    encode_capsule,
                    st.sampled_from(
                        [DATA, FINAL_DATA, DATAGRAM, WRAP_UP, TUNNEL_CLOSED, BARRIER, AUTHORIZATION]
                    ),
                    st.binary(max_size=20),
                ),
            ),
            max_size=10,
        ),
        st.booleans(),
    )
    def test_any_body_is_taken_or_refused_with_the_documented_errors(
        self, framing: StreamFraming, is_client: bool, bodies: list[bytes], ended: bool
    ) -> None:
        tunnel = opened(framing, is_client=is_client)
        try:
            for body in bodies:
                tunnel.receive_body(body, ended=False)
            tunnel.receive_body(b"", ended=ended)
        except PeerError:
            return
        assert tunnel.has_peer_finished or not ended

    @settings(deadline=None)
    @given(
        st.lists(
            st.sampled_from([data(b"abc"), data(b""), final(b"z"), encode_wrap_up(), b"\x40"]),
            max_size=6,
        ),
        st.lists(st.integers(1, 9), max_size=20),
    )
    def test_a_body_is_refused_or_taken_whatever_its_split(
        self, bodies: list[bytes], chunks: list[int]
    ) -> None:
        def outcome(parts: list[bytes]) -> str:
            tunnel = opened(is_client=True)
            try:
                for part in parts:
                    tunnel.receive_body(part, ended=False)
                tunnel.receive_body(b"", ended=True)
            except PeerError as error:
                return str(error)
            return "taken"

        body = b"".join(bodies)
        split, rest = [], body
        for size in chunks:
            split.append(rest[:size])
            rest = rest[size:]
        assert outcome([*split, rest]) == outcome([body])


class TestEarlyPayload:
    @FRAMINGS
    def test_payload_before_the_answer_is_held_in_order(self, framing: StreamFraming) -> None:
        tunnel = StreamTunnel(framing, is_client=False, hold_bytes=1000)
        client = opened(framing, is_client=True)
        assert tunnel.receive_body(bytes(client.send(b"early ")), ended=False) == []
        last = bytes(client.send(b"bird")) + client.finish()
        assert tunnel.receive_body(last, ended=framing is RAW) == []
        held, had_finished = tunnel.held_bytes, tunnel.has_peer_finished
        assert (held, had_finished) == (10, False)
        assert tunnel.open() == [b"early bird"]
        assert (tunnel.held_bytes, tunnel.has_peer_finished) == (0, True)

    @FRAMINGS
    def test_no_more_is_held_than_was_agreed(self, framing: StreamFraming) -> None:
        tunnel = StreamTunnel(framing, is_client=False, hold_bytes=10)
        client = opened(framing, is_client=True)
        tunnel.receive_body(bytes(client.send(bytes(10))), ended=False)
        with pytest.raises(ResourceLimitError, match="at most 10 wait"):
            tunnel.receive_body(bytes(client.send(b"x")), ended=False)


class TestNotices:
    def test_a_client_learns_that_the_gateway_wraps_up_and_why_it_closed(self) -> None:
        tunnel = opened(is_client=True)
        tunnel.receive_body(encode_wrap_up(), ended=False)
        assert tunnel.is_wrapping_up
        with pytest.raises(TruncatedStreamError):
            tunnel.receive_body(encode_tunnel_closed("gw; error=x"), ended=True)
        assert tunnel.closed_because == "gw; error=x"

    def test_a_gateway_learns_a_newer_token(self) -> None:
        tunnel = opened()
        body = data(b"a") + encode_authorization("newer") + data(b"b")
        assert received(tunnel, body) == b"ab"
        assert tunnel.authorization == "newer"

    @pytest.mark.parametrize(
        ("is_client", "capsule"),
        [
            (False, encode_wrap_up()),
            (True, encode_wrap_up() * 2),
            (True, encode_capsule(WRAP_UP, b"x")),
            (True, encode_capsule(TUNNEL_CLOSED, bytes(1025))),
            (False, encode_capsule(AUTHORIZATION, bytes(8193))),
        ],
        ids=["of a client", "twice", "with a value", "too long a reason", "too long a token"],
    )
    def test_a_notice_that_may_not_be_is_refused(self, is_client: bool, capsule: bytes) -> None:
        with pytest.raises(PeerError):
            opened(is_client=is_client).receive_body(capsule, ended=False)

    def test_notices_for_the_other_end_are_unknown(self) -> None:
        client, gateway = opened(is_client=True), opened()
        client.receive_body(encode_authorization("x"), ended=False)
        gateway.receive_body(encode_tunnel_closed("x"), ended=False)
        assert client.authorization is gateway.closed_because is None

    def test_raw_streams_have_no_notices(self) -> None:
        tunnel = opened(RAW, is_client=True)
        assert received(tunnel, encode_wrap_up()) == encode_wrap_up()
        assert not tunnel.is_wrapping_up
