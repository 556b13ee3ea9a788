"""The first benchmark: rates without loss, CPU per datagram, latency, memory, for each engine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from integration.bench.measure import (
    SIZE,
    Echo,
    OneWay,
    Way,
    highest_rate,
    measure_echo,
    measure_one_way,
    median,
    way_through_gateway,
)
from integration.processes import free_udp_port
from toppy import __version__
from toppy.quic.choose import has_native_engine

_REFERENCE_RATE = {"native": 80_000.0, "aioquic": 3_000.0}
_RATES = {
    "native": [80e3, 120e3, 160e3, 200e3, 240e3, 280e3, 320e3],
    "aioquic": [2e3, 4e3, 6e3, 8e3, 10e3, 12e3],
    "direct": [400e3, 800e3],
}
_ECHO_RATE = 1000.0


def main() -> int:
    """Measure, print, and write JSON when asked to."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw results")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(
        f"toppy {__version__}, Python {platform.python_version()}, Linux {platform.release()}, "
        f"{os.cpu_count()} cores, all processes on this machine, {SIZE}-byte datagrams"
    )
    runs, seconds = (1, 1.0) if options.quick else (3, 3.0)
    engines = ["native", "aioquic"] if has_native_engine() else ["aioquic"]
    results: dict[str, Any] = {"direct": _measure_direct(console, runs, seconds)}
    for engine in engines:
        for workers in (1,) if options.quick or engine == "aioquic" else (1, 2):
            key = f"{engine}, {workers} worker{'s' if workers > 1 else ''}"
            console.print(f"measuring {key} …")
            with way_through_gateway(engine, workers) as way:
                results[key] = _measure(way, engine, runs, seconds)
    _print(console, results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _measure_direct(console: Console, runs: int, seconds: float) -> dict[str, Any]:
    """Generator to sink without a gateway: what the load itself can do."""
    console.print("measuring the load generator alone …")
    port = free_udp_port()
    return _measure(Way(port, port), "direct", runs, seconds)


def _measure(way: Way, kind: str, runs: int, seconds: float) -> dict[str, Any]:
    best: list[OneWay] = []
    reference: list[OneWay] = []
    echoes: list[Echo] = []
    for _ in range(runs):
        best.append(highest_rate(way, _RATES[kind], seconds)[0])
        if kind in _REFERENCE_RATE:
            reference.append(measure_one_way(way, _REFERENCE_RATE[kind], seconds))
        echoes.append(measure_echo(way, _ECHO_RATE, seconds))
    return {
        "best": [asdict(run) for run in best],
        "reference": [asdict(run) for run in reference],
        "echo": [asdict(echo) for echo in echoes],
    }


def _spread(values: list[float], form: str = "{:,.0f}") -> str:
    text = form.format(median(values))
    if len(values) > 1:
        text += f" ({form.format(min(values))}-{form.format(max(values))})"
    return text


def _print(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="one way, without loss")
    for column in (
        "way",
        "datagrams/s",
        "offered",
        "lost",
        "CPU us each, gateway",
        "client",
        "RSS MiB, gateway",
        "client",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for key, result in results.items():
        table.add_row(key, _spread([r["rate"] for r in result["best"]]), "highest", "0")
        if result["reference"]:
            runs = result["reference"]
            table.add_row(
                "",
                _spread([r["rate"] for r in runs]),
                f"{runs[0]['offered']:,.0f}/s",
                _spread([r["sent"] - r["received"] for r in runs]),
                _spread([r["gateway_us"] for r in runs], "{:.1f}"),
                _spread([r["client_us"] for r in runs], "{:.1f}"),
                f"{runs[-1]['gateway_rss_mib']:.0f}",
                f"{runs[-1]['client_rss_mib']:.0f}",
            )
    console.print(table)
    direct = results["direct"]["echo"]
    base50, base99 = median([e["p50_us"] for e in direct]), median([e["p99_us"] for e in direct])
    table = Table(title=f"echo at {_ECHO_RATE:,.0f}/s, round trip")
    for column in ("way", "p50 us", "p99 us", "added p50", "added p99", "lost"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for key, result in results.items():
        p50 = [e["p50_us"] for e in result["echo"]]
        p99 = [e["p99_us"] for e in result["echo"]]
        lost = sum(e["sent"] - e["received"] for e in result["echo"])
        added = ("", "")
        if key != "direct":
            added = (f"{median(p50) - base50:,.0f}", f"{median(p99) - base99:,.0f}")
        table.add_row(key, _spread(p50), _spread(p99), *added, str(lost))
    console.print(table)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
