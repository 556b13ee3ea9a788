"""Tunnels under limits: what is over them is dropped and counted, and the control plane is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.worker.bench import GRANT, LIMITS, Bench
from toppy.model.grant import Denial
from toppy.model.rate import Budget, DirectionLimits, Rate, TunnelLimits
from toppy.quic.endpoint import PING_ALPN
from toppy.quic.engine import ConnectionClosed
from toppy.wire.ipc_message import BudgetUse, SetBudgets, TunnelChange, Usage

UNAUTHENTICATED = Denial(401, "http_request_denied", "the token is wrong")
TIGHT = DirectionLimits(bytes=Rate(1, 250))
LIMITED = replace(GRANT, limits=TunnelLimits(TIGHT))
SHARED = Budget("web\0", TIGHT, TIGHT)
SHARING = replace(GRANT, limits=TunnelLimits(budgets=(SHARED,)))


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def told(bench: Bench) -> list[Usage]:
    found: list[Usage] = []

    def send(usage: Usage) -> bool:
        found.append(usage)
        return True

    bench.router.metering.send(send)
    return found


# rates


def test_what_is_over_the_rate_to_the_target_is_dropped_and_counted(bench: Bench) -> None:
    stream_id = bench.open(LIMITED)
    bench.send(stream_id, *[b"x" * 100] * 5)
    assert bench.target.sent == [b"x" * 100] * 2
    assert bench.drops() == {"rate_limited": 3}
    bench.send_body(stream_id, b"", end=True)
    (closed,) = bench.shell.closed
    assert (closed.datagrams_to_target, closed.bytes_to_target) == (2, 200)
    assert (closed.drops, closed.rate_limited) == (3, 3)


def test_what_is_over_the_rate_to_the_client_is_dropped_and_counted(bench: Bench) -> None:
    stream_id = bench.open(LIMITED)
    bench.from_target(*[b"x" * 100] * 5)
    assert bench.payloads(stream_id) == [b"x" * 100] * 2
    assert bench.drops() == {"rate_limited": 3}


def test_a_stretch_is_cut_between_datagrams(bench: Bench) -> None:
    stream_id = bench.open(LIMITED)
    tunnel = bench.target.tunnel
    bench.router.receive_from_target(tunnel, b"a" * 100 + b"b" * 100 + b"c", 100, bench.link.now)
    bench.router.receive_from_target(tunnel, b"d" * 40 + b"e" * 40, 40, bench.link.now)
    bench.settle()
    assert bench.payloads(stream_id) == [b"a" * 100, b"b" * 100, b"c", b"d" * 40]
    assert bench.drops() == {"rate_limited": 1}


def test_what_came_before_the_grant_is_charged_too(bench: Bench) -> None:
    stream_id = bench.request()
    bench.send(stream_id, *[b"x" * 100] * 4)
    bench.answer(LIMITED)
    assert bench.target.sent == [b"x" * 100] * 2


def test_an_echo_is_charged_in_both_directions(bench: Bench) -> None:
    there = TunnelLimits(budgets=(Budget("b", to_target=DirectionLimits(bytes=Rate(1, 250))),))
    echo = replace(GRANT, addresses=(), is_echo=True, limits=there)
    stream_id = bench.open(echo)
    bench.send(stream_id, *[b"x" * 100] * 5)
    assert bench.payloads(stream_id) == [b"x" * 100] * 2


def test_time_brings_room_again(bench: Bench) -> None:
    grant = replace(GRANT, limits=TunnelLimits(DirectionLimits(bytes=Rate(100, 100))))
    stream_id = bench.open(grant)
    bench.send(stream_id, b"x" * 100, b"y" * 100)
    bench.settle(1.5)
    bench.send(stream_id, b"z" * 100)
    assert bench.target.sent == [b"x" * 100, b"z" * 100]


# budgets


def test_tunnels_share_a_budget_and_its_use_is_told(bench: Bench) -> None:
    first, second = bench.open(SHARING), bench.open(SHARING)
    bench.send(first, b"x" * 200)
    bench.send(second, b"x" * 100)
    assert bench.drops() == {"rate_limited": 1}
    assert told(bench) == [Usage(2, (BudgetUse("web\0", 2, 200, 300, 0, 2, 0),))]
    assert told(bench) == []
    bench.send_body(first, b"", end=True)
    bench.send_body(second, b"", end=True)
    assert told(bench) == [Usage(2, (BudgetUse("web\0", 0, 0, 0, 0, 0, 0),))]


def test_what_the_channel_does_not_take_is_told_later_in_sum(bench: Bench) -> None:
    stream_id = bench.open(SHARING)
    for _ in range(2):
        bench.send(stream_id, b"x" * 50)
        bench.router.metering.send(lambda _: False)
    assert told(bench) == [Usage(1, (BudgetUse("web\0", 1, 100, 100, 0, 2, 0),))]


def test_the_control_plane_may_change_a_part_at_any_time(bench: Bench) -> None:
    stream_id = bench.open(SHARING)
    less = replace(SHARED, to_target=DirectionLimits(bytes=Rate(1, 100)))
    bench.router.metering.set_budgets(SetBudgets((less,)), bench.link.now)
    bench.send(stream_id, b"x" * 100, b"y" * 100)
    assert bench.target.sent == [b"x" * 100]


def test_a_quota_that_is_used_up_is_another_reason(bench: Bench) -> None:
    budget = Budget("web\0alice", quota_left=150)
    stream_id = bench.open(replace(GRANT, limits=TunnelLimits(budgets=(budget,))))
    bench.send(stream_id, b"x" * 100, b"y" * 100)
    assert bench.drops() == {"quota_used_up": 1}
    assert told(bench) == [Usage(1, (BudgetUse("web\0alice", 1, 100, 200, 0, 2, 0),))]


def test_grants_that_came_too_late_are_counted_all_the_same(bench: Bench) -> None:
    bench.request()
    bench.wait(LIMITS.admission_timeout_s + 1)
    bench.answer(SHARING)
    assert told(bench) == [Usage(1, ())]


def test_a_new_control_plane_is_told_everything(bench: Bench) -> None:
    bench.open(SHARING)
    told(bench)
    bench.router.metering.tell_again()
    assert told(bench) == [Usage(0, (BudgetUse("web\0", 1, 0, 0, 0, 0, 0),))]


# changes


def test_a_live_tunnel_goes_on_under_other_limits(bench: Bench) -> None:
    stream_id = bench.open()
    bench.send(stream_id, *[b"x" * 100] * 5)
    assert len(bench.target.sent) == 5
    connection = bench.target.tunnel.connection
    changes = [
        TunnelChange(connection, stream_id // 4, "renamed", LIMITED.limits),
        TunnelChange(connection, 999, "unknown", LIMITED.limits),
    ]
    bench.router.metering.set_limits(changes, bench.link.now)
    bench.send(stream_id, *[b"x" * 100] * 5)
    assert len(bench.target.sent) == 7
    (live,) = bench.router.live_tunnels(with_authorization=False)
    assert live.rule == "renamed"
    bench.router.metering.set_limits(
        [TunnelChange(connection, stream_id // 4, "free", GRANT.limits)], bench.link.now
    )
    bench.send(stream_id, *[b"x" * 100] * 3)
    assert len(bench.target.sent) == 10


# refusals


def test_a_denial_says_when_to_ask_again(bench: Bench) -> None:
    stream_id = bench.request()
    bench.answer(Denial(429, "connection_limit_reached", "too many", "web", retry_after_s=7))
    assert bench.status(stream_id) == 429
    assert bench.fields(stream_id)["retry-after"] == "7"


def guessing(engine: str, *, alpn: str = "h3", per_min: int = 2) -> Bench:
    limits = replace(
        LIMITS,
        max_failed_auth_per_source_per_min=per_min,
        max_failed_auth_per_connection=100,
    )
    return Bench(engine, alpn=alpn, limits=limits)


@pytest.mark.parametrize("engine", ["native", "aioquic"])
def test_a_source_with_too_many_refused_credentials_is_not_listened_to(engine: str) -> None:
    bench = guessing(engine)
    for _ in range(2):
        bench.request(token="wrong")
        bench.answer(UNAUTHENTICATED)
    asked = len(bench.shell.asked)
    stream_id = bench.request(token="also wrong")
    assert bench.status(stream_id) == 429
    assert 0 < int(bench.fields(stream_id)["retry-after"]) <= 30
    assert len(bench.shell.asked) == asked
    # a moment later it may try once more
    bench.settle(29.0)
    bench.settle(2.0)
    assert bench.status(bench.request(token="wrong")) is None


def test_who_goes_on_guessing_loses_the_connection() -> None:
    limits = replace(LIMITS, max_failed_auth_per_source_per_min=2)
    bench = Bench("native", limits=limits)
    for _ in range(2):
        bench.request(token="wrong")
        bench.answer(UNAUTHENTICATED)
    assert not bench.client.of(ConnectionClosed)
    bench.request(token="wrong")
    (closed,) = bench.client.of(ConnectionClosed)
    assert closed.reason == "too many failed authentications"


def test_a_credential_that_was_good_is_let_through_whatever_others_do() -> None:
    bench = guessing("native")
    good = bench.request(token="good")
    bench.answer(GRANT)
    assert bench.status(good) == 200
    for _ in range(2):
        bench.request(token="wrong")
        bench.answer(UNAUTHENTICATED)
    assert bench.status(bench.request(token="unheard of")) == 429
    again = bench.request(token="good")
    bench.answer(GRANT)
    assert bench.status(again) == 200


def test_without_a_limit_every_credential_is_looked_at() -> None:
    bench = guessing("native", per_min=0)
    for _ in range(20):
        bench.request(token="wrong")
        bench.answer(UNAUTHENTICATED)
    assert len(bench.shell.asked) == 20


def test_pings_count_as_attempts_too() -> None:
    bench = guessing("native", alpn=PING_ALPN)
    answers: list[bytes] = []
    for _ in range(4):
        stream_id = bench.client.engine.open_stream(bench.client.connection)
        assert stream_id is not None
        bench.client.engine.send_stream(
            bench.client.connection, stream_id, b"ping wrong\n", end=True
        )
        bench.settle()
        if len(bench.shell.asked) == len(answers) + 1:
            bench.answer_token(is_valid=False)
        answers.append(bench.raw(stream_id))
    assert answers == [b"unauthorized"] * 4
    assert len(bench.shell.asked) == 2
