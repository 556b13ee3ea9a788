"""RFC 9000 section 16, with the examples of its appendix A.1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.errors import DatagramError, LocalError
from toppy.wire.varint import MAX_VARINT, encode_varint, parse_varint, read_varint


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("c2197c5eff14e88c", 151_288_809_941_952_652),
        ("9d7f3e7d", 494_878_333),
        ("7bbd", 15_293),
        ("25", 37),
        ("4025", 37),
    ],
)
def test_the_examples_of_the_rfc_decode(encoded: str, value: int) -> None:
    data = bytes.fromhex(encoded)
    assert read_varint(data) == (value, len(data))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 1),
        (63, 1),
        (64, 2),
        (16_383, 2),
        (16_384, 4),
        (2**30 - 1, 4),
        (2**30, 8),
        (MAX_VARINT, 8),
    ],
)
def test_each_value_takes_the_shortest_encoding(value: int, size: int) -> None:
    assert len(encode_varint(value)) == size


@pytest.mark.parametrize("value", [-1, MAX_VARINT + 1])
def test_a_value_out_of_range_is_our_mistake(value: int) -> None:
    with pytest.raises(LocalError):
        encode_varint(value)


@given(st.integers(0, MAX_VARINT), st.binary(max_size=8), st.binary(max_size=8))
def test_what_was_encoded_decodes_wherever_it_stands(
    value: int, before: bytes, after: bytes
) -> None:
    encoded = encode_varint(value)
    assert read_varint(before + encoded + after, len(before)) == (
        value,
        len(before) + len(encoded),
    )


@given(st.integers(0, MAX_VARINT), st.data())
def test_a_cut_integer_is_incomplete_or_an_error(value: int, data: st.DataObject) -> None:
    encoded = encode_varint(value)
    cut = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
    assert read_varint(cut) is None
    with pytest.raises(DatagramError):
        parse_varint(cut)
