"""The gateway beside what a user might take instead, on the same work in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from integration.bench.figures import MISSING, Figures, over, save_plot, spread, table
from integration.bench.measure import SIZE, OneWay, measure_echo, measure_one_way
from integration.bench.peers import PEERS, PeerMissing, versions
from integration.bench.ways import Way

NATIVE: Final = "toppy, native"
DIRECT: Final = "no gateway"
COMMON_RATE: Final = 4_000.0
"""Datagrams/s that every way should carry: CPU at the same work."""
ECHO_RATE: Final = 1_000.0
_STEP: Final = 1.25
_TOO_MUCH: Final = (2.0, 4.0)
"""Times the highest rate without loss: what is delivered when more is offered. A short queue loses
a burst long before its program has no more time: the first figure alone would flatter us.
"""
_LOWEST_RATE: Final = 500.0
_HIGHEST_RATE: Final = 800_000.0
"""More is no question to a gateway; the generator's own limit is near."""
_FIRST_RATE: Final[Mapping[str, float]] = {
    DIRECT: _HIGHEST_RATE,
    NATIVE: 240_000.0,
    "toppy, aioquic": 10_000.0,
    "masque-go's proxy": 16_000.0,
    "sing-box, Hysteria2": 10_000.0,
    "sing-box, TUIC": 10_000.0,
    "socat": 40_000.0,
    "asyncio relay": 20_000.0,
}
"""Where the search begins: near the end, as seen on a machine with 2 cores. It saves steps and
decides nothing.
"""
_QUICK: Final = (DIRECT, NATIVE, "asyncio relay")


def measure(*, is_quick: bool) -> Figures:
    """Every peer in turn; one that is not here leaves its reason."""
    figures: Figures = {"versions": versions(), "ways": {}}
    for name in _QUICK if is_quick else PEERS:
        try:
            with PEERS[name]() as way:
                figures["ways"][name] = _measure_way(name, way, is_quick=is_quick)
        except PeerMissing as missing:
            figures["ways"][name] = {"missing": str(missing)}
        except RuntimeError as error:  # a load process: no echo, for one
            figures["ways"][name] = {"missing": f"failed: {str(error).strip().splitlines()[-1]}"}
    return figures


def _measure_way(name: str, way: Way, *, is_quick: bool) -> Figures:
    seconds = 0.4 if is_quick else 0.8

    def offer(rate: float) -> OneWay:
        return measure_one_way([way], rate, seconds)

    best, runs = highest_without_loss(offer, _FIRST_RATE[name])
    if way.processes and not is_quick:
        top = best.offered if best is not None else _LOWEST_RATE
        runs += [offer(min(top * much, _HIGHEST_RATE)) for much in _TOO_MUCH]
    found: Figures = {
        "best": asdict(best) if best is not None else None,
        "most": max(run.rate for run in runs),
        "offered": [[run.offered, run.sent, run.received] for run in runs],
        "echo": asdict(measure_echo([way], ECHO_RATE, 1.0 if is_quick else 2.0)),
    }
    if not is_quick:
        found["common"] = asdict(measure_one_way([way], COMMON_RATE, 2.0))
    return found


def highest_without_loss(
    offer: Callable[[float], OneWay], first: float
) -> tuple[OneWay | None, list[OneWay]]:
    """The best run without loss, and all runs: half the rate from ``first`` on until nothing is
    lost, then up by quarters until something is. A step that loses gets a second chance: other
    work on this machine costs datagrams, too.
    """
    runs: list[OneWay] = []
    best: OneWay | None = None
    rate, failed = min(first, _HIGHEST_RATE), math.inf
    while _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        run = offer(rate)
        runs.append(run)
        if run.lost > 0:
            run = offer(rate)
            runs.append(run)
        if run.lost > 0:
            if best is not None:
                break
            failed = rate
            rate /= 2
            continue
        if best is None or run.rate > best.rate:
            best = run
        if run.rate < 0.9 * rate:
            break  # the generator has no more
        rate *= _STEP
        if rate >= failed:
            break
    return best, runs


def report(runs: Sequence[Figures], plots: Path) -> str:
    """Rates, CPU, echoes, each with the ratio of toppy to it; what was missing and why."""
    names = [name for name in PEERS if any(name in run["ways"] for run in runs)]
    here = [name for name in names if over(runs, "ways", name, "most")]
    parts = [
        "## Side by side\n",
        _introduction(),
        _one_way_table(runs, here),
        save_plot(_plot(runs, here), plots / "side-by-side.svg") if here else "",
        _echo_table(runs, here),
        _missing(runs, [name for name in names if name not in here]),
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in runs[-1]["versions"].items())
        + ".\n",
    ]
    return "\n".join(part for part in parts if part)


def _introduction() -> str:
    return (
        f"One flow of {SIZE:,}-byte datagrams through each, one after the other in the same run, "
        "everything on loopback. toppy, masque-go and sing-box have two hops with encryption "
        "between them (client and gateway); socat and the asyncio relay have one hop and no "
        "encryption. masque-go's proxy is used by `toppy udp`, as the gateway is: what differs is "
        "the gateway alone. sing-box runs as client and server, UDP in a `direct` inbound, "
        "without a bandwidth limit, both with BBR, TUIC with `native` relaying. Socket buffers "
        "are what each program asks for by itself.\n\n"
        "*Without loss* is the highest offered rate that lost nothing, in steps of a quarter, each "
        "tried twice; *most* the most that was delivered per second at any offered rate, four "
        "times that one included, whatever was lost: a program that loses a burst now and then "
        "to a short queue or socket buffer may still carry much more. CPU is per delivered "
        "datagram. The load comes in bursts of 16, as from an "
        "application that uses GSO; the echoes come one by one, and their CPU shows what a "
        "datagram costs where there is nothing to batch.\n"
    )


def _one_way_table(runs: Sequence[Figures], names: Sequence[str]) -> str:
    columns = (
        "way",
        "datagrams/s without loss",
        "toppy, native / this",
        "most datagrams/s",
        "toppy, native / this",
        "CPU us without loss, server",
        "client",
        f"CPU us at {COMMON_RATE:,.0f}/s, server",
        "client",
    )
    rows = []
    for name in names:
        best = over(runs, "ways", name, "best", "rate")
        rows.append(
            (
                name,
                spread(best) if best else "none",
                _ratio(runs, name, "best", "rate"),
                spread(over(runs, "ways", name, "most")),
                _ratio(runs, name, "most"),
                _cpu(runs, name, "best", _SERVER),
                _cpu(runs, name, "best", _CLIENT),
                _cpu(runs, name, "common", _SERVER),
                _cpu(runs, name, "common", _CLIENT),
            )
        )
    return table(columns, rows)


def _echo_table(runs: Sequence[Figures], names: Sequence[str]) -> str:
    columns = (
        f"echo at {ECHO_RATE:,.0f}/s",
        "p50 us",
        "p99 us",
        "added p50",
        "added p99",
        "CPU us per echo, server",
        "client",
        "lost",
    )
    rows = []
    for name in names:
        lost = sum(over(runs, "ways", name, "echo", "sent")) - sum(
            over(runs, "ways", name, "echo", "received")
        )
        rows.append(
            (
                name,
                spread(over(runs, "ways", name, "echo", "p50_us")),
                spread(over(runs, "ways", name, "echo", "p99_us")),
                spread(_added(runs, name, "p50_us")) if name != DIRECT else "",
                spread(_added(runs, name, "p99_us")) if name != DIRECT else "",
                _cpu(runs, name, "echo", _SERVER),
                _cpu(runs, name, "echo", _CLIENT),
                f"{lost:,.0f}",
            )
        )
    return table(columns, rows)


_SERVER: Final = ("gateway", "relay")
_CLIENT: Final = ("client",)


def _cpu(runs: Sequence[Figures], name: str, figure: str, roles: Sequence[str]) -> str:
    for role in roles:
        values = over(runs, "ways", name, figure, "cpu_us", role)
        if values:
            return spread(values, "{:.1f}")
    return ""


def _ratio(runs: Sequence[Figures], name: str, *path: str) -> str:
    """In each run by itself, because days differ."""
    ratios = []
    for run in runs:
        ours, theirs = over([run], "ways", NATIVE, *path), over([run], "ways", name, *path)
        if ours and theirs and theirs[0] > 0:
            ratios.append(ours[0] / theirs[0])
    return spread(ratios, "{:.1f}") if ratios else MISSING


def _added(runs: Sequence[Figures], name: str, figure: str) -> list[float]:
    added = []
    for run in runs:
        through = over([run], "ways", name, "echo", figure)
        bare = over([run], "ways", DIRECT, "echo", figure)
        if through and bare:
            added.append(through[0] - bare[0])
    return added


def _missing(runs: Sequence[Figures], names: Sequence[str]) -> str:
    lines = [f"- {name}: {runs[-1]['ways'][name]['missing']}" for name in names]
    return "Missing in this run:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _plot(runs: Sequence[Figures], names: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    def middle(values: Sequence[float]) -> float:
        return sorted(values)[len(values) // 2] if values else math.nan

    shown = [name for name in names if name != DIRECT][::-1]
    figure = Figure(figsize=(10, 0.45 * len(shown) + 1.2), layout="constrained")
    rate, latency = figure.subplots(1, 2, sharey=True)
    colours = ["#c44e52" if name == NATIVE else "#4c72b0" for name in shown]
    rates = [middle(over(runs, "ways", name, "best", "rate")) for name in shown]
    mosts = [middle(over(runs, "ways", name, "most")) for name in shown]
    rate.barh(shown, mosts, color="#cccccc")
    bars = rate.barh(shown, rates, color=colours)
    rate.bar_label(bars, [f"{value:,.0f}" if value > 0 else "none" for value in rates], padding=3)
    rate.margins(x=0.25)
    rate.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
    rate.set_xlabel("datagrams/s without loss (grey: most)")
    added = [middle(_added(runs, name, "p50_us")) for name in shown]
    tails = [middle(_added(runs, name, "p99_us")) for name in shown]
    latency.barh(shown, tails, color="#cccccc", label="p99")
    latency.barh(shown, added, color=colours, label="p50")
    latency.set_xlabel("us added to an echo, p50 (grey: p99)")
    for axes in (rate, latency):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
