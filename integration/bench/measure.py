"""One measurement each: a rate one way, an echo, with every process watched from outside."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from integration.peers import start_peer
from integration.processes import (
    Gateway,
    free_udp_port,
    running_gateway,
    running_udp_client,
    wait_until,
)

SIZE = 1200
_LOAD = [sys.executable, "-m", "integration.bench.load"]


@dataclass(frozen=True, slots=True)
class OneWay:
    """What one offered rate did."""

    offered: float
    sent: int
    received: int
    rate: float
    """Delivered per second."""
    gateway_us: float
    """CPU of the workers per delivered datagram, in microseconds."""
    client_us: float
    gateway_rss_mib: float
    client_rss_mib: float

    @property
    def lost(self) -> int:
        return self.sent - self.received


@dataclass(frozen=True, slots=True)
class Echo:
    """Round trips."""

    sent: int
    received: int
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Way:
    """A path to measure: where to send, what arrives where, and who works in between."""

    port: int
    target_port: int
    gateway: tuple[psutil.Process, ...] = ()
    client: tuple[psutil.Process, ...] = ()


@contextlib.contextmanager
def way_through_gateway(engine: str, workers: int) -> Iterator[Way]:
    """App port of a ``toppy udp`` whose gateway leads to ``target_port``."""
    directory = Path(tempfile.mkdtemp(prefix="toppy-bench-"))
    target_port = free_udp_port()
    with running_gateway(directory, workers=workers, engine=engine) as gateway:
        target = f"127.0.0.1:{target_port}"
        with running_udp_client(gateway, target, engine=engine) as (port, client):
            yield Way(port, target_port, _workers(gateway), (psutil.Process(client.process.pid),))


def _workers(gateway: Gateway) -> tuple[psutil.Process, ...]:
    return tuple(psutil.Process(worker["pid"]) for worker in gateway.status()["workers"])


def _cpu_s(processes: tuple[psutil.Process, ...]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _rss_mib(processes: tuple[psutil.Process, ...]) -> float:
    return max((process.memory_info().rss / (1 << 20) for process in processes), default=0.0)


def measure_one_way(way: Way, rate: float, seconds: float) -> OneWay:
    """Offer ``rate`` datagrams/s for ``seconds``."""
    sink = subprocess.Popen(
        [*_LOAD, "sink", str(way.target_port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert sink.stderr is not None
        sink.stderr.readline()  # it is bound
        before = _cpu_s(way.gateway), _cpu_s(way.client)
        arguments = [str(way.port), str(rate), str(SIZE), str(seconds)]
        done = subprocess.run(
            [*_LOAD, "generate", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds + 30,
            check=True,
        )
        time.sleep(0.4)  # what is under way arrives
        after = _cpu_s(way.gateway), _cpu_s(way.client)
        sink.terminate()
        out, _ = sink.communicate(timeout=10)
    finally:
        sink.kill()
        sink.wait()
    sent, arrived = json.loads(done.stdout), json.loads(out)
    received = int(arrived["received"])
    each = 1e6 / max(1, received)
    return OneWay(
        offered=rate,
        sent=int(sent["sent"]),
        received=received,
        rate=received / sent["seconds"],
        gateway_us=(after[0] - before[0]) * each,
        client_us=(after[1] - before[1]) * each,
        gateway_rss_mib=_rss_mib(way.gateway),
        client_rss_mib=_rss_mib(way.client),
    )


def highest_rate(way: Way, rates: list[float], seconds: float) -> tuple[OneWay, list[OneWay]]:
    """The best run without loss of rising ``rates``, and every run; stops at the first loss."""
    runs: list[OneWay] = []
    best = None
    for rate in rates:
        run = measure_one_way(way, rate, seconds)
        if run.lost:  # once more: other work on this machine costs datagrams too
            run = measure_one_way(way, rate, seconds)
        runs.append(run)
        if run.lost:
            break
        best = run
        if run.rate < 0.9 * rate:
            break  # the generator, or the machine, can do no more
    return best or runs[0], runs


def measure_echo(way: Way, rate: float, seconds: float) -> Echo:
    """Round trips through ``way`` to an echo server at its target port."""
    directory = Path(tempfile.mkdtemp(prefix="toppy-bench-"))
    peer = start_peer("echo", way.target_port, directory)
    try:
        arguments = [str(way.port), str(rate), str(SIZE), str(seconds)]
        done = subprocess.run(
            [*_LOAD, "echo", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds + 30,
            check=True,
        )
    finally:
        peer.stop()
        wait_until("echo server's end", lambda: peer.process.poll() is not None)
    result = json.loads(done.stdout)
    return Echo(int(result["sent"]), int(result["received"]), result["p50_us"], result["p99_us"])


def median(values: list[float]) -> float:
    return statistics.median(values)
