"""The control plane's writer: nothing is lost in silence, whatever the disk does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from toppy.control.audit_settings import AuditSettings
from toppy.control.audit_writer import AuditWriter
from toppy.errors import ConfigError
from toppy.model.audit_event import AuditAction, parse_facts
from toppy.observe.audit_log import AuditLog, AuditLogOptions
from toppy.observe.audit_reader import read_checkpoints, verify_log
from toppy.observe.audit_shipper import CollectorOptions

DENIED = AuditAction.TUNNEL_DENIED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def settings_of(path: Path, **others: Any) -> AuditSettings:
    return AuditSettings(path=path, options=AuditLogOptions(fsync="never"), **others)


def run(path: Path, scenario: Callable[[AuditWriter], Coroutine[Any, Any, None]], **o: Any) -> None:
    async def whole() -> None:
        writer = AuditWriter(settings_of(path, **o))
        async with asyncio.timeout(20):
            await scenario(writer)
            await writer.close()

    asyncio.run(whole())


def targets(path: Path) -> list[str]:
    return [json.loads(line)["event"]["target"] for line in path.read_bytes().splitlines()]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # any condition
        await asyncio.sleep(0.005)


def test_events_are_written_in_order_and_then_told(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        writer.open()
        writer.start()
        told: list[int] = []
        for number in range(2500):
            assert writer.record(DENIED, str(number), on_written=lambda n=number: told.append(n))  # type: ignore[misc]
        await until(lambda: len(told) == 2500)
        assert told == list(range(2500))

    run(path, scenario)
    assert targets(path) == [str(number) for number in range(2500)]


def test_what_waits_is_written_before_it_closes(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        for number in range(50):
            writer.record(DENIED, str(number))

    run(path, scenario)
    assert len(targets(path)) == 50
    (mark,) = read_checkpoints(path.with_name("audit.jsonl.checkpoints"))
    assert mark.count == 50


def test_without_a_log_everything_is_taken_and_nothing_done(tmp_path: Path) -> None:
    async def whole() -> None:
        writer = AuditWriter(AuditSettings())
        writer.open()
        writer.start()
        told: list[bool] = []
        assert writer.record(DENIED, "x", on_written=lambda: told.append(True))
        assert told == [True]
        assert writer.has_room
        assert not writer.refuses
        assert writer.facts()["path"] is None
        await writer.close()

    asyncio.run(whole())


def test_events_without_room_are_counted_and_the_count_is_written(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        results = [writer.record(DENIED, str(number)) for number in range(7)]
        assert results == [True] * 4 + [False] * 3
        assert not writer.has_room
        assert (writer.facts()["waiting"], writer.facts()["lost"]) == (4, 3)
        writer.start()
        await until(lambda: writer.has_room)
        assert writer.record(DENIED, "later")

    run(path, scenario, queue_events=4)
    lines = [json.loads(line)["event"] for line in path.read_bytes().splitlines()]
    lost = next(event for event in lines if event["action"] == "audit.lost")
    assert parse_facts(lost["reason"])[1] == {"count": "3"}
    assert [event["target"] for event in lines if event is not lost] == [*"0123", "later"]


def test_strangers_leave_room_for_what_must_be_recorded(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        for number in range(10):
            assert writer.record(DENIED, str(number), is_reserved=False) == (number < 5)
        assert writer.has_room
        assert writer.record(AuditAction.TUNNEL_OPENED, "x")

    run(path, scenario, queue_events=10)


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def fail(writer: AuditWriter, source: str, count: int = 1, status: int = 401) -> None:
    action = AuditAction.AUTH_FAILED if status == 401 else DENIED
    writer.record_refusal(
        action, "a:53", source=source, status=status, reason="wrong", count=count, tunnel="t"
    )


def refusals(path: Path) -> list[tuple[str, str, int]]:
    """Action, source and how many, of each entry."""
    events = [json.loads(line)["event"] for line in path.read_bytes().splitlines()]
    assert not any(event["allowed"] for event in events)
    facts = [parse_facts(event["reason"])[1] for event in events]
    return [
        (event["action"], event["actor"], int(fact.get("count", 1)))
        for event, fact in zip(events, facts, strict=True)
    ]


def test_refusals_that_repeat_are_one_entry_with_their_count(path: Path) -> None:
    async def whole() -> None:
        clock = Clock()
        writer = AuditWriter(settings_of(path), clock=clock)
        writer.start()
        for _ in range(5):
            fail(writer, "192.0.2.1")
        fail(writer, "192.0.2.2", status=400, count=7)
        await until(lambda: path.exists() and len(refusals(path)) == 2)
        clock.now += 61
        fail(writer, "192.0.2.3")
        await until(lambda: len(refusals(path)) == 4)
        await writer.close()

    asyncio.run(whole())
    assert sorted(refusals(path)) == [
        ("auth.failed", "192.0.2.1", 1),
        ("auth.failed", "192.0.2.1", 4),
        ("auth.failed", "192.0.2.3", 1),
        ("tunnel.denied", "192.0.2.2", 7),
    ]


def test_a_flood_of_failures_adds_few_entries_and_none_is_missing_from_the_counts(
    path: Path,
) -> None:
    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        for number in range(50_000):
            fail(writer, f"2001:db8::{number % 3000:x}")

    run(path, scenario)
    found = refusals(path)
    assert len(found) <= 2 * 101
    assert sum(count for _, _, count in found) == 50_000
    # an attacker with many addresses does not hide that there are some
    assert sum(count for _, actor, count in found if actor == "toppy-gw") > 40_000


def test_counts_wait_while_there_is_no_room(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        for _ in range(3):
            fail(writer, "192.0.2.1")
        while writer.has_room:
            writer.record(AuditAction.TUNNEL_OPENED, "x")
        writer.start()
        await until(lambda: writer.facts()["waiting"] == 0)

    run(path, scenario, queue_events=4, repeat_interval_s=0.0)
    lines = [json.loads(line)["event"] for line in path.read_bytes().splitlines()]
    failed = [event["reason"] for event in lines if event["action"] == "auth.failed"]
    assert [parse_facts(reason)[1].get("count") for reason in failed] == [None, "2"]
    assert not any(event["action"] == "audit.lost" for event in lines)


def test_the_metrics_follow_what_is_written(path: Path) -> None:
    async def scenario(writer: AuditWriter) -> None:
        for number in range(5):
            writer.record(AuditAction.TUNNEL_OPENED, str(number))
        before = writer.metrics()
        assert before is not None
        assert (before.entries, before.waiting, before.lost) == (0, 4, 1)
        assert before.last_write is None
        writer.start()
        await until(lambda: not writer.facts()["waiting"])
        after = writer.metrics()
        assert after is not None
        assert (after.entries, after.waiting, after.lost, after.failures) == (5, 0, 1, 0)
        assert after.is_writable
        assert after.last_write is not None
        assert after.shipping is None

    run(path, scenario, queue_events=4)


def test_the_metrics_show_a_log_that_cannot_be_written(path: Path) -> None:
    path.mkdir()

    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        writer.record(DENIED, "x")
        await until(lambda: writer.problem)
        shown = writer.metrics()
        assert shown is not None
        assert not shown.is_writable
        assert shown.failures >= 1
        path.rmdir()  # noqa: ASYNC240

    run(path, scenario)


def test_the_metrics_show_how_far_the_collector_is(path: Path) -> None:
    """Nothing listens at the collector's address."""
    collector = CollectorOptions("http://127.0.0.1:9/", retries=0, timeout_s=1)

    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        writer.record(DENIED, "x")
        await until(lambda: writer.facts()["ship_problem"])
        shown = writer.metrics()
        assert shown is not None
        assert shown.shipping is not None
        assert (shown.shipping.backlog, shown.shipping.failures) == (1, 1)
        assert shown.shipping.behind_s >= 0
        assert shown.shipping.last_success is None or shown.shipping.last_success > 0

    run(path, scenario, collector=collector)


@pytest.mark.parametrize("refuses", [True, False])
def test_the_setting_says_what_a_full_queue_means(path: Path, refuses: bool) -> None:
    async def scenario(writer: AuditWriter) -> None:
        assert writer.refuses is refuses

    run(path, scenario, refuses_when_full=refuses)


def test_a_log_that_cannot_be_opened_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toppy.control.audit_writer._RETRY_S", 0.01)
    path.mkdir()

    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        writer.record(DENIED, "x")
        await until(lambda: writer.problem)
        path.rmdir()  # noqa: ASYNC240
        await until(lambda: not writer.problem)

    run(path, scenario)
    assert targets(path) == ["x"]


def test_a_full_disk_keeps_events_until_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toppy.control.audit_writer._RETRY_S", 0.01)
    append = AuditLog.append

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def scenario(writer: AuditWriter) -> None:
        writer.open()
        monkeypatch.setattr(AuditLog, "append", full)
        writer.start()
        writer.record(DENIED, "1")
        writer.record(DENIED, "2")
        await until(lambda: writer.problem == "No space left on device")
        monkeypatch.setattr(AuditLog, "append", append)
        await until(lambda: not writer.facts()["waiting"])

    run(path, scenario)
    assert targets(path) == ["1", "2"]


def test_a_disk_that_does_not_take_them_down_doubles_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintain = AuditLog.maintain

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    async def scenario(writer: AuditWriter) -> None:
        writer.open()
        monkeypatch.setattr(AuditLog, "maintain", broken)
        writer.start()
        writer.record(DENIED, "1")
        await until(lambda: writer.problem == "Input/output error")
        monkeypatch.setattr(AuditLog, "maintain", maintain)
        writer.record(DENIED, "2")
        await until(lambda: not writer.problem)

    run(path, scenario)
    assert targets(path) == ["1", "2"]


def test_a_file_that_was_changed_meanwhile_is_looked_at_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toppy.control.audit_writer._RETRY_S", 0.01)

    async def scenario(writer: AuditWriter) -> None:
        writer.start()
        writer.record(DENIED, "1")
        await until(lambda: not writer.facts()["waiting"])
        with path.open("ab") as file:
            file.write(b"half an ent")
        writer.record(DENIED, "2")
        await until(lambda: not writer.facts()["waiting"])

    run(path, scenario)
    assert targets(path) == ["1", str(path), "2"]
    found = verify_log(path, None, checkpoints=path.with_name("audit.jsonl.checkpoints"))
    assert found.entries == 3


def test_a_log_that_is_no_use_is_a_configuration_error(path: Path) -> None:
    path.write_bytes(b"not a log\n")
    with pytest.raises(ConfigError, match=r"audit\.path: .*not an audit entry"):
        AuditWriter(settings_of(path)).open()
    with pytest.raises(ConfigError, match=r"audit\.path: cannot write"):
        AuditWriter(settings_of(path / "below")).open()
