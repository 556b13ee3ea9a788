"""Every tunnel that was granted is told of when it ends, with what it carried and why it ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.worker.bench import DENIAL, GRANT, LIMITS, UNIX_NOW, Bench
from toppy.errors import TargetError
from toppy.model.target import Target
from toppy.net.udp_socket import SendResult
from toppy.wire.ipc_message import AdmissionRequest, ClosedTunnel


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def only(bench: Bench) -> ClosedTunnel:
    (closed,) = bench.shell.closed
    return closed


def test_the_end_tells_what_went_through(bench: Bench) -> None:
    stream_id = bench.open()
    for payload in (b"one", b"three"):
        bench.send(stream_id, payload)
    bench.target.results.append((SendResult.WOULD_BLOCK, 0))
    bench.send(stream_id, b"lost")
    bench.router.receive_from_target(bench.target.tunnel, b"back", 4, bench.link.now)
    bench.send_body(stream_id, b"", end=True)
    closed = only(bench)
    asked = bench.shell.asked[0]
    assert isinstance(asked, AdmissionRequest)
    assert (closed.connection, closed.quarter_stream_id) == (asked.connection, stream_id // 4)
    assert (closed.host, closed.port, closed.source) == (asked.host, asked.port, asked.source)
    assert (closed.subject, closed.rule) == (GRANT.subject, GRANT.rule)
    assert (closed.datagrams_to_target, closed.bytes_to_target, closed.drops) == (2, 8, 1)
    assert (closed.datagrams_to_client, closed.bytes_to_client) == (1, 4)
    assert closed.reason == "the client ended it"


def test_the_time_it_was_open_is_told(bench: Bench) -> None:
    bench.router.tick(bench.link.now, UNIX_NOW)
    stream_id = bench.open()
    bench.router.tick(bench.link.now, UNIX_NOW + 12.5)
    bench.send_body(stream_id, b"", end=True)
    assert only(bench).duration_s == 12.5


def test_a_clock_that_goes_back_makes_no_negative_time(bench: Bench) -> None:
    bench.router.tick(bench.link.now, UNIX_NOW)
    stream_id = bench.open()
    bench.router.tick(bench.link.now, UNIX_NOW - 100)
    bench.send_body(stream_id, b"", end=True)
    assert only(bench).duration_s == 0.0


def test_each_way_to_end_has_its_reason(bench: Bench) -> None:
    def reason() -> str:
        return bench.shell.closed[-1].reason

    stream_id = bench.open()
    bench.client.endpoint.abort_stream(bench.client.connection, stream_id, 0x10C)
    bench.settle()
    assert reason() == "the client gave it up"
    bench.open()
    bench.wait(LIMITS.tunnel_idle_timeout_s + 1)
    assert reason() == "it was idle"
    bench.open(grant=replace(GRANT, expires_at=UNIX_NOW + 1))
    bench.router.tick(bench.link.now, UNIX_NOW + 2)
    assert reason() == "its credential expired"


def test_a_tunnel_whose_rules_time_is_over_is_cut_with_the_rules_name(bench: Bench) -> None:
    bench.open(grant=replace(GRANT, expires_at=UNIX_NOW + 1, ends_with_rule=True))
    asked = bench.shell.asked[0]
    assert isinstance(asked, AdmissionRequest)
    bench.router.tick(bench.link.now, UNIX_NOW + 0.5)
    assert bench.shell.closed == []
    bench.router.tick(bench.link.now, UNIX_NOW + 1)
    target = Target(asked.host, asked.port)
    assert only(bench).reason == (
        f"target {target} is not allowed any more: the time of {GRANT.rule!r} is over"
    )
    assert bench.router.counters.tunnels_cut == 1


def test_a_tunnel_that_is_cut_says_what_its_client_is_told(bench: Bench) -> None:
    stream_id = bench.open()
    key = bench.target.tunnel.key
    assert key[1] == stream_id // 4
    bench.router.close_tunnels([key], DENIAL)
    assert only(bench).reason == DENIAL.details


def test_a_stop_ends_every_tunnel(bench: Bench) -> None:
    bench.open()
    bench.open()
    bench.router.close(bench.link.now)
    assert [closed.reason for closed in bench.shell.closed] == ["its worker ended"] * 2


def test_a_grant_whose_target_cannot_be_opened_has_an_end(bench: Bench) -> None:
    bench.shell.failure = TargetError("no way to the target")
    bench.request()
    bench.answer(GRANT)
    assert only(bench).reason == "no way to the target"
    assert only(bench).duration_s == 0.0


def test_a_grant_for_a_client_that_has_gone_has_an_end(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send_body(stream_id, b"", end=True)
    bench.answer(GRANT)
    assert only(bench).reason == "the client had gone before it opened"


def test_what_was_not_granted_has_no_end(bench: Bench) -> None:
    bench.request()
    bench.answer(DENIAL)
    bench.request()
    bench.wait(LIMITS.admission_timeout_s + 1)
    assert not bench.shell.closed
