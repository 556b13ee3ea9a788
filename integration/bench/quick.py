"""The main figures in under a minute, for every change of the code."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from integration.bench.figures import MISSING
from integration.bench.measure import highest_one_way, measure_echo
from integration.bench.ways import direct, through_gateway
from toppy.quic.choose import has_native_engine

_SECONDS = 0.7
_FIRST = {"no gateway": 600_000.0, "native": 120_000.0, "aioquic": 6_000.0}


def measure_quick(console: Console) -> None:
    """Measure and print; ratios are to the same work without a gateway."""
    table = Table(title="1,200-byte datagrams; rates without loss, CPU of the gateway's worker")
    for name in ("way", "one way /s", "ratio", "CPU us", "echo p50 us", "ratio", "p99", "CPU us"):
        table.add_column(name, justify="left" if name == "way" else "right")
    base_rate = base_p50 = 0.0
    engines = ("native", "aioquic") if has_native_engine() else ("aioquic",)
    for kind in ("no gateway", *engines):
        if kind == "no gateway":
            ways = [direct()]
            one_way = highest_one_way(ways, _FIRST[kind], _SECONDS)
            echo = measure_echo(ways, 1000.0, 1.5)
            base_rate, base_p50 = one_way.rate, echo.p50_us
        else:
            with through_gateway(engine=kind) as ways:
                one_way = highest_one_way(ways, _FIRST[kind], _SECONDS)
                echo = measure_echo(ways, 1000.0, 1.5)
        cpu = [run.cpu_us.get("gateway") for run in (one_way, echo)]
        table.add_row(
            kind,
            f"{one_way.rate:,.0f}",
            f"{one_way.rate / base_rate:.3f}",
            f"{cpu[0]:.1f}" if cpu[0] is not None else MISSING,
            f"{echo.p50_us:,.0f}",
            f"{echo.p50_us / base_p50:.1f}",
            f"{echo.p99_us:,.0f}",
            f"{cpu[1]:.0f}" if cpu[1] is not None else MISSING,
        )
    console.print(table)
