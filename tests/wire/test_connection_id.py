"""IDs say who issued them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.wire.connection_id import (
    CONNECTION_ID_BYTES,
    PREFIX_BYTES,
    WorkerAddress,
    destination_connection_id,
    encode_prefix,
    parse_connection_id,
)

bytes_6 = st.binary(min_size=6, max_size=6)


@given(st.integers(0, 255), st.integers(0, 100_000), st.integers(0, 255), bytes_6)
def test_an_id_of_ours_names_slot_and_generation(
    slot: int, generation: int, server_id: int, tail: bytes
) -> None:
    connection_id = encode_prefix(slot, generation, server_id=server_id) + tail
    assert len(connection_id) == CONNECTION_ID_BYTES == PREFIX_BYTES + 6
    assert parse_connection_id(connection_id, server_id=server_id) == WorkerAddress(
        slot, generation % 256, server_id
    )


@given(st.integers(0, 255), bytes_6)
def test_an_id_of_another_server_is_a_strangers(slot: int, tail: bytes) -> None:
    assert parse_connection_id(encode_prefix(slot, 1, server_id=7) + tail) is None


@given(st.binary(max_size=30).filter(lambda b: len(b) != CONNECTION_ID_BYTES))
def test_an_id_of_another_length_is_a_strangers(connection_id: bytes) -> None:
    assert parse_connection_id(connection_id) is None


def test_the_id_is_found_behind_both_kinds_of_header() -> None:
    connection_id = encode_prefix(3, 1) + b"abcdef"
    assert destination_connection_id(b"\x40" + connection_id + b"rest") == connection_id
    long_header = b"\xc0\x00\x00\x00\x01" + bytes([len(connection_id)]) + connection_id
    assert destination_connection_id(long_header) == connection_id


@given(st.binary(max_size=40))
def test_any_packet_has_an_id_or_none(packet: bytes) -> None:
    found = destination_connection_id(packet)
    assert found is None or found in packet
