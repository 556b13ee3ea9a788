from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toppy.quic.aioquic_timers import Deadlines

STEPS = st.lists(
    st.tuples(
        st.integers(1, 4), st.one_of(st.none(), st.integers(0, 50).map(float)), st.booleans()
    ),
    max_size=60,
)


@given(STEPS)
def test_deadlines_agree_with_a_plain_table(steps: list[tuple[int, float | None, bool]]) -> None:
    deadlines = Deadlines()
    table: dict[int, float] = {}
    now = 0.0
    for number, deadline, is_time_passing in steps:
        deadlines.set(number, deadline)
        if deadline is None:
            table.pop(number, None)
        else:
            table[number] = deadline
        assert deadlines.next() == min(table.values(), default=None)
        if is_time_passing:
            now += 5
            due = deadlines.take_due(now)
            assert sorted(due) == sorted(n for n, at in table.items() if at <= now)
            for number_due in due:
                del table[number_due]


def test_a_removed_connection_is_never_due() -> None:
    deadlines = Deadlines()
    deadlines.set(1, 5.0)
    deadlines.remove(1)
    assert deadlines.next() is None
    assert deadlines.take_due(10.0) == []


def test_near_and_far_deadlines_in_turn_leave_no_heap_of_old_entries() -> None:
    deadlines = Deadlines()
    now = 0.0
    for _ in range(1000):
        deadlines.set(1, now + 30)
        deadlines.set(1, now + 0.001)
        now += 0.001
        assert deadlines.take_due(now + 1e-9) == [1]
    assert len(deadlines._heap) <= 2
