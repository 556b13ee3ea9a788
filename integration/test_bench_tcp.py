"""The benchmark of TCP through the gateway: what it measures is what went through."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.bench import tcp_paths
from integration.bench.figures import Figures
from integration.bench.forward import DIRECT
from integration.bench.peers import PeerMissing
from integration.bench.tcp import AT_ONCE, measure_idle, measure_way, report
from integration.bench.tcp_ways import TOPPY, WAYS


def test_a_way_through_the_gateway_is_measured_in_both_directions() -> None:
    with WAYS[TOPPY]() as way:
        found = measure_way(way, 0.25)
    for load in ("up", "down", "many_up", "many_down"):
        assert found[load]["mb_s"] > 0
        assert set(found[load]["cpu_s_per_gb"]) == {"gateway", "client"}
    for at_once in AT_ONCE:
        exchange = found["exchange"][str(at_once)]
        assert exchange["per_s"] > 0
        assert 0 < exchange["p50_us"] <= exchange["p99_us"]


@pytest.mark.parametrize("name", ["ssh -L", "sing-box, Hysteria2", "sing-box, TUIC"])
def test_another_tunnel_carries_or_says_why_it_is_not_here(name: str) -> None:
    try:
        with WAYS[name]() as way:
            assert set(way.processes) == {"gateway", "client"}
    except PeerMissing as missing:
        pytest.skip(str(missing))


def test_idle_tunnels_are_counted_by_what_both_processes_grow() -> None:
    found = measure_idle(50)
    assert found["count"] == 50
    assert {"gateway_kib", "client_kib"} < set(found)


def test_a_path_in_namespaces_carries_toppy_and_the_kernels_flows_or_says_why_not() -> None:
    found = tcp_paths.measure(is_quick=True)
    if "missing" in found:
        pytest.skip(found["missing"])
    case = found["cases"][tcp_paths.SHARED]["toppy and kernel's CUBIC"]
    assert case["path"]["failures"] == 0
    assert all(sum(bins) > 0 for bins in case["bins"])


def _way(mb_s: float, **cpu: float) -> Figures:
    bulk = {"mb_s": mb_s, "cpu_s_per_gb": cpu}
    exchange = {"per_s": 6000.0, "p50_us": 160.0, "p99_us": 400.0, "cpu_us": cpu}
    loads = ("up", "down", "many_up", "many_down")
    return {**dict.fromkeys(loads, bulk), "exchange": {str(n): exchange for n in AT_ONCE}}


def test_the_report_compares_what_is_here_and_names_what_is_not(tmp_path: Path) -> None:
    case = {
        "bins": [[12e6] * 12, [3e6] * 12],
        "mb_s": [12.0, 3.0],
        "path": {"failures": 0, "queue_full": 0.015, "most_late_ms": 1.0},
    }
    figures = {
        "ways": {
            DIRECT: _way(2000.0),
            TOPPY: _way(400.0, gateway=1.25, client=1.5),
            "sing-box, TUIC": _way(200.0, gateway=2.5, client=2.75),
            "ssh -L": {"missing": "sshd is not installed"},
        },
        "idle": {"count": 1000, "gateway_kib": 5.7, "client_kib": 5.4},
        "paths": {
            "cases": {
                path: {" and ".join(flows): case for flows in cases}
                for path, cases in tcp_paths.CASES.items()
            },
            "up": {tcp_paths.LOSSY: {"bins": [45e6], "mb_s": 45.0}},
        },
    }
    text = report([figures], tmp_path / "plots")
    assert f"| {TOPPY} | 400 | 400 | 400 | 400 | 1.00 |" in text
    assert "| sing-box, TUIC | 200 | 200 | 200 | 200 | 2.00 |" in text
    assert f"| {TOPPY} | 1.25 | 1.50 | 1.25 | 1.50 | 1.25 | 1.50 |" in text
    assert f"| {TOPPY} | 6,000 | 160 | 400 | 6,000 |" in text
    assert "- at least 1.3 times sing-box, TUIC: 2.00" in text
    assert "gateway 5.7 KiB, client 5.4 KiB" in text
    assert "- ssh -L: sshd is not installed" in text
    assert "| 200 Mbit/s, 1 % loss | toppy and toppy | 12.0 | 3.0 | 1.50 % |" in text
    assert "- at least 40 MB/s with 1 % loss: 12.0 to the client, 45.0 to the target" in text
    assert "two toppy flows share 4.00 : 1" in text
    assert "kernel's CUBIC keeps 25 % of what it has alone" in text
    for name in ("tcp.svg", "tcp-shares.svg"):
        assert (tmp_path / "plots" / name).exists()


def test_a_host_without_the_path_is_said_so(tmp_path: Path) -> None:
    text = tcp_paths.report([{"missing": "the path needs root"}], tmp_path)
    assert "Not measured: the path needs root." in text
