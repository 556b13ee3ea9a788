"""Case 1: datagrams through client and gateway: rate without loss, CPU of each, added latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from integration.bench.figures import MISSING, Figures, over, save_plot, spread, table
from integration.bench.measure import SIZE, highest_one_way, measure_echo
from integration.bench.ways import Way, direct, through_gateway
from toppy.quic.choose import has_native_engine

_SIZES = (64, 512, 1200, 8000)
_TUNNELS = (1, 10, 1000)
_ECHO_RATES = (1000.0, 10_000.0, 50_000.0)
_ENGINES = ("native", "aioquic") if has_native_engine() else ("aioquic",)
_FIRST = {"native": 320_000.0, "aioquic": 10_000.0, "no gateway": 1_200_000.0}
_MOST = 1_200_000.0
_FIRST_LARGE = {"native": 12_000.0, "aioquic": 700.0, "no gateway": 400_000.0}
"""Of datagrams that travel as capsules, 8,000 bytes."""
_MANY = """
[limits]
max_tunnels_per_connection = 50000
max_streams_per_connection = 50000
"""


def _first(kind: str, size: int) -> float:
    return (_FIRST_LARGE if size > SIZE else _FIRST)[kind]


def _measure_way(ways: Sequence[Way], kind: str, *, is_quick: bool) -> Figures:
    seconds = 1.0
    sizes = (SIZE,) if is_quick else (64, SIZE) if kind == "aioquic" else _SIZES
    figures: Figures = {"one way": {}, "echo": {}}
    for size in sizes:
        best = highest_one_way(ways, _first(kind, size), seconds, size=size, most=_MOST)
        figures["one way"][str(size)] = asdict(best)
    rates = _ECHO_RATES[:1] if is_quick or kind == "aioquic" else _ECHO_RATES
    for size in sizes[:3]:
        figures["echo"][str(size)] = {
            str(rate): asdict(measure_echo(ways, rate, 2.0, size=size)) for rate in rates
        }
    return figures


def measure(*, is_quick: bool) -> Figures:
    """One run of everything."""
    figures: Figures = {"no gateway": _measure_way([direct()], "no gateway", is_quick=is_quick)}
    for engine in _ENGINES:
        with through_gateway(engine=engine) as ways:
            figures[engine] = _measure_way(ways, engine, is_quick=is_quick)
    if not is_quick:
        figures["tunnels"], figures["echo, tunnels"] = {}, {}
        for tunnels in _TUNNELS:
            # tunnels live on for a while: a fresh gateway for each
            with through_gateway(engine=_ENGINES[0], extra=_MANY) as ways:
                echoed = measure_echo(ways, 10_000.0, 2.0, tunnels=tunnels)
                figures["echo, tunnels"][str(tunnels)] = asdict(echoed)
            with through_gateway(engine=_ENGINES[0], extra=_MANY) as ways:
                best = highest_one_way(ways, _FIRST[_ENGINES[0]], 1.0, tunnels=tunnels, most=_MOST)
                figures["tunnels"][str(tunnels)] = asdict(best)
        figures["IPv6"] = {}
        engine = _ENGINES[0]
        with through_gateway(engine=engine, host="::1") as ways:
            figures["IPv6"][engine] = asdict(highest_one_way(ways, _FIRST[engine], 1.0, most=_MOST))
    return figures


# the report


def _rate_rows(runs: Sequence[Figures], kinds: Sequence[str]) -> list[list[str]]:
    rows = []
    for size in _SIZES:
        for kind in kinds:
            path = (kind, "one way", str(size))
            rates = over(runs, *path, "rate")
            if not rates:
                continue
            gbits = [rate * size * 8 / 1e9 for rate in rates]
            rows.append(
                [
                    f"{size:,}",
                    kind,
                    spread(rates),
                    spread(gbits, "{:.2f}"),
                    spread(over(runs, *path, "cpu_us", "gateway"), "{:.1f}"),
                    spread(over(runs, *path, "cpu_us", "client"), "{:.1f}"),
                ]
            )
    return rows


def _single_row(runs: Sequence[Figures], name: str, *path: str) -> list[str]:
    return [
        name,
        spread(over(runs, *path, "rate")),
        spread(over(runs, *path, "cpu_us", "gateway"), "{:.1f}"),
        spread(over(runs, *path, "cpu_us", "client"), "{:.1f}"),
    ]


def _echo_rows(runs: Sequence[Figures], kinds: Sequence[str]) -> list[list[str]]:
    rows = []
    for size in _SIZES[:3]:
        for rate in _ECHO_RATES:
            base = [over(runs, "no gateway", "echo", str(size), str(rate), p) for p in _PERCENTILES]
            for kind in kinds:
                path = (kind, "echo", str(size), str(rate))
                found = [over(runs, *path, p) for p in _PERCENTILES]
                if not found[0]:
                    continue
                row = [f"{size:,}", f"{rate:,.0f}", kind, *(spread(values) for values in found)]
                for values, direct_values in zip(found, base, strict=True):
                    added = [a - b for a, b in zip(values, direct_values, strict=True)]
                    row.append(spread(added) if kind != "no gateway" else MISSING)
                row.append(spread(over(runs, *path, "cpu_us", "gateway"), "{:.0f}"))
                row.append(spread(over(runs, *path, "cpu_us", "client"), "{:.0f}"))
                lost = [
                    a - b
                    for a, b in zip(
                        over(runs, *path, "sent"), over(runs, *path, "received"), strict=True
                    )
                ]
                row.append(spread(lost))
                rows.append(row)
    return rows


_PERCENTILES = ("p50_us", "p99_us", "p999_us")


def report(runs: Sequence[Figures], plots: Path) -> str:
    """Tables and plots of every run."""
    kinds = ["no gateway", *_ENGINES]
    cpu = ["gateway CPU us", "client CPU us"]
    text = "## Datagrams one way, the highest rate without loss\n\n"
    text += "One tunnel on one connection, one worker; CPU per delivered datagram.\n\n"
    text += table(
        ["bytes", "way", "datagrams/s", "Gbit/s", *cpu],
        _rate_rows(runs, kinds),
    )
    text += "\n" + _plot_rates(runs, kinds, plots) + "\n"
    rows = [
        _single_row(runs, f"{int(tunnels):,} tunnels on one connection", "tunnels", str(tunnels))
        for tunnels in _TUNNELS
    ]
    rows += [_single_row(runs, f"{engine}, over IPv6", "IPv6", engine) for engine in _ENGINES[:1]]
    text += "1,200 bytes, in other shapes:\n\n" + table(["way", "datagrams/s", *cpu], rows) + "\n"
    text += "## Echo, round trip in microseconds\n\n"
    text += (
        "Added: more than the same echo without a gateway, in the same run. CPU is that of the\n"
        "process per echo: two datagrams, one each way.\n\n"
    )
    text += table(
        [
            *("bytes", "per second", "way", "p50", "p99", "p99.9"),
            *("added p50", "p99", "p99.9", *cpu, "lost"),
        ],
        _echo_rows(runs, kinds),
    )
    rows = [
        [
            f"{tunnels:,}",
            *(spread(over(runs, "echo, tunnels", str(tunnels), p)) for p in _PERCENTILES),
        ]
        for tunnels in _TUNNELS
    ]
    text += "\n1,200 bytes at 10,000/s in all, native, spread over tunnels of one connection:\n\n"
    return text + table(["tunnels", "p50", "p99", "p99.9"], rows)


def _plot_rates(runs: Sequence[Figures], kinds: Sequence[str], plots: Path) -> str:
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        heights: list[Any] = []
        for size in _SIZES:
            values = over(runs, kind, "one way", str(size), "rate")
            heights.append(sorted(values)[len(values) // 2] if values else 0)
        places = [position + index * width for position in range(len(_SIZES))]
        axes.bar(places, heights, width, label=kind)
    axes.set_yscale("log")
    axes.set_xticks([position + 0.4 - width / 2 for position in range(len(_SIZES))])
    axes.set_xticklabels([f"{size:,} B" for size in _SIZES])
    axes.set_ylabel("datagrams/s without loss")
    axes.legend()
    return save_plot(figure, plots / "one-way.svg")
