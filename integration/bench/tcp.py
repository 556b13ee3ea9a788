"""TCP through client and gateway beside other ways, on the same work in the same run."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from integration.bench import tcp_paths
from integration.bench.figures import Figures, cpu_s, over, pss_mib, save_plot, spread, table
from integration.bench.forward import DIRECT
from integration.bench.peers import PeerMissing, versions
from integration.bench.tcp_load import start_tcp_load
from integration.bench.tcp_ways import (
    TOPPY,
    WAYS,
    finish,
    running_sink,
    toppy_up,
    wait_until_ready,
)
from integration.bench.ways import Way

MANY: Final = 100
AT_ONCE: Final = (1, 4, 16)
SIZE: Final = 1024
IDLE: Final = 1000
_FIRST_IDLE: Final = 100
"""What the first tunnels cost once is not counted for the others."""
_BIN_S: Final = 0.25
_SETTLE_S: Final = 1.5
_GOAL_MB: Final = 220.0
_GOAL_RATIO: Final = 1.3
_PEERS: Final = ("sing-box, Hysteria2", "sing-box, TUIC")
_LOADS: Final[Mapping[str, tuple[str, int]]] = {
    "up": ("to the target", 1),
    "down": ("to the client", 1),
    "many_up": ("to the target", MANY),
    "many_down": ("to the client", MANY),
}


def measure(*, is_quick: bool) -> Figures:
    """Every way in turn; one that is not here leaves its reason. Then idle tunnels, and paths."""
    seconds = 0.5 if is_quick else 3.0
    figures: Figures = {"versions": versions(), "ways": {}}
    for name in (DIRECT, TOPPY) if is_quick else WAYS:
        try:
            with WAYS[name]() as way:
                figures["ways"][name] = measure_way(way, seconds)
        except PeerMissing as missing:
            figures["ways"][name] = {"missing": str(missing)}
    figures["idle"] = measure_idle(IDLE // 10 if is_quick else IDLE)
    figures["paths"] = tcp_paths.measure(is_quick=is_quick)
    return figures


def measure_way(way: Way, seconds: float) -> Figures:
    """One flow and many, both ways, and small requests with their answers."""
    with running_sink(way.target_host, way.target_port):
        return {
            **{
                name: _bulk(way, is_up=name.endswith("up"), connections=count, seconds=seconds)
                for name, (_, count) in _LOADS.items()
            },
            "exchange": {
                str(at_once): _exchange(way, at_once, min(seconds, 2.0)) for at_once in AT_ONCE
            },
        }


def _bulk(way: Way, *, is_up: bool, connections: int, seconds: float) -> Figures:
    flows = [(way.host, way.port, "")] * connections
    kind = "upload" if is_up else "download"
    result, used = _load(way, kind, seconds, flows=flows, bin_s=_BIN_S)
    took_s = len(result["bytes_per_s"][0]) * _BIN_S
    size = sum(map(sum, result["bytes_per_s"])) * _BIN_S
    return {
        "mb_s": size / took_s / 1e6,
        "cpu_s_per_gb": {role: each * 1e9 / result["bytes"] for role, each in used.items()},
    }


def _exchange(way: Way, at_once: int, seconds: float) -> Figures:
    result, used = _load(
        way, "exchange", seconds, host=way.host, port=way.port, at_once=at_once, size=SIZE
    )
    count = result["exchanges"]
    return {
        "per_s": count / result["seconds"],
        "p50_us": result["p50_us"],
        "p99_us": result["p99_us"],
        "cpu_us": {role: each * 1e6 / count for role, each in used.items()},
    }


def _load(
    way: Way, kind: str, seconds: float, **options: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """A load's result, and what each role's processes used meanwhile, in seconds."""
    before = {role: cpu_s(processes) for role, processes in way.processes.items()}
    result = finish(start_tcp_load(kind, seconds=seconds, **options), seconds)
    return result, {
        role: cpu_s(processes) - before[role] for role, processes in way.processes.items()
    }


def measure_idle(count: int) -> Figures:
    """What ``count`` more open tunnels add to the gateway's worker and the client, each, in KiB."""
    with contextlib.ExitStack() as stack:
        way = stack.enter_context(toppy_up())
        stack.enter_context(running_sink(way.target_host, way.target_port))
        stack.callback(_end, _idle(way, min(count, _FIRST_IDLE)))
        time.sleep(_SETTLE_S)
        before = _memory(way.processes)
        stack.callback(_end, _idle(way, count))
        time.sleep(_SETTLE_S)
        after = _memory(way.processes)
    return {
        "count": count,
        **{f"{role}_kib": (after[role] - before[role]) * 1024 / count for role in before},
    }


def _idle(way: Way, count: int) -> subprocess.Popen[str]:
    load = start_tcp_load("idle", host=way.host, port=way.port, connections=count)
    wait_until_ready(load)
    return load


def _end(load: subprocess.Popen[str]) -> None:
    load.kill()
    load.communicate()


def _memory(processes: Mapping[str, Sequence[psutil.Process]]) -> dict[str, float]:
    return {role: pss_mib(each) for role, each in processes.items()}


def report(runs: Sequence[Figures], plots: Path) -> str:
    """A section of the report."""
    names = [name for name in WAYS if name in runs[-1]["ways"]]
    here = [name for name in names if over(runs, "ways", name, "up", "mb_s")]
    missing = [
        f"- {name}: {runs[-1]['ways'][name]['missing']}" for name in names if name not in here
    ]
    return "\n".join(
        [
            "## TCP through the gateway\n",
            "`toppy up` through a gateway with one worker beside other ways to a TCP target, one "
            "after the other in the same run, everything on loopback, load and target included. "
            "toppy, ssh and sing-box encrypt between two processes; haproxy and socat are one hop "
            "in the clear. Each uses one connection between its two ends.\n",
            table(
                ["MB/s", *(f"{count} {to}" for to, count in _LOADS.values()), "toppy / this"],
                [[name, *_rates(runs, name)] for name in here],
            ),
            "CPU seconds per GB:\n",
            table(
                ["", *(f"{count} {to}: {role}" for role, to, count in _cpu_columns())],
                [[name, *_costs(runs, name)] for name in here if name != DIRECT],
            ),
            f"{SIZE:,} bytes there and back, again and again, on so many TCP connections at once; "
            "they share one QUIC connection:\n",
            table(
                ["", *(f"{n}: {what}" for n in AT_ONCE for what in ("per s", "p50 us", "p99 us"))],
                [[name, *_exchanges(runs, name)] for name in here],
            ),
            _goals(runs),
            _plot(runs, here, plots),
            *(["Missing in this run:\n", *missing, ""] if missing else []),
            tcp_paths.report([run["paths"] for run in runs], plots),
        ]
    )


def _cpu_columns() -> list[tuple[str, str, int]]:
    return [
        (role, to, count)
        for to, count in (_LOADS["up"], _LOADS["down"], _LOADS["many_down"])
        for role in ("server or relay", "client")
    ]


def _rates(runs: Sequence[Figures], name: str) -> list[str]:
    cells = [spread(over(runs, "ways", name, load, "mb_s")) for load in _LOADS]
    return [*cells, spread(_ratios(runs, name), "{:.2f}")]


def _ratios(runs: Sequence[Figures], name: str) -> list[float]:
    """toppy's rate over that of another way, one flow: the worse direction of each run."""
    return [
        min(ours / theirs for ours, theirs in zip(up_and_down, others, strict=True))
        for up_and_down, others in zip(
            _up_and_down(runs, TOPPY), _up_and_down(runs, name), strict=False
        )
    ]


def _up_and_down(runs: Sequence[Figures], name: str) -> list[tuple[float, float]]:
    return [
        (run["ways"][name]["up"]["mb_s"], run["ways"][name]["down"]["mb_s"])
        for run in runs
        if "up" in run["ways"].get(name, {})
    ]


def _costs(runs: Sequence[Figures], name: str) -> list[str]:
    cells = []
    for load in ("up", "down", "many_down"):
        path = ("ways", name, load, "cpu_s_per_gb")
        server = over(runs, *path, "gateway") or over(runs, *path, "relay")
        cells += [spread(server, "{:.2f}"), spread(over(runs, *path, "client"), "{:.2f}")]
    return cells


def _exchanges(runs: Sequence[Figures], name: str) -> list[str]:
    return [
        spread(over(runs, "ways", name, "exchange", str(at_once), key))
        for at_once in AT_ONCE
        for key in ("per_s", "p50_us", "p99_us")
    ]


def _goals(runs: Sequence[Figures]) -> str:
    """What was asked for, and what there is."""
    idle = [
        f"{role} {spread(over(runs, 'idle', f'{role}_kib'), '{:.1f}')} KiB"
        for role in ("gateway", "client")
    ]
    one = [min(pair) for pair in _up_and_down(runs, TOPPY)]
    many = [
        min(run["ways"][TOPPY][load]["mb_s"] for load in ("many_up", "many_down")) for run in runs
    ]
    at_once = str(AT_ONCE[1])
    lines = [
        f"- one flow, at least {_GOAL_MB:.0f} MB/s: {spread(one)} in the slower direction",
        *(
            f"- at least {_GOAL_RATIO} times {name}: {spread(ratios, '{:.2f}')}"
            for name in _PEERS
            if (ratios := _ratios(runs, name))
        ),
        f"- {MANY} flows together as much as one: {spread(many)} MB/s in the slower direction",
        f"- at least 5,000 exchanges/s at a p50 below 1,000 us: "
        f"{spread(over(runs, 'ways', TOPPY, 'exchange', at_once, 'per_s'))}/s at "
        f"{spread(over(runs, 'ways', TOPPY, 'exchange', at_once, 'p50_us'))} us, {at_once} at once",
        f"- an idle tunnel below 64 KiB: {', '.join(idle)} (growth of the process's PSS with "
        f"{runs[-1]['idle']['count']:,} tunnels, for each)",
    ]
    return "What was asked for, and what was measured:\n\n" + "\n".join(lines) + "\n"


def _plot(runs: Sequence[Figures], names: Sequence[str], plots: Path) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in names if name != DIRECT]
    figure, axes = plt.subplots(figsize=(8, 3.4))
    width = 0.8 / len(_LOADS)
    for place, (load, (to, count)) in enumerate(_LOADS.items()):
        rates = [statistics.median(over(runs, "ways", name, load, "mb_s")) for name in names]
        at = [index + (place - 1.5) * width for index in range(len(names))]
        axes.bar(at, rates, width, label=f"{count} {to}")
    axes.axhline(_GOAL_MB, color="grey", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_yscale("log")
    axes.set_ylabel("MB/s")
    axes.legend(fontsize="small")
    link = save_plot(figure, plots / "tcp.svg")
    plt.close(figure)
    return link
