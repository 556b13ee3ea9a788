"""No new tunnel while the ends of earlier ones cannot be recorded, where the setting says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from tests.worker.test_closed_tunnels import queue_of
from toppy.wire.ipc_message import AdmissionRequest, TokenRequest, ToWorker
from toppy.worker.main import Worker

QUESTION = AdmissionRequest(1, "x", "a.example", 53, "udp", False, "192.0.2.9")


def worker_with(ended: int, *, refuses: bool, takes: bool = True) -> tuple[Worker, list[object]]:
    """As far as questions go; its queue of ended tunnels has room for three."""
    asked: list[object] = []

    def send(message: ToWorker) -> bool:
        asked.append(message)
        return takes

    parts = SimpleNamespace(
        _settings=SimpleNamespace(refuses_unrecorded=refuses),
        _closed=queue_of(ended, most=3),
        _orphaned_at=None,
        _control=SimpleNamespace(send=send),
    )
    return cast(Worker, parts), asked


@pytest.mark.parametrize(
    ("ended", "refuses", "may"), [(2, True, True), (3, True, False), (3, False, True)]
)
def test_a_full_queue_of_ends_stops_new_tunnels_by_setting(
    ended: int, refuses: bool, may: bool
) -> None:
    worker, asked = worker_with(ended, refuses=refuses)
    assert Worker.ask(worker, QUESTION) is may
    assert bool(asked) is may


def test_an_end_without_room_is_counted_where_tunnels_go_on() -> None:
    worker, _ = worker_with(5, refuses=False)
    assert worker._closed.lost == 2


def test_a_full_channel_is_no_answer() -> None:
    worker, _ = worker_with(0, refuses=True, takes=False)
    assert not Worker.ask(worker, QUESTION)
    assert not Worker.ask(worker, TokenRequest(1, "x"))
