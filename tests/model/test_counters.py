from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from toppy.model.counters import GRANTED, WorkerCounters
from toppy.model.drop_reason import DropReason

_COUNT = st.integers(0, 1 << 40)
_PLAIN = [
    name for name in WorkerCounters.__dataclass_fields__ if name not in {"drops", "admissions"}
]


@st.composite
def counters(draw: st.DrawFn) -> WorkerCounters:
    reasons = st.sampled_from([reason.value for reason in DropReason])
    outcomes = st.sampled_from([GRANTED, "401", "403", "502"])
    plain = {name: draw(_COUNT) for name in _PLAIN}
    return WorkerCounters(
        **plain,
        drops=draw(st.dictionaries(reasons, _COUNT)),
        admissions=draw(st.dictionaries(outcomes, _COUNT)),
    )


def test_drops_are_counted_by_reason() -> None:
    count = WorkerCounters()
    count.count_drop(DropReason.QUEUE_FULL, 3)
    count.count_drop(DropReason.QUEUE_FULL)
    count.count_drop(DropReason.MALFORMED)
    assert count.drops == {"queue_full": 4, "malformed": 1}


def test_admissions_are_counted_by_outcome() -> None:
    count = WorkerCounters()
    for outcome in (GRANTED, "403", GRANTED):
        count.count_admission(outcome)
    assert count.admissions == {"granted": 2, "403": 1}


@given(counters(), counters())
def test_a_sum_has_every_field_of_both(one: WorkerCounters, other: WorkerCounters) -> None:
    total = one + other
    for name in _PLAIN:
        assert getattr(total, name) == getattr(one, name) + getattr(other, name)
    for key in one.drops.keys() | other.drops.keys():
        assert total.drops[key] == one.drops.get(key, 0) + other.drops.get(key, 0)
    for key in one.admissions.keys() | other.admissions.keys():
        assert total.admissions[key] == one.admissions.get(key, 0) + other.admissions.get(key, 0)


def test_a_sum_shares_nothing_with_its_operands() -> None:
    one = WorkerCounters()
    one.count_drop(DropReason.MALFORMED)
    total = one + WorkerCounters()
    total.count_drop(DropReason.MALFORMED)
    total.count_admission(GRANTED)
    total.pings += 1
    assert one == WorkerCounters(drops={"malformed": 1})


@given(counters())
def test_counters_survive_msgpack_and_json(count: WorkerCounters) -> None:
    packed = msgspec.msgpack.encode(count)
    assert msgspec.msgpack.decode(packed, type=WorkerCounters) == count
    assert msgspec.json.decode(msgspec.json.encode(count), type=WorkerCounters) == count
