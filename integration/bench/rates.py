"""Case: how exactly a gateway keeps to a rate over ten seconds, and what charging costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from integration.bench.figures import Figures, over, spread, table
from integration.bench.measure import SIZE, OneWay, measure_one_way
from integration.bench.ways import through_gateway
from toppy.quic.choose import has_native_engine

_ENGINE: Final = "native" if has_native_engine() else "aioquic"
_RATES_MIB: Final = (1, 10, 100)
_BURST_BYTES: Final = 256 * 1024
_OVERLOAD: Final = 1.2
_SECONDS: Final = 10.0
_COST_RATE: Final = 60_000.0
_COST_SECONDS: Final = 4.0
_UNREACHED: Final = (
    "[rates]\nudp_bytes_per_sec = 100_000_000_000\nsubject_bytes_per_sec = 100_000_000_000\n"
)
"""A tunnel's own limit and a budget, neither of which anybody reaches."""


def measure(*, is_quick: bool) -> Figures:
    """One run: by rate in MiB/s, and the worker's time per datagram with and without limits."""
    figures: Figures = {"kept": {}, "cost": {}}
    for rate_mib in _RATES_MIB[-1:] if is_quick else _RATES_MIB:
        per_s = rate_mib << 20
        limits = f"[rates]\nudp_bytes_per_sec = {per_s}\nudp_burst_bytes = {_BURST_BYTES}\n"
        with through_gateway(engine=_ENGINE, extra=limits) as ways:
            run = measure_one_way(ways, _OVERLOAD * per_s / SIZE, 2.0 if is_quick else _SECONDS)
        figures["kept"][str(rate_mib)] = {**asdict(run), "error": _error(run, per_s)}
    for name, limits in (("none", ""), ("unreached", _UNREACHED)):
        with through_gateway(engine=_ENGINE, extra=limits) as ways:
            rate = _COST_RATE if _ENGINE == "native" else 3_000.0
            run = measure_one_way(ways, rate, 1.0 if is_quick else _COST_SECONDS)
        figures["cost"][name] = asdict(run)
    return figures


def _error(run: OneWay, per_s: int) -> float:
    """Percent beside the rate, once the burst is taken off, which a full bucket lets through."""
    # the generator's seconds are what its deliveries per second were divided by
    seconds = run.received / run.rate
    return 100 * ((run.received * SIZE - _BURST_BYTES) / (per_s * seconds) - 1)


def report(runs: Sequence[Figures], plots: Path) -> str:
    """The tables of every run."""
    del plots
    text = (
        "## Rates\n\nOne tunnel to which 1.2 times its rate is offered for ten seconds, in "
        "datagrams of 1,200 bytes; the burst of 256 KiB is taken off.\n\n"
    )
    text += table(
        ["rate", "passed, MiB/s", "beside the rate"],
        [
            [
                f"{rate_mib} MiB/s",
                spread([rate * SIZE / (1 << 20) for rate in over(runs, *path, "rate")], "{:.2f}"),
                spread(over(runs, *path, "error"), "{:+.2f} %"),
            ]
            for rate_mib in _RATES_MIB
            for path in [("kept", str(rate_mib))]
        ],
    )
    text += (
        f"\nWhat charging costs: {_COST_RATE:,.0f} datagrams/s through limits that nobody "
        "reaches, a tunnel's own and its subject's.\n\n"
    )
    return text + table(
        ["limits", "worker, µs of CPU per datagram", "lost"],
        [
            [
                name,
                spread(over(runs, "cost", name, "cpu_us", "gateway"), "{:.2f}"),
                spread(
                    [
                        sent - received
                        for sent, received in zip(
                            over(runs, "cost", name, "sent"),
                            over(runs, "cost", name, "received"),
                            strict=True,
                        )
                    ]
                ),
            ]
            for name in ("none", "unreached")
        ],
    )
