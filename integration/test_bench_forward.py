"""The benchmark of local TCP forwarding: what it measures is what went through."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from integration.bench import forward
from integration.bench.forward import DIRECT, TOPPY, WAYS, measure_way, report
from integration.bench.peers import PeerMissing


def test_a_way_is_measured() -> None:
    with WAYS[TOPPY]() as way:
        found = measure_way(way, 0.1)
    assert found["one"]["gbit_s"] > 0
    assert found["many"]["gbit_s"] > 0
    assert found["connect"]["per_s"] > 0
    assert 0 < found["connect"]["p50_us"] <= found["connect"]["p99_us"]


@pytest.mark.parametrize("name", [name for name in WAYS if name not in (TOPPY, DIRECT)])
def test_a_forwarder_carries_or_says_why_it_is_not_here(name: str) -> None:
    try:
        with (
            WAYS[name]() as way,
            socket.create_server((way.target_host, way.target_port)) as target,
            socket.create_connection((way.host, way.port), timeout=10) as app,
        ):
            app.sendall(b"hello")
            target.settimeout(10)
            sock, _ = target.accept()
            with sock:
                assert sock.recv(5) == b"hello"
    except PeerMissing as missing:
        pytest.skip(str(missing))


def test_the_report_compares_what_is_here_and_names_what_is_not() -> None:
    bulk = {"gbit_s": 12.34, "cpu_s_per_gb": 0.25}
    way = {
        "one": bulk,
        "many": bulk,
        "connect": {"per_s": 2500.0, "p50_us": 400.0, "p99_us": 900.0, "cpu_us": 123.4},
    }
    figures = {
        "ways": {DIRECT: way, TOPPY: way, "haproxy": {"missing": "haproxy is not installed"}},
        "paces": {
            str(mib): {"bytes_per_s": 1.01 * (mib << 20), "cpu_share": 0.02}
            for mib in forward._PACES_MIB
        },
    }
    text = report([figures], Path())
    assert f"| {TOPPY} | 12.3 | 0.25 | 12.3 | 0.25 |" in text
    assert f"| {DIRECT} | 12.3 | – | 12.3 | – |" in text
    assert f"| {TOPPY} | 2,500 | 400 | 900 | 123 |" in text
    assert "| 10 | 10.10 | +1.00 % | 2.0 % |" in text
    assert "- haproxy: haproxy is not installed" in text
