"""The benchmark's crowd against a real gateway, and the shape of what its cases report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from integration.bench import scale
from integration.bench import setup as set_up
from integration.bench.crowd import CrowdProcess, crowds, shares, together
from integration.conftest import Peer
from integration.processes import Gateway, running_gateway

pytestmark = pytest.mark.xdist_group("bench-crowd")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("gw"), rules=set_up.rules(3)) as running:
        yield running


@pytest.fixture
def members(gateway: Gateway, echo: Peer) -> Iterator[list[CrowdProcess]]:
    with crowds(gateway, (echo.host, echo.port), count=2) as started:
        yield started


def test_each_process_does_its_share(members: list[CrowdProcess]) -> None:
    details = [
        {"count": share, "at_once": 2, "with_tunnel": True, "deadline_s": 20.0}
        for share in shares(5, 2)
    ]
    results = together(members, "connect", details)
    assert [result["done"] for result in results] == [3, 2]
    assert [result["failures"] for result in results] == [{}, {}]
    assert [len(result["connected_ms"]) for result in results] == [3, 2]
    assert members[0].ask("count") == {"connections": 3, "tunnels": 3, "lost": {}}


def test_tunnels_are_opened_at_a_pace_and_carry_datagrams(members: list[CrowdProcess]) -> None:
    member = members[0]
    assert member.ask("connect", count=2, deadline_s=20.0)["done"] == 2
    opened = member.ask("open", count=7, rate=100.0, deadline_s=20.0)
    assert (opened["done"], opened["failures"]) == (7, {})
    assert opened["seconds"] >= 0.06
    sent = member.ask("send", rate=500.0, seconds=0.5, size=200)
    assert sent["sent"] == sent["received"] > 0
    assert sent["us"]
    assert member.ask("close_tunnels", keep=3)["tunnels"] == 3
    assert member.ask("close")["connections"] == 0


def test_more_tunnels_than_streams_are_free_at_first_are_opened(
    members: list[CrowdProcess],
) -> None:
    member = members[0]
    assert member.ask("connect", count=1, deadline_s=20.0)["done"] == 1
    opened = member.ask("open", count=900, at_once=900, deadline_s=20.0)
    assert (opened["done"], opened["failures"]) == (900, {})


def test_a_refusal_is_counted_as_such(gateway: Gateway, echo: Peer) -> None:
    stranger = replace(gateway, token="not-the-token")
    with crowds(stranger, (echo.host, echo.port), count=1) as (member,):
        result = member.ask("connect", count=3, with_tunnel=True, deadline_s=20.0)
    assert (result["done"], result["failures"]) == (0, {"status 401": 3})


def phase(**more: Any) -> dict[str, Any]:
    return {
        "done": 10,
        "failures": {},
        "per_s": 100.0,
        "ms": {"p50": 1.0, "p99": 2.0, "max": 3.0},
        "connected_ms": {"p50": 1.0, "p99": 2.0, "max": 3.0},
        "cpu_ms": {"worker": 1.0, "control": 1.0, "client": 1.0},
        "busy": {"worker": 0.5, "control": 0.5, "client": 0.5},
        "per_core_s": 1000.0,
        **more,
    }


def test_the_report_on_set_up_names_what_is_missing(tmp_path: Path) -> None:
    run = {
        "rules": 20,
        "tunnels": {"steady": [phase(rate=100), phase(rate=250)], "highest": phase()},
        "connections": {
            "handshake": phase(),
            "with first tunnel": phase(),
            "steady": phase(rate=50),
        },
        "cold": {"without resumption": phase(), "with resumption": {"missing": "not there"}},
    }
    text = set_up.report([run, run], tmp_path / "performance")
    assert text.startswith("## ")
    assert "not measured: not there" in text
    assert "](performance/tunnel-set-up.svg)" in text
    assert (tmp_path / "performance" / "tunnel-set-up.svg").exists()


def test_the_report_on_scale_has_its_plot(tmp_path: Path) -> None:
    empty = {"pss_mib": 20.0, "rss_mib": 30.0, "slab_mib": 100.0}
    each = {"pss_kib_each": 10.0, "rss_kib_each": 10.0, "slab_kib_each": 2.0}
    memory = [{"count": 100, "failures": {}, **empty, **each}]
    idle = [{"count": 0, "worker": 0.1, "control": 0.2}]
    busy = [
        {
            "tunnels": count,
            "rate": 1000,
            "sent": 10,
            "received": 9,
            "worker_us": 5.0,
            "p50_us": 100.0,
            "p99_us": 200.0,
        }
        for count in (100, 1)
    ]
    kind = {"empty": empty, "memory": memory, "idle": idle, "lost": [{}, {}]}
    run = {
        "connections": kind,
        "tunnels": {**kind, "busy": busy, "after": empty},
        "on_connections": 10,
        "idle_s": 10.0,
    }
    text = scale.report([run], tmp_path / "performance")
    assert text.startswith("## ")
    assert "](performance/cost-by-tunnels.svg)" in text
    assert (tmp_path / "performance" / "cost-by-tunnels.svg").exists()
