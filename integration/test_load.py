"""The load generator itself: what it says about numbers that it sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.conftest import Peer
from integration.load import MIN_SIZE, Order, running_load
from integration.processes import wait_until


@pytest.mark.parametrize(
    ("numbers", "received", "duplicated", "reordered"),
    [
        ([0, 1, 2, 3], 4, 0, 0),
        ([0, 1, 3, 4], 4, 0, 0),
        ([0, 2, 1, 3], 4, 0, 1),
        ([3, 2, 1, 0], 4, 0, 3),
        ([0, 1, 1, 2], 3, 1, 0),
        ([0, 2, 1, 1], 3, 1, 1),
    ],
)
def test_what_is_missing_doubled_or_late_is_counted(
    numbers: list[int], received: int, duplicated: int, reordered: int
) -> None:
    for cut in range(len(numbers) + 1):
        order = Order()
        order.take(numbers[:cut])
        order.take(numbers[cut:])
        assert (order.received, order.duplicated, order.reordered) == (
            received,
            duplicated,
            reordered,
        )


@given(st.lists(st.integers(0, 20)))
def test_each_arrival_is_new_or_a_duplicate(numbers: list[int]) -> None:
    order = Order()
    order.take(numbers)
    assert order.received == len(set(numbers))
    assert order.received + order.duplicated == len(numbers)
    assert (order.reordered == 0) == (list(dict.fromkeys(numbers)) == sorted(set(numbers)))


@pytest.mark.parametrize("size", [MIN_SIZE, 1200])
def test_what_an_echo_returns_is_whole(echo: Peer, size: int) -> None:
    with running_load(echo.port, 5000, size) as load:
        wait_until("some echoes", lambda: load.report().received > 1000)
        report = load.stop()
    assert report.is_whole
    assert report.sent == report.received
