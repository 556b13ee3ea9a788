"""Case 6: what a second worker brings. The worker count alone differs; two clients have a
connection each. Where the gateway is on the slow engine and its clients on the fast one, the
gateway needs the cores and its clients do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from integration.bench.figures import Figures, over, spread, table
from integration.bench.measure import highest_one_way
from integration.bench.ways import through_gateway
from toppy.quic.choose import has_native_engine

_ENGINES = ("native", "aioquic") if has_native_engine() else ("aioquic",)
_FIRST = {"native": 160_000.0, "aioquic": 5_000.0}
_MOST = 1_200_000.0
_COUNTS = (1, 2)


def measure(*, is_quick: bool) -> Figures:
    """One run: by the gateway's engine and its count of workers."""
    figures: Figures = {}
    for engine in _ENGINES[-1:] if is_quick else _ENGINES:
        figures[engine] = {}
        for workers in _COUNTS:
            with through_gateway(
                engine=engine, client_engine=_ENGINES[0], workers=workers, clients=2
            ) as ways:
                run = highest_one_way(ways, _FIRST[engine], 1.0, most=_MOST)
                figures[engine][str(workers)] = asdict(run)
    return figures


def report(runs: Sequence[Figures], plots: Path) -> str:
    """The table of every run, and what it means."""
    del plots
    rows = [
        [
            engine,
            str(workers),
            spread(over(runs, engine, str(workers), "rate")),
            spread(_cores(runs, engine, workers, "gateway"), "{:.2f}"),
            spread(_cores(runs, engine, workers, "client"), "{:.2f}"),
        ]
        for engine in _ENGINES
        for workers in _COUNTS
    ]
    text = "## Workers\n\n1,200 bytes one way from two clients, the highest rate without loss.\n\n"
    text += table(
        ["gateway on", "workers", "datagrams/s", "cores of the gateway", "cores of the clients"],
        rows,
    )
    engine = _ENGINES[-1]
    one, two = (over(runs, engine, str(workers), "rate") for workers in _COUNTS)
    ratios = [after / before for before, after in zip(one, two, strict=True)]
    return text + (
        f"\nWhere the gateway is what needs the cores ({engine}), two workers carry "
        f"{spread(ratios, '{:.2f}')}\ntimes what one does. Generator and sink need the rest of "
        "this machine's two cores. On the\nnative engine the load shares the cores from the "
        "start: a second worker finds none free.\n"
    )


def _cores(runs: Sequence[Figures], engine: str, workers: int, role: str) -> list[float]:
    path = (engine, str(workers))
    rates = over(runs, *path, "rate")
    costs = over(runs, *path, "cpu_us", role)
    return [rate * cost / 1e6 for rate, cost in zip(rates, costs, strict=True)]
