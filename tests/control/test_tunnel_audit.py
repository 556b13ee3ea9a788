"""What the audit log says about tunnels, and what workers are told of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from tests.control.stage import GRANT, FakeProcess, Run, Stage, question, until
from tests.worker.test_closed_tunnels import closed
from toppy.control.audit_writer import AuditWriter
from toppy.control.generation import Generation, Worker
from toppy.control.tunnel_audit import TunnelAudit
from toppy.model.audit_event import AuditAction
from toppy.model.grant import Denial, Grant
from toppy.system.processes import Process
from toppy.wire.ipc_message import (
    AdmissionRequest,
    ClosedTaken,
    ClosedTunnels,
    LiveTunnel,
    Refusals,
    RefusedRequests,
)


@dataclass
class FakeWriter:
    """Keeps events; the test says when they are written."""

    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    refusals: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)
    room: int = 1000
    refuses: bool = True
    is_enabled: bool = True

    @property
    def has_room(self) -> bool:
        return self.room > 0

    def record(self, action: AuditAction, target: str, **rest: Any) -> bool:
        if not self.room:
            return False
        self.room -= 1
        if (told := rest.pop("on_written", None)) is not None:
            self.waiting.append(told)
        self.events.append((action.value, target, rest))
        return True

    def record_refusal(self, action: AuditAction, target: str, **rest: Any) -> None:
        self.refusals.append((action.value, target, rest))

    def write(self) -> None:
        waiting, self.waiting = self.waiting, []
        for told in waiting:
            told()

    @property
    def actions(self) -> list[str]:
        return [action for action, _, _ in self.events]


@pytest.fixture
def writer() -> FakeWriter:
    return FakeWriter()


@pytest.fixture
def audit(writer: FakeWriter) -> TunnelAudit:
    return TunnelAudit(cast(AuditWriter, writer))


@pytest.fixture
def worker() -> Worker:
    import asyncio

    async def make() -> Worker:
        generation = Generation(2, 1, (0,), cast(Any, None), 0.0)
        return Worker(3, generation, cast(Process, FakeProcess()), "secret", 0.0)

    return asyncio.run(make())


def asked(connection: int = 7, address: str = "") -> AdmissionRequest:
    return AdmissionRequest(
        1, "x", "a.example", 53, "udp", False, "192.0.2.9", address, connection, 1
    )


def test_a_grant_is_recorded_with_everything_about_it(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    assert audit.decided(worker, asked(), GRANT) is GRANT
    ((action, target, rest),) = writer.events
    assert (action, target) == ("tunnel.opened", "a.example:53")
    assert rest == {
        "actor": "192.0.2.9",
        "subject": "token",
        "tunnel": "s3g2c7t1",
        "protocol": "udp",
        "rule": "dns",
        "revision": 1,
        "addresses": "192.0.2.53",
    }


@pytest.mark.parametrize(
    "denial",
    [
        Denial(403, "x", "no rule", "default", subject="bob"),
        Denial(502, "dns_error", "no such name"),
    ],
)
def test_a_denial_is_recorded_and_leaves_room(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker, denial: Denial
) -> None:
    assert audit.decided(worker, asked(), denial) is denial
    ((found, _, rest),) = writer.events
    assert found == "tunnel.denied"
    assert not rest["allowed"]
    assert not rest["is_reserved"]
    assert (rest["subject"], rest["reason"]) == (denial.subject or None, denial.details)
    assert rest["status"] == denial.status


def test_what_anybody_can_cause_is_recorded_as_a_refusal(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    denial = Denial(401, "x", "the token is wrong")
    assert audit.decided(worker, asked(), denial) is denial
    audit.credential_refused(worker, "192.0.2.8")
    audit.refused(worker, [RefusedRequests("192.0.2.7", 400, "no port", "", 3)])
    audit.refused_unread(worker, asked(), Denial(429, "x", "too many"))
    assert not writer.events
    failed, ping, refused, unread = writer.refusals
    assert failed == (
        "auth.failed",
        "a.example:53",
        {
            "source": "192.0.2.9",
            "status": 401,
            "reason": "the token is wrong",
            "subject": "",
            "rule": "",
            "tunnel": "s3g2c7t1",
        },
    )
    assert (ping[0], ping[1], ping[2]["source"]) == ("auth.failed", "ping", "192.0.2.8")
    assert (refused[0], refused[2]["count"], refused[2]["worker"]) == ("tunnel.denied", 3, "s3")
    assert (unread[0], unread[1], unread[2]["status"]) == ("tunnel.denied", "a.example:53", 429)


def test_who_asks_too_often_is_recorded_as_a_refusal(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    denial = Denial(429, "connection_limit_reached", "too many", "dns", subject="bob")
    assert audit.decided(worker, asked(), denial) is denial
    ((action, _, rest),) = writer.refusals
    assert (action, rest["subject"], rest["rule"]) == ("tunnel.denied", "bob", "dns")


@pytest.mark.parametrize("refuses", [True, False])
def test_a_grant_that_cannot_be_recorded_is_refused_by_setting(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker, refuses: bool
) -> None:
    writer.room, writer.refuses = 0, refuses
    answer = audit.decided(worker, asked(), GRANT)
    if refuses:
        assert isinstance(answer, Denial)
        assert answer.status == 503
        assert "audit log" in answer.details
    else:
        assert answer is GRANT


def test_a_newer_credential_is_no_new_tunnel(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    audit.decided(worker, asked(), GRANT)
    writer_room, writer.room = writer.room, writer.room
    assert writer_room
    audit.decided(worker, asked(address="192.0.2.53"), GRANT)
    assert writer.actions == ["tunnel.opened", "tunnel.renewed"]
    writer.room = 0
    assert isinstance(audit.decided(worker, asked(address="192.0.2.53"), GRANT), Grant)


def test_an_end_tells_what_was_over_a_rate(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    limited = msgspec.structs.replace(closed(1), rate_limited=4)
    audit.closed(worker, ClosedTunnels(1, (limited, closed(2))), lambda _: None)
    assert [rest.get("rate_limited") for _, _, rest in writer.events] == [4, None]


def test_an_end_is_acknowledged_once_it_is_written(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    heard: list[int] = []
    audit.closed(worker, ClosedTunnels(1, (closed(1), closed(2))), heard.append)
    audit.closed(worker, ClosedTunnels(3, (closed(3),)), heard.append)
    assert heard == []
    writer.write()
    assert heard == [3]
    assert writer.actions == ["tunnel.closed"] * 3
    _, target, rest = writer.events[0]
    assert (target, rest["actor"], rest["subject"]) == ("a.example:53", "192.0.2.1", "alice")
    assert rest["reason"] == "it was idle"
    assert (rest["tunnel"], rest["duration_s"], rest["drops"]) == ("s3g2c1t0", 1.5, 5)
    assert (rest["bytes_to_target"], rest["bytes_to_client"]) == (2, 4)


def test_an_end_that_is_said_again_is_recorded_once(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    heard: list[int] = []
    said = ClosedTunnels(1, (closed(1), closed(2)))
    audit.closed(worker, said, heard.append)
    audit.closed(worker, said, heard.append)
    assert len(writer.events) == 2
    writer.write()
    assert heard == [2]
    audit.closed(worker, said, heard.append)  # it did not hear that
    assert heard == [2, 2]
    assert len(writer.events) == 2


def test_ends_that_find_no_room_are_taken_later(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    heard: list[int] = []
    said = ClosedTunnels(1, (closed(1), closed(2), closed(3)))
    writer.room = 2
    audit.closed(worker, said, heard.append)
    writer.write()
    assert heard == [2]
    writer.room = 10
    audit.closed(worker, ClosedTunnels(3, (closed(3),)), heard.append)
    writer.write()
    assert heard == [2, 3]
    assert json.dumps([rest["tunnel"] for _, _, rest in writer.events]) == json.dumps(
        ["s3g2c1t0", "s3g2c2t0", "s3g2c3t0"]
    )


def test_what_a_worker_lost_is_recorded_once(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    for lost in (2, 2, 5):
        audit.closed(worker, ClosedTunnels(1, (), lost), lambda _: None)
    assert [rest["count"] for _, _, rest in writer.events] == [2, 3]


def test_the_tunnels_of_a_worker_that_died_have_ended(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    for connection in (1, 2, 3):
        audit.decided(worker, asked(connection), GRANT)
    audit.closed(worker, ClosedTunnels(1, (closed(5),)), lambda _: None)
    live = LiveTunnel(9, 0, "[2001:db8::1]:5", "b.example", 1, "udp", "", "carol", "r", 0.0, 0, 0)
    audit.seen(worker, live)
    audit.worker_ended(worker, exit_code=-9, has_died=True)
    assert writer.actions[4:] == ["worker.died", *["tunnel.closed"] * 4]
    died = writer.events[4][2]
    assert (died["exit_code"], died["tunnels"]) == (-9, 4)
    _, target, last = writer.events[-1]
    assert (target, last["actor"], last["subject"]) == ("b.example:1", "2001:db8::1", "carol")
    audit.worker_ended(worker, exit_code=0, has_died=False)
    assert len(writer.events) == 9


def test_a_worker_that_has_ended_is_granted_nothing_in_the_log(
    audit: TunnelAudit, writer: FakeWriter, worker: Worker
) -> None:
    cast(FakeProcess, worker.process).end(0)
    audit.decided(worker, asked(), GRANT)
    assert not writer.events


# the supervisor asks


def test_a_worker_hears_that_its_ends_are_taken(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(ClosedTunnels(1, (closed(1),)))
        assert [said for _, said in stage.sent(ClosedTaken)] == [ClosedTaken(1)]

    run(scenario)


def test_what_a_worker_refused_by_itself_is_heard(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int]] = []

    def refused(_: TunnelAudit, worker: Worker, refusals: Any) -> None:
        heard.extend((each.source, each.count) for each in refusals)

    monkeypatch.setattr(TunnelAudit, "refused", refused)

    async def scenario(stage: Stage) -> None:
        stage.say(Refusals((RefusedRequests("192.0.2.7", 400, "no port", "", 3),)))

    run(scenario)
    assert heard == [("192.0.2.7", 3)]


def test_decisions_still_reach_the_worker(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(question())
        await until(stage.answers)

    run(scenario)
