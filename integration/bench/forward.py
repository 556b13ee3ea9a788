"""``toppy up --direct`` beside other local TCP forwarders, on the same work in the same run."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import psutil

from integration.bench.figures import Figures, cpu_s, over, spread, table
from integration.bench.peers import PeerMissing, WithChildren, find_haproxy, find_socat, versions
from integration.bench.tcp_load import start_tcp_load
from integration.bench.ways import Way
from integration.processes import (
    UNLIMITED,
    free_tcp_port,
    running_direct_up,
    start,
    wait_until,
)

HOST: Final = "127.0.0.1"
TOPPY: Final = "toppy up"
PACED: Final = "toppy up, with a rate"
DIRECT: Final = "no forwarder"
_MANY: Final = 100
_CHAINS: Final = 16
_PACES_MIB: Final = (1, 10, 100)
_UNREACHED: Final = 100 << 30
"""Bytes per second of a rate that slows nobody down: what its bookkeeping costs."""
_SPARE_S = 60.0
_HAPROXY = """
global
  nbthread 1
  maxconn 4096
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option splice-auto
listen forward
  bind {listen}
  server target {target}
"""


@contextlib.contextmanager
def no_forwarder() -> Iterator[Way]:
    """The load alone."""
    port = free_tcp_port()
    yield Way(DIRECT, HOST, port, HOST, port)


@contextlib.contextmanager
def toppy_up(extra: str = UNLIMITED) -> Iterator[Way]:
    """``toppy up --direct``."""
    target = free_tcp_port()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        running_direct_up(Path(directory), f"{HOST}:{target}", extra=extra) as (port, running),
    ):
        yield Way(TOPPY, HOST, port, HOST, target, {"relay": (psutil.Process(running.pid),)})


@contextlib.contextmanager
def haproxy() -> Iterator[Way]:
    """One thread, as ``toppy up`` has; it splices where it thinks that this is worth it."""
    program = find_haproxy()
    port, target = free_tcp_port(), free_tcp_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        config = Path(directory) / "haproxy.cfg"
        config.write_text(_HAPROXY.format(listen=f"{HOST}:{port}", target=f"{HOST}:{target}"))
        with _running("haproxy", port, target, [program, "-f", config]) as way:
            yield way


@contextlib.contextmanager
def socat() -> Iterator[Way]:
    """A process per connection."""
    port, target = free_tcp_port(), free_tcp_port()
    listen = f"TCP4-LISTEN:{port},bind={HOST},reuseaddr,fork,backlog=1024"
    arguments: list[str | Path] = [find_socat(), "-b", "65536", listen, f"TCP4:{HOST}:{target}"]
    with _running("socat", port, target, arguments) as way:
        yield way


@contextlib.contextmanager
def _running(name: str, port: int, target: int, arguments: Sequence[str | Path]) -> Iterator[Way]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        running = start(arguments, Path(directory) / f"{name}.log")
        try:
            wait_until(f"{name} to listen", lambda: _is_listening(port))
            yield Way(name, HOST, port, HOST, target, {"relay": (WithChildren(running.pid),)})
        finally:
            running.stop()


def _is_listening(port: int) -> bool:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(
        line.split()[3] == "0A" and int(line.split()[1].partition(":")[2], 16) == port
        for line in lines
    )


def _with_rate(bytes_per_s: int) -> str:
    return f"[rate]\nbytes_per_sec = {bytes_per_s}\n"


WAYS: Final[Mapping[str, Callable[[], AbstractContextManager[Way]]]] = {
    DIRECT: no_forwarder,
    TOPPY: toppy_up,
    PACED: lambda: toppy_up(_with_rate(_UNREACHED)),
    "haproxy": haproxy,
    "socat": socat,
}


def measure(*, is_quick: bool) -> Figures:
    """Every way in turn; one that is not here leaves its reason. Then how exact rates are."""
    seconds = 0.5 if is_quick else 5.0
    figures: Figures = {"versions": versions(), "ways": {}, "paces": {}}
    for name in (DIRECT, TOPPY) if is_quick else WAYS:
        try:
            with WAYS[name]() as way:
                figures["ways"][name] = measure_way(way, seconds)
        except PeerMissing as missing:
            figures["ways"][name] = {"missing": str(missing)}
    for mib in _PACES_MIB:
        figures["paces"][str(mib)] = measure_pace(mib << 20, seconds if is_quick else 10.0)
    return figures


def measure_way(way: Way, seconds: float) -> Figures:
    """One connection, many at once, and connections one after the other."""
    sink = start_tcp_load("sink", host=way.target_host, port=way.target_port)
    try:
        assert sink.stderr is not None
        if not sink.stderr.readline().startswith("ready"):
            raise RuntimeError(f"the sink failed:\n{sink.stderr.read()}")
        return {
            "one": _bulk(way, 1, seconds),
            "many": _bulk(way, _MANY, seconds),
            "connect": _connect(way, seconds),
        }
    finally:
        sink.kill()
        sink.communicate()


def _bulk(way: Way, connections: int, seconds: float) -> Figures:
    result, used = _load(way, "generate", seconds, connections=connections)
    gigabytes = result["bytes"] / 1e9
    return {"gbit_s": 8 * gigabytes / result["seconds"], "cpu_s_per_gb": used / gigabytes}


def _connect(way: Way, seconds: float) -> Figures:
    result, used = _load(way, "connect", seconds, at_once=_CHAINS)
    count = result["connections"]
    return {
        "per_s": count / result["seconds"],
        "p50_us": result["p50_us"],
        "p99_us": result["p99_us"],
        "cpu_us": used * 1e6 / count,
    }


def _load(way: Way, kind: str, seconds: float, **options: Any) -> tuple[dict[str, float], float]:
    """A load's result, and what the forwarder's processes used meanwhile, in seconds."""
    processes = [process for role in way.processes.values() for process in role]
    before = cpu_s(processes)
    load = start_tcp_load(kind, host=way.host, port=way.port, seconds=seconds, **options)
    result = _finish(load, seconds)
    return result, cpu_s(processes) - before


def _finish(load: subprocess.Popen[str], seconds: float) -> dict[str, float]:
    try:
        out, error = load.communicate(timeout=seconds + _SPARE_S)
    finally:
        load.kill()
    if load.returncode:
        raise RuntimeError(f"a load process failed:\n{error}")
    result: dict[str, float] = json.loads(out)
    return result


def measure_pace(bytes_per_s: int, seconds: float) -> Figures:
    """What one connection carries once its burst, a second's worth, has gone, and half as much
    again: while the burst goes, the bucket gains.
    """
    with toppy_up(_with_rate(bytes_per_s)) as way:
        (process,) = way.processes["relay"]
        before = cpu_s([process])
        load = start_tcp_load(
            "pace",
            host=way.host,
            port=way.port,
            target_port=way.target_port,
            skip=bytes_per_s * 3 // 2,
            seconds=seconds,
        )
        result = _finish(load, seconds)
        return {
            "bytes_per_s": result["bytes"] / result["seconds"],
            "cpu_share": (cpu_s([process]) - before) / result["seconds"],
        }


def report(runs: Sequence[Figures], plots: Path) -> str:
    """A section of the report."""
    del plots
    names = [name for name in WAYS if name in runs[-1]["ways"]]
    here = [name for name in names if over(runs, "ways", name, "one", "gbit_s")]
    missing = [
        f"- {name}: {runs[-1]['ways'][name]['missing']}" for name in names if name not in here
    ]
    return "\n".join(
        [
            "## Local TCP forwarding\n",
            "`toppy up --direct` beside other forwarders of one local port, one after the other in "
            "the same run, everything on loopback, nothing encrypted. haproxy has one thread and "
            "may splice; socat has a process per connection. CPU is the forwarder's.\n",
            table(
                ["", "Gbit/s, one connection", "CPU s per GB", f"Gbit/s, {_MANY}", "CPU s per GB"],
                [[name, *_bulk_cells(runs, name)] for name in here],
            ),
            f"Connections with a byte to and fro, {_CHAINS} at a time:\n",
            table(
                ["", "per second", "p50 us", "p99 us", "CPU us each"],
                [[name, *_connect_cells(runs, name)] for name in here],
            ),
            "How exact a rate is: what one connection carries in 10 s after its burst.\n",
            table(
                ["MiB/s asked for", "MiB/s", "off by", "CPU, of a core"],
                [_pace_cells(runs, mib) for mib in _PACES_MIB],
            ),
            *(["Missing in this run:\n", *missing, ""] if missing else []),
        ]
    )


def _bulk_cells(runs: Sequence[Figures], name: str) -> list[str]:
    return [
        spread(over(runs, "ways", name, kind, figure) if has_figure else [], form)
        for kind in ("one", "many")
        for figure, form, has_figure in (
            ("gbit_s", "{:.1f}", True),
            ("cpu_s_per_gb", "{:.2f}", name != DIRECT),
        )
    ]


def _connect_cells(runs: Sequence[Figures], name: str) -> list[str]:
    cells = [
        spread(over(runs, "ways", name, "connect", key)) for key in ("per_s", "p50_us", "p99_us")
    ]
    cpu = over(runs, "ways", name, "connect", "cpu_us") if name != DIRECT else []
    return [*cells, spread(cpu)]


def _pace_cells(runs: Sequence[Figures], mib: int) -> list[str]:
    rates = [rate / (1 << 20) for rate in over(runs, "paces", str(mib), "bytes_per_s")]
    return [
        str(mib),
        spread(rates, "{:.2f}"),
        spread([100 * (rate / mib - 1) for rate in rates], "{:+.2f} %"),
        spread([100 * share for share in over(runs, "paces", str(mib), "cpu_share")], "{:.1f} %"),
    ]
