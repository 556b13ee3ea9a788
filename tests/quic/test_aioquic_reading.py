"""What waits of a connection's streams: by turns, paused, counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.quic.aioquic_reading import StreamReaders
from toppy.quic.engine import READ_TURN_BYTES

WINDOW = 100_000


def make_readers() -> StreamReaders:
    return StreamReaders(WINDOW, 3 * WINDOW)


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=6))
def test_everything_comes_out_in_order_by_turns(sizes: list[int]) -> None:
    readers = make_readers()
    chunks = [bytes([number]) * size for number, size in enumerate(sizes)]
    for index, chunk in enumerate(chunks):
        readers.add(4, chunk, ended=index == len(chunks) - 1)
    found, ended, turn = b"", False, 0
    while not ended:
        taken = readers.take(4, turn)
        assert taken is not None
        data, ended = taken
        assert len(data) <= READ_TURN_BYTES
        found += data
        assert readers.take(4, turn) is None or len(data) < READ_TURN_BYTES
        assert readers.held_bytes == readers.held_of(4) == sum(map(len, chunks)) - len(found)
        turn += 1
    assert found == b"".join(chunks)
    assert not readers.has_unread()
    assert not readers.is_holding(4)


def test_a_paused_stream_gives_nothing_until_it_is_resumed() -> None:
    readers = make_readers()
    readers.pause(0)
    readers.add(0, b"held", ended=True)
    assert readers.take(0, 1) is None
    assert not readers.has_unread()
    assert readers.readable() == []
    readers.resume(0)
    assert readers.readable() == [0]
    assert readers.take(0, 1) == (b"held", True)


def test_without_a_turn_all_is_taken() -> None:
    readers = make_readers()
    readers.add(0, bytes(3 * READ_TURN_BYTES), ended=False)
    assert readers.take(0, None) == (bytes(3 * READ_TURN_BYTES), False)


def test_each_paused_stream_with_data_asks_for_a_window_up_to_the_bound() -> None:
    readers = make_readers()
    for stream_id in range(0, 20, 4):
        readers.pause(stream_id)
    assert readers.extension_bytes == 0
    for count, stream_id in enumerate(range(0, 20, 4), 1):
        readers.add(stream_id, b"x", ended=False)
        assert readers.extension_bytes == min(count, 3) * WINDOW
    readers.clear()
    assert readers.held_bytes == 0
    assert readers.extension_bytes == 3 * WINDOW


def test_data_that_came_before_the_pause_counts_too() -> None:
    readers = make_readers()
    readers.add(0, b"x", ended=False)
    readers.pause(0)
    assert readers.extension_bytes == WINDOW


def test_nothing_is_left_of_a_stream_that_was_given_up() -> None:
    readers = make_readers()
    readers.add(0, b"x", ended=True)
    readers.pause(0)
    readers.forget(0)
    readers.forget(4)
    assert readers.held_bytes == 0
    assert not readers.is_holding(0)
    readers.add(0, b"y", ended=False)
    assert readers.take(0, 1) == (b"y", False)
