"""What a worker refuses without asking is counted for the audit log, in a table with a bound."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from tests.quic.link import CLIENT
from tests.worker.bench import DENIAL, LIMITS, Bench
from toppy.model.grant import Denial
from toppy.protocol.refusal_tally import OTHERS
from toppy.wire.ipc_message import (
    MAX_MESSAGE_BYTES,
    Refusals,
    RefusedRequests,
    encode_message,
    parse_from_worker,
)
from toppy.worker.refusals import RefusalTable

FULL = Denial(429, "connection_limit_reached", "too many tunnels on this connection")
WRONG = Denial(400, "http_request_error", "the port is no number")


@dataclass
class Channel:
    """What was said."""

    said: list[Refusals] = field(default_factory=list)
    has_room: bool = True

    def send(self, message: Refusals) -> bool:
        if self.has_room:
            self.said.append(message)
        return self.has_room


def test_refusals_that_are_alike_are_one_with_a_count() -> None:
    table, channel = RefusalTable(), Channel()
    table.add("192.0.2.1", "a:1", FULL)
    table.add("192.0.2.1", "a:2", FULL)
    table.add("192.0.2.1", "", WRONG)
    table.send(channel.send)
    assert channel.said == [
        Refusals(
            (
                RefusedRequests("192.0.2.1", 429, FULL.details, "a:2", 2),
                RefusedRequests("192.0.2.1", 400, WRONG.details, "", 1),
            )
        )
    ]
    table.send(channel.send)
    assert len(channel.said) == 1  # nothing new


def test_sources_beyond_the_bound_are_counted_together() -> None:
    table, channel = RefusalTable(most_kinds=2), Channel()
    for number in range(1000):
        table.add(f"192.0.2.{number}", "a:1", FULL)
    table.send(channel.send)
    (said,) = channel.said
    assert [each.count for each in said.refused] == [1, 1, 998]
    assert (said.refused[2].source, said.refused[2].reason) == ("", OTHERS)


def test_what_the_channel_does_not_take_is_told_later_in_full() -> None:
    table, channel = RefusalTable(), Channel(has_room=False)
    table.add("192.0.2.1", "a:1", FULL)
    table.send(channel.send)
    table.add("192.0.2.1", "a:1", FULL)
    channel.has_room = True
    table.send(channel.send)
    assert [each.count for each in channel.said[0].refused] == [2]


def test_a_full_table_fits_a_message() -> None:
    table, channel = RefusalTable(), Channel()
    for number in range(200):
        table.add(f"2001:db8::{number}", "h" * 260, replace(WRONG, details="d" * 1000))
    table.send(channel.send)
    data = encode_message(channel.said[0])
    assert len(data) < MAX_MESSAGE_BYTES
    assert parse_from_worker(data) == channel.said[0]


# the router tells


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_a_request_that_is_wrong_is_told(bench: Bench) -> None:
    bench.request("/.well-known/masque/udp/dns.example/0/")
    ((source, target, status, reason),) = bench.shell.refusals
    assert (source, target, status) == (CLIENT[0], "", 400)
    assert reason


def test_one_tunnel_too_many_is_told_with_its_target(bench: Bench) -> None:
    for _ in range(LIMITS.max_tunnels_per_connection + 1):
        bench.request("/.well-known/masque/udp/dns.example/53/")
    ((_, target, status, _),) = bench.shell.refusals
    assert (target, status) == ("dns.example:53", 429)


def test_a_question_that_cannot_be_asked_is_told(bench: Bench) -> None:
    bench.shell.can_ask = False
    bench.request("/.well-known/masque/udp/dns.example/53/")
    assert [(target, status) for _, target, status, _ in bench.shell.refusals] == [
        ("dns.example:53", 429)
    ]


def test_an_answer_that_never_comes_is_told(bench: Bench) -> None:
    bench.request("/.well-known/masque/udp/dns.example/53/")
    bench.wait(LIMITS.admission_timeout_s + 1)
    assert [(target, status) for _, target, status, _ in bench.shell.refusals] == [
        ("dns.example:53", 504)
    ]


def test_what_the_control_plane_denied_it_knows(bench: Bench) -> None:
    bench.request()
    bench.answer(DENIAL)
    assert not bench.shell.refusals
