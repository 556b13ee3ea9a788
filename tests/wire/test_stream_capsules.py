"""Capsules whose values are handed on as they come, whatever their length and the chunks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.errors import PeerError
from toppy.wire.capsule import CapsulePiece, StreamCapsuleParser, encode_capsule
from toppy.wire.varint import MAX_VARINT, encode_varint

STREAMED, WHOLE, UNKNOWN = 0x2028D7F2, 0x1A70, 0x2F37


def parser() -> StreamCapsuleParser:
    return StreamCapsuleParser(frozenset({STREAMED}), {WHOLE: 50})


def joined(pieces: list[CapsulePiece]) -> list[tuple[int, bytes]]:
    """The capsules that the pieces are of."""
    capsules: list[tuple[int, bytes]] = []
    open_value = b""
    for capsule_type, part, is_whole in pieces:
        open_value += part
        if is_whole:
            capsules.append((capsule_type, open_value))
            open_value = b""
    assert not open_value
    return capsules


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([STREAMED, WHOLE, UNKNOWN]), st.binary(max_size=50)), max_size=8
    ),
    st.lists(st.integers(1, 40), max_size=30),
)
def test_any_split_gives_the_same_capsules(
    sent: list[tuple[int, bytes]], chunks: list[int]
) -> None:
    stream = b"".join(encode_capsule(kind, value) for kind, value in sent)
    reader = parser()
    pieces: list[CapsulePiece] = []
    for size in chunks:
        pieces += reader.receive(stream[:size])
        stream = stream[size:]
    pieces += reader.receive(stream)
    reader.receive_end()
    assert joined(pieces) == [capsule for capsule in sent if capsule[0] != UNKNOWN]
    assert reader.skipped == sum(kind == UNKNOWN for kind, _ in sent)


def test_a_part_is_handed_on_before_the_capsule_ends() -> None:
    reader = parser()
    assert reader.receive(encode_varint(STREAMED) + encode_varint(5) + b"ab") == [
        (STREAMED, b"ab", False)
    ]
    assert reader.receive(b"cde") == [(STREAMED, b"cde", True)]


def test_a_chunk_inside_a_capsule_is_handed_on_as_the_same_object() -> None:
    reader = parser()
    reader.receive(encode_varint(STREAMED) + encode_varint(MAX_VARINT))
    chunk = bytes(65536)
    [(_, part, is_whole)] = reader.receive(chunk)
    assert part is chunk
    assert not is_whole


def test_a_value_behind_its_header_is_a_view_of_the_chunk() -> None:
    chunk = encode_capsule(STREAMED, bytes(65536))
    [(_, part, is_whole)] = parser().receive(chunk)
    assert isinstance(part, memoryview)
    assert part.obj is chunk
    assert is_whole


def test_an_empty_capsule_is_whole_at_once() -> None:
    assert parser().receive(encode_capsule(STREAMED, b"")) == [(STREAMED, b"", True)]


def test_a_whole_capsule_beyond_its_bound_is_refused_by_its_header_and_all_after_it() -> None:
    reader = parser()
    for _ in range(2):
        with pytest.raises(PeerError, match="51 bytes is too large, at most 50"):
            reader.receive(encode_varint(WHOLE) + encode_varint(51))


def test_an_unknown_capsule_of_any_length_is_skipped_without_being_kept() -> None:
    reader = parser()
    assert reader.receive(encode_varint(UNKNOWN) + encode_varint(1_000_000)) == []
    assert reader.receive(bytes(1_000_000)) == []
    assert reader.receive(encode_capsule(STREAMED, b"x")) == [(STREAMED, b"x", True)]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 6, 9])
def test_an_end_inside_a_capsule_is_an_error(cut: int) -> None:
    reader = parser()
    reader.receive(encode_capsule(STREAMED, b"hello")[:cut])
    with pytest.raises(PeerError, match="in the middle"):
        reader.receive_end()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_is_taken_or_refused_with_the_documented_error(chunks: list[bytes]) -> None:
    reader = parser()
    try:
        for chunk in chunks:
            reader.receive(chunk)
        reader.receive_end()
    except PeerError:
        pass
