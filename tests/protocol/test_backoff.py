"""Delays grow, are bounded and jittered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.protocol.backoff import Backoff


def test_delays_double_up_to_the_bound_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(lambda: 1.0, first_s=0.1, most_s=1.0)
    assert [round(backoff.next_delay_s(), 2) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, 1.0]
    backoff.reset()
    assert round(backoff.next_delay_s(), 2) == 0.1


@given(st.floats(0.0, 1.0, exclude_max=True), st.integers(1, 200))
def test_every_delay_is_between_half_and_all_of_the_bound(chance: float, failures: int) -> None:
    backoff = Backoff(lambda: chance, first_s=0.5, most_s=8.0)
    for _ in range(failures):
        delay = backoff.next_delay_s()
        assert 0.25 <= delay <= 8.0
