"""Bounds on connections and handshakes."""

from __future__ import annotations

from toppy.quic.engine import Address, Admission
from toppy.quic.gate import ConnectionGate, GateLimits, source_key

A: Address = ("192.0.2.1", 1000)
B: Address = ("192.0.2.2", 1000)


def make_gate(
    *, connections: int = 10, per_source: int = 5, retry: int = 5, timeout_s: float = 3.0
) -> ConnectionGate:
    return ConnectionGate(GateLimits(connections, per_source, retry, timeout_s))


def test_a_connection_within_all_bounds_is_accepted() -> None:
    assert make_gate().decide(A, False) is Admission.ACCEPT


def test_beyond_the_bound_of_one_source_only_that_source_is_refused() -> None:
    gate = make_gate(per_source=2)
    gate.accepted(1, A, 0.0)
    gate.accepted(2, A, 0.0)
    assert gate.decide(A, True) is Admission.REFUSE
    assert gate.decide(B, True) is Admission.ACCEPT
    assert gate.refused == 1


def test_a_closed_connection_makes_room() -> None:
    gate = make_gate(connections=1)
    gate.accepted(1, A, 0.0)
    assert gate.decide(B, True) is Admission.REFUSE
    gate.closed(1)
    assert gate.decide(B, True) is Admission.ACCEPT
    assert gate.connections == 0


def test_while_handshakes_pile_up_an_unproven_address_is_asked_to_retry() -> None:
    gate = make_gate(retry=1)
    gate.accepted(1, A, 0.0)
    assert gate.decide(B, False) is Admission.RETRY
    assert gate.decide(B, True) is Admission.ACCEPT
    gate.completed(1)
    assert gate.decide(B, False) is Admission.ACCEPT
    assert gate.retried == 1


def test_only_handshakes_that_are_not_done_become_overdue() -> None:
    gate = make_gate(timeout_s=3.0)
    gate.accepted(1, A, 0.0)
    gate.accepted(2, A, 1.0)
    gate.accepted(3, A, 2.0)
    gate.completed(2)
    assert gate.overdue(2.9) == []
    assert gate.overdue(5.0) == [1, 3]


def test_closed_tells_whether_the_handshake_was_done() -> None:
    gate = make_gate()
    gate.accepted(1, A, 0.0)
    gate.accepted(2, A, 0.0)
    gate.completed(1)
    assert gate.closed(1)
    assert not gate.closed(2)


def test_one_source_is_an_ipv4_address_or_an_ipv6_slash_64() -> None:
    assert source_key("192.0.2.1") == "192.0.2.1"
    assert source_key("2001:db8:1:2::5") == source_key("2001:db8:1:2:ffff::9")
    assert source_key("2001:db8:1:2::5") != source_key("2001:db8:1:3::5")
    assert source_key("::ffff:192.0.2.1") == "192.0.2.1"
    assert source_key("fe80::1%3") == source_key("fe80::2%3")


def attempts(gate: ConnectionGate, source: Address, count: int, *, proved: bool) -> list[Admission]:
    return [gate.decide(source, proved) for _ in range(count)]


def test_a_source_that_tries_too_often_must_prove_its_address_and_is_refused_in_the_end() -> None:
    gate = ConnectionGate(GateLimits(100, 5, 100, 3.0, attempts_per_source_per_s=3))
    accept, retry, refuse = Admission.ACCEPT, Admission.RETRY, Admission.REFUSE
    assert attempts(gate, A, 7, proved=False) == [accept] * 5 + [retry] * 2
    assert attempts(gate, A, 7, proved=True) == [accept] * 5 + [refuse] * 2
    assert (gate.retried, gate.refused) == (2, 2)
    # another source is not concerned
    assert gate.decide(B, False) is accept


def test_what_a_source_may_try_comes_back_with_time() -> None:
    gate = ConnectionGate(GateLimits(100, 5, 100, 3.0, attempts_per_source_per_s=3))
    attempts(gate, A, 6, proved=True)
    gate.overdue(1.0)
    assert attempts(gate, A, 4, proved=True) == [Admission.ACCEPT] * 3 + [Admission.REFUSE]


def test_forged_sources_use_up_nothing_of_what_the_true_one_may() -> None:
    gate = ConnectionGate(GateLimits(100, 5, 100, 3.0, attempts_per_source_per_s=3))
    attempts(gate, A, 1000, proved=False)
    assert attempts(gate, A, 5, proved=True) == [Admission.ACCEPT] * 5
