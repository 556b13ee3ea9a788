"""Shipping: in order, at least once, nothing lost while the collector is down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.observe.audit_place import KEY, Place
from toppy.observe.audit_position import shipped_path
from toppy.observe.audit_reader import log_files
from toppy.observe.audit_shipper import (
    CHECKPOINT_FIELD,
    AuditShipper,
    Collector,
    CollectorOptions,
    RefusedByCollectorError,
    RemoteAnswer,
    ShipError,
    verify_remotely,
)
from toppy.wire.audit_entry import AuditError, check_checkpoint, parse_checkpoint

OPTIONS = CollectorOptions("http://collector.example/audit", token="hidden", batch_size=3)


@dataclass
class FakeCollector:
    """Keeps what it takes; ``answers`` are its next ones, then 200."""

    answers: list[int | Exception | Callable[[], httpx.Response]] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    taken: list[Any] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    async def take(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        content = await request.aread()
        await asyncio.sleep(0)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            response = answer()
            status = response.status_code
        else:
            status, response = answer, httpx.Response(answer, text="said")
        if status < 300:
            self.taken.append(json.loads(content))
        return response

    async def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)

    def client(self, options: CollectorOptions = OPTIONS) -> Collector:
        return Collector(
            options,
            transport=httpx.MockTransport(self.take),
            sleep=self.sleep,
            chance=lambda: 1.0,
        )

    @property
    def seqs(self) -> list[int]:
        """Of every entry that came, in order."""
        return [
            entry["seq"]
            for body in self.taken
            for entry in (body if isinstance(body, list) else [body])
        ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def collector() -> FakeCollector:
    return FakeCollector()


def ship(
    place: Place,
    collector: FakeCollector,
    options: CollectorOptions = OPTIONS,
    most: int | None = None,
) -> int:
    async def whole() -> int:
        async with collector.client(options) as client:
            shipper = AuditShipper(
                place.path, client, batch_size=options.batch_size, checkpoints=place.checkpoints
            )
            return await shipper.ship_new(most=most)

    return asyncio.run(whole())


def test_entries_go_in_batches_with_the_token(place: Place, collector: FakeCollector) -> None:
    place.write(range(7))
    assert ship(place, collector) == 7
    assert [len(body) for body in collector.taken] == [3, 3, 1]
    assert collector.seqs == [1, 2, 3, 4, 5, 6, 7]
    assert {r.headers["authorization"] for r in collector.requests} == {"Bearer hidden"}
    assert {r.headers["content-type"] for r in collector.requests} == {"application/json"}
    assert ship(place, collector) == 0


def test_a_batch_of_one_is_an_object(place: Place, collector: FakeCollector) -> None:
    place.write([1, 2])
    assert ship(place, collector, replace(OPTIONS, batch_size=1)) == 2
    assert [body["seq"] for body in collector.taken] == [1, 2]


def test_what_is_shipped_is_what_is_in_the_log(place: Place, collector: FakeCollector) -> None:
    place.write([1, 2])
    ship(place, collector)
    lines = place.path.read_bytes().splitlines()
    assert collector.taken == [[json.loads(line) for line in lines]]
    assert collector.requests[0].content == b"[" + b",".join(lines) + b"]"


def test_a_retry_succeeds_after_500(place: Place, collector: FakeCollector) -> None:
    place.write([1])
    collector.answers = [500, httpx.ConnectError("refused")]
    assert ship(place, collector) == 1
    assert len(collector.requests) == 3
    assert collector.slept == [0.25, 0.5]


def test_a_collector_that_is_down_loses_nothing(place: Place, collector: FakeCollector) -> None:
    place.write(range(5))
    collector.answers = [200, *[503] * 3]
    with pytest.raises(ShipError, match="503 'said'"):
        ship(place, collector)
    place.write(range(5, 7))
    assert ship(place, collector) == 4
    assert collector.seqs == [1, 2, 3, 4, 5, 6, 7]


def test_what_the_collector_will_never_take_is_not_tried_again(
    place: Place, collector: FakeCollector
) -> None:
    place.write([1])
    collector.answers = [401]
    with pytest.raises(RefusedByCollectorError, match="401"):
        ship(place, collector)
    assert len(collector.requests) == 1
    assert ship(place, collector) == 1


def test_a_lost_answer_means_the_same_entries_again(place: Place, collector: FakeCollector) -> None:
    place.write([1, 2])
    collector.answers = [httpx.ReadTimeout("slow")]
    ship(place, collector)
    assert len(collector.requests) == 2
    assert collector.requests[0].content == collector.requests[1].content


def test_shipping_goes_on_across_rotation(place: Place, collector: FakeCollector) -> None:
    place.set(rotate_bytes=900)
    place.write(range(4))
    assert ship(place, collector) == 4
    place.write(range(4, 20))
    assert len(log_files(place.path)) > 4
    assert ship(place, collector) == 16
    assert collector.seqs == list(range(1, 21))


def test_only_so_many_are_shipped_at_once_when_asked(
    place: Place, collector: FakeCollector
) -> None:
    place.write(range(7))
    assert ship(place, collector, most=4) == 4
    assert ship(place, collector) == 3
    assert collector.seqs == [1, 2, 3, 4, 5, 6, 7]


def test_an_entry_that_is_being_written_waits(place: Place, collector: FakeCollector) -> None:
    place.write([1])
    with place.path.open("ab") as file:
        file.write(b'{"version":1')
    assert ship(place, collector) == 1
    assert ship(place, collector) == 0


def test_the_newest_checkpoint_that_was_reached_goes_along(
    place: Place, collector: FakeCollector
) -> None:
    place.write(range(5))
    ship(place, collector)
    first, last = (r.headers.get(CHECKPOINT_FIELD) for r in collector.requests)
    assert first is None  # it knows more than the collector has
    mark = parse_checkpoint((last or "").encode())
    assert (mark.count, mark.head) == (5, place.entries()[-1].hash)
    check_checkpoint(mark, KEY, unsigned=False)


def test_a_log_that_was_replaced_or_cut_is_not_shipped(
    place: Place, collector: FakeCollector
) -> None:
    place.write(range(3))
    ship(place, collector)
    place.path.write_bytes(b"".join(place.path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(AuditError, match="another log"):
        ship(place, collector)
    other = Place(place.directory / "other")
    other.write(range(10, 16))
    place.path.write_bytes(other.path.read_bytes())
    with pytest.raises(AuditError, match="another log"):
        ship(place, collector)
    shipped_path(place.path).unlink()
    place.checkpoints.unlink()
    assert ship(place, collector) == 6


def test_entries_that_are_missing_are_named(place: Place, collector: FakeCollector) -> None:
    place.set(rotate_bytes=800)
    place.write(range(2))
    ship(place, collector)
    place.write(range(2, 12))
    log_files(place.path)[1].unlink()
    with pytest.raises(AuditError, match="are not here"):
        ship(place, collector)


def test_a_position_that_cannot_be_read_means_everything_again(
    place: Place, collector: FakeCollector
) -> None:
    place.write([1, 2])
    ship(place, collector)
    shipped_path(place.path).write_bytes(b"\xff")
    assert ship(place, collector) == 2


def test_two_do_not_ship_one_log_at_once(place: Place, collector: FakeCollector) -> None:
    place.write([1])

    async def whole() -> None:
        async with collector.client() as client:
            shippers = [
                AuditShipper(place.path, client, batch_size=3, checkpoints=place.checkpoints)
                for _ in range(2)
            ]
            results = await asyncio.gather(
                *(shipper.ship_new() for shipper in shippers), return_exceptions=True
            )
        assert sorted(map(str, results)) == ["1", "another process ships this log now"]

    asyncio.run(whole())
    assert collector.seqs == [1]


def test_no_secret_shows_in_an_error(place: Place, collector: FakeCollector) -> None:
    place.write([1])
    collector.answers = [httpx.ConnectError("refused")]
    options = replace(OPTIONS, url="http://user:hidden@c.example:8/x?token=hidden", retries=0)
    with pytest.raises(ShipError) as found:
        ship(place, collector, options)
    assert "hidden" not in str(found.value)
    assert "http://c.example:8/x" in str(found.value)
    assert "hidden" not in repr(OPTIONS)


def test_a_url_that_is_none_is_an_error_and_no_crash(place: Place) -> None:
    place.write([1])

    async def whole() -> None:
        async with Collector(replace(OPTIONS, url="collector", retries=0)) as client:
            shipper = AuditShipper(place.path, client, batch_size=1, checkpoints=place.checkpoints)
            with pytest.raises(ShipError):
                await shipper.ship_new()

    asyncio.run(whole())


# remote verification


def remote(place: Place, collector: FakeCollector) -> RemoteAnswer:
    async def whole() -> RemoteAnswer:
        async with collector.client() as client:
            return await verify_remotely(place.path, client)

    return asyncio.run(whole())


def says(status: int, **body: Any) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(status, json=body)


def test_the_whole_chain_goes_as_one_array(place: Place, collector: FakeCollector) -> None:
    place.set(rotate_bytes=900)
    place.write(range(12))
    assert remote(place, collector) == RemoteAnswer(True, "")
    assert collector.seqs == list(range(1, 13))
    assert len(collector.taken) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(200, verified=True, message="all there"), RemoteAnswer(True, "all there")),
        (says(200, verified=False, message="gap"), RemoteAnswer(False, "gap")),
        (says(201, ok=False), RemoteAnswer(False, "")),
        (lambda: httpx.Response(204), RemoteAnswer(True, "")),
        (lambda: httpx.Response(200, text="[1]"), RemoteAnswer(True, "")),
    ],
)
def test_the_answer_counts(
    place: Place,
    collector: FakeCollector,
    answer: Callable[[], httpx.Response],
    expected: RemoteAnswer,
) -> None:
    place.write([1])
    collector.answers = [answer] if answer().content else []
    assert remote(place, collector) == expected


def test_a_refusal_is_an_answer_and_an_outage_is_none(
    place: Place, collector: FakeCollector
) -> None:
    place.write([1])
    collector.answers = [422]
    assert not remote(place, collector).is_ok
    collector.answers = [500, 500, 500]
    with pytest.raises(ShipError, match="500"):
        remote(place, collector)
    collector.answers = [500]
    assert remote(place, collector).is_ok


# in the background


def test_the_background_task_ships_what_comes_and_survives_outages(
    place: Place, collector: FakeCollector
) -> None:
    from tests.control.virtual_time import run_in_virtual_time

    async def whole() -> None:
        async with collector.client(replace(OPTIONS, retries=0)) as client:
            shipper = AuditShipper(place.path, client, batch_size=3, checkpoints=place.checkpoints)
            wake_up = asyncio.Event()
            task = asyncio.create_task(shipper.run(wake_up))
            place.write([1, 2])
            wake_up.set()
            await asyncio.sleep(1)
            assert collector.seqs == [1, 2]
            collector.answers = [503] * 5
            place.write([3])
            wake_up.set()
            await asyncio.sleep(3)
            assert shipper.failures
            assert "503" in shipper.problem
            await asyncio.sleep(300)
            assert collector.seqs == [1, 2, 3]
            assert not shipper.failures
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run_in_virtual_time(whole())
