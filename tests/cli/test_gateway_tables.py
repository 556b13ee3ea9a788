"""What operators read."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.cli.gateway_stub import status_facts
from toppy.cli.gateway_tables import (
    ago,
    render_connections,
    render_status,
    render_tunnels,
    render_upgrade,
    show,
)


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_status_shows_generations_and_workers() -> None:
    text = render_status(
        status_facts(drops={"queue_full": 7, "malformed": 1}, steered=False, rollout="switching")
    )
    assert "toppy-gw 9.9, engine native, generation 1, revision 1, up " in text
    assert "listening on [::]:4433 (without BPF steering), health on 127.0.0.1:8080" in text
    assert "a reload is under way: switching" in text
    assert "dropped: malformed 1, queue_full 7" in text
    shown = rows(text)
    assert any(row[:2] == ["g1", "active"] and row[-2:] == ["1", "s0"] for row in shown)
    (worker,) = (row for row in shown if row[:1] == ["s0"])
    assert worker[:5] == ["s0", "g1", "serving", "2", "native"]
    assert worker[-5:] == ["3", "4", "5", "6", "0"]


@pytest.mark.parametrize(
    ("ok", "text"),
    [(True, "ago: done: it says (1.2 s)"), (False, "FAILED, nothing has changed: it says (1.2 s)")],
)
def test_status_says_how_the_last_reload_went(ok: bool, text: str) -> None:
    reload = {"at": time.time() - 5, "ok": ok, "message": "it says", "duration_s": 1.234}
    assert text in render_status(status_facts(last_reload=reload))


def test_a_reload_that_failed_for_several_reasons_is_told_in_one_line() -> None:
    reload = {"at": 0.0, "ok": False, "message": "a: is bad\nb: is \x1b bad", "duration_s": 1.0}
    assert ": a: is bad; b: is \\x1b bad (1.0 s)" in render_status(status_facts(last_reload=reload))


def test_a_gateway_without_workers_or_health_can_be_shown() -> None:
    text = render_status(status_facts(workers=[], generations=[], health=""))
    assert "health on" not in text


def test_connections_and_tunnels_are_shown_in_one_line_each() -> None:
    connection = {
        "name": "s0g2c17",
        "slot": 0,
        "generation": 2,
        "source": "[2001:db8::1]:50000",
        "alpn": "h3",
        "tunnels": 2,
        "since": time.time() - 61,
        "round_trip_s": 0.0125,
    }
    unmeasured = {**connection, "round_trip_s": None}
    shown = rows(render_connections({"connections": [connection, unmeasured]}))
    assert shown[2] == [
        *("s0g2c17", "g2", "[2001:db8::1]:50000", "h3", "2", "1", "min", "1", "s", "12.5", "ms"),
    ]
    assert shown[3][-1] == "s"
    tunnel = {
        "name": "s0g2c17t0",
        "source": "192.0.2.1:50000",
        "protocol": "udp",
        "target": "[2001:db8::2]:53",
        "subject": "alice",
        "rule": "office DNS",
        "since": time.time() + 10,
        "bytes_to_target": 5,
        "bytes_to_client": 6_543_210,
    }
    waiting = {**tunnel, "protocol": "tcp", "since": 0.0}
    shown = rows(render_tunnels({"tunnels": [tunnel, waiting]}))
    assert shown[2] == [
        *("s0g2c17t0", "alice", "192.0.2.1:50000", "udp", "[2001:db8::2]:53", "office", "DNS"),
        *("0", "s", "5", "B", "6.5", "MB"),
    ]
    assert shown[3][3] == "tcp"
    assert shown[3][7:9] == ["not", "yet"]  # its target is being reached


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (5 * 10**9, "5.0 GB")],
)
def test_bytes_are_shown_in_powers_of_a_thousand(count: int, text: str) -> None:
    tunnel = {
        **dict.fromkeys(("name", "source", "protocol", "target", "subject", "rule"), "x"),
        "since": time.time(),
        "bytes_to_target": count,
        "bytes_to_client": 0,
    }
    assert text in render_tunnels({"tunnels": [tunnel]})


def test_what_strangers_chose_cannot_command_the_terminal_or_be_markup() -> None:
    tunnel = {
        "name": "s0g1c1t0",
        "source": "192.0.2.1:1",
        "protocol": "udp",
        "target": "192.0.2.2:1",
        "subject": "\x1b[2J[red]eve[/red]\r\n\x9b1m é",
        "rule": "r",
        "since": 0.0,
        "bytes_to_target": 0,
        "bytes_to_client": 0,
    }
    text = render_tunnels({"tunnels": [tunnel]})
    assert r"\x1b[2J[red]eve[/red]\r\n\x9b1m é" in text
    assert len(text.splitlines()) == 3
    assert show("\u202e") == r"\u202e"


def test_a_very_long_name_is_not_cut() -> None:
    text = render_status(status_facts(configuration="/" + "x" * 400))
    assert "x" * 400 in text


def test_upgrade_says_which_code_serves() -> None:
    facts = {"from": "1", "to": "2", "pid": 3, "generation": 4, "revision": 5, "duration_s": 0.1}
    assert render_upgrade(facts) == (
        "toppy-gw 2 serves in the place of 1: generation 4, revision 5, pid 3"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0 s"), (65, "1 min 5 s"), (7260, "2 h 1 min"), (90_000, "1 d 1 h"), (-9, "0 s")],
)
def test_how_long_ago(seconds: float, text: str) -> None:
    assert ago(time.time() - seconds) == text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "audit log /a.jsonl: 7 entries"),
        ({"shipped": 5, "ship_problem": "down"}, "7 entries, 5 shipped; not shipped: down"),
        (
            {"lost": 2, "problem": "disk full", "waiting": 9},
            "7 entries, 2 LOST; CANNOT BE WRITTEN, 9 wait: disk full",
        ),
    ],
)
def test_the_audit_log_is_part_of_the_status(changes: dict[str, Any], expected: str) -> None:
    audit = {
        "path": "/a.jsonl",
        "entries": 7,
        "waiting": 0,
        "lost": 0,
        "problem": None,
        "shipped": None,
        "ship_problem": None,
    }
    assert expected in render_status(status_facts(audit=audit | changes))
    assert "audit" not in render_status(status_facts(audit=audit | {"path": None}))


def test_one_of_a_thing_is_not_many() -> None:
    text = render_status(status_facts(connections=1, tunnels=1, worker_deaths=1))
    assert "\n1 connection, 1 tunnel, 1 worker death\n" in text
    text = render_status(status_facts(connections=0, tunnels=2, worker_deaths=0))
    assert "\n0 connections, 2 tunnels, 0 worker deaths\n" in text


@pytest.mark.parametrize(
    ("days", "expected"),
    [(400, "days left"), (12, "12 days left: REPLACE IT"), (-1, "certificate EXPIRED on ")],
)
def test_the_certificates_end_is_part_of_the_status(days: int, expected: str) -> None:
    own = {"ends_at": time.time() + days * 86_400, "days_left": days}
    far = {"ends_at": time.time() + 999 * 86_400, "days_left": 999}
    text = render_status(status_facts(certificates={"server": own, "client_ca": far}))
    assert expected in text
    assert "CA of clients" not in text
    near = render_status(status_facts(certificates={"server": far, "client_ca": own}))
    assert ("CA of clients" in near) is (days < 30)
    assert "REPLACE IT" not in render_status(status_facts(certificates={"server": far}))
