"""How fast tunnels and connections are set up, and how long one of them takes."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from integration.bench.crowd import CrowdProcess, crowds, shares, together
from integration.bench.figures import Figures, cpu_s, over, save_plot, spread, table
from integration.bench.ways import worker_processes
from integration.processes import Gateway, free_udp_port, running_gateway, wait_until
from toppy.quic.choose import has_native_engine

_CLIENTS = 2
_CONNECTIONS = 20
"""That tunnels are opened on."""
_RULES = 20
_AT_ONCE = 16
"""Under way per client process where as many as possible are asked for."""
_DEADLINE_S = 30.0
_LIMITS = """
[limits]
max_connections = 50000
max_connections_per_source = 50000
"""
_NO_RESUMPTION = "only the native engine resumes sessions, and it is not built here"
_REFERENCE_RATE = 100


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much is done in one run."""

    rates: tuple[int, ...]
    """Tunnels per second that are asked for steadily; the first is the reference."""
    reference_s: float
    seconds: float
    tunnels: int
    handshakes: int
    handshake_rate: int
    cold: int


_FULL = _Extent((_REFERENCE_RATE, 250, 500, 750, 1000), 10.0, 2.0, 4000, 2000, 50, 100)
_QUICK = _Extent((_REFERENCE_RATE,), 2.0, 2.0, 600, 200, 50, 20)


def rules(count: int = _RULES) -> str:
    """A policy of which the last rule allows what is asked for, in TOML."""
    others = [
        f"""
[[policy.rules]]
name = "site {number}"
action = "allow"
cidr = ["10.{number}.0.0/16", "fd00:{number:x}::/32"]
ports = [53, 123, "8000-8999"]
subjects = ["*"]
"""
        for number in range(1, count)
    ]
    return (
        "".join(others)
        + """
[[policy.rules]]
name = "loopback"
action = "allow"
cidr = ["127.0.0.0/8", "::1/128"]
"""
    )


class _Bench:
    """One gateway with one worker, and its clients."""

    def __init__(
        self, gateway: Gateway, members: Sequence[CrowdProcess], returning: CrowdProcess
    ) -> None:
        """``returning`` resumes its sessions; ``members`` begin each anew."""
        self._gateway = gateway
        self._members = members
        self._returning = returning
        self._roles = {
            "worker": worker_processes(gateway),
            "control": (psutil.Process(gateway.running.pid),),
            "client": tuple(member.process for member in (*members, returning)),
        }

    def do(
        self,
        command: str,
        count: int,
        *,
        rate: float | None = None,
        at_once: int = _AT_ONCE,
        with_tunnel: bool | None = None,
        members: Sequence[CrowdProcess] = (),
    ) -> Figures:
        """So many connections or tunnels: how fast, how long each, and what they cost."""
        members = members or self._members
        details: Figures = {
            "rate": rate / len(members) if rate is not None else None,
            "at_once": at_once,
            "deadline_s": _DEADLINE_S,
        }
        if with_tunnel is not None:
            details["with_tunnel"] = with_tunnel
        before = {role: cpu_s(processes) for role, processes in self._roles.items()}
        results = together(
            members,
            command,
            [
                {**details, "count": share, "after_s": index / rate if rate is not None else 0.0}
                for index, share in enumerate(shares(count, len(members)))
            ],
        )
        used = {role: cpu_s(each) - before[role] for role, each in self._roles.items()}
        seconds = max(result["seconds"] for result in results)
        done = sum(result["done"] for result in results)
        failures: dict[str, int] = {}
        for result in results:
            for reason, number in result["failures"].items():
                failures[reason] = failures.get(reason, 0) + number
        each = max(1, done)
        return {
            "done": done,
            "failures": failures,
            "per_s": done / seconds,
            "ms": _percentiles([ms for result in results for ms in result["ms"]]),
            "connected_ms": _percentiles([ms for r in results for ms in r["connected_ms"]]),
            "cpu_ms": {role: used[role] * 1e3 / each for role in used},
            "busy": {role: used[role] / seconds for role in used},
            "per_core_s": done / used["worker"] if used["worker"] else 0.0,
        }

    def cold(self, count: int, *, is_resumed: bool) -> Figures:
        """One connection with a first tunnel after the other."""
        member = self._returning if is_resumed else self._members[0]
        if is_resumed:  # the first one brings the ticket
            self.do("connect", 1, with_tunnel=True, members=[member])
        return self.do("connect", count, at_once=1, with_tunnel=True, members=[member])

    def clear(self) -> None:
        """No connection is left, on either side."""
        for member in (*self._members, self._returning):
            member.ask("close")
        wait_until(
            "the end of every connection",
            lambda: self._gateway.metric("toppy_gw_open_connections") == 0,
        )

    def end_tunnels(self) -> None:
        """No tunnel is left; the connections stay."""
        for member in self._members:
            member.ask("close_tunnels", keep=0)
        wait_until(
            "the end of every tunnel",
            lambda: self._gateway.metric("toppy_gw_open_tunnels") == 0,
        )


@contextlib.contextmanager
def _bench() -> Iterator[_Bench]:
    target = ("127.0.0.1", free_udp_port())
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        running_gateway(Path(directory), rules=rules(), extra=_LIMITS) as gateway,
        crowds(gateway, target, count=_CLIENTS) as members,
        crowds(gateway, target, count=1, resumes_sessions=True) as (returning,),
    ):
        yield _Bench(gateway, members, returning)


def measure(*, is_quick: bool) -> Figures:
    """One run."""
    extent = _QUICK if is_quick else _FULL
    with _bench() as bench:
        bench.do("connect", _CONNECTIONS)
        steady = []
        for rate in extent.rates:
            seconds = extent.reference_s if rate == _REFERENCE_RATE else extent.seconds
            steady.append({"rate": rate, **bench.do("open", int(rate * seconds), rate=rate)})
            bench.end_tunnels()
        highest = bench.do("open", extent.tunnels)
        bench.clear()
        handshakes = bench.do("connect", extent.handshakes)
        bench.clear()
        with_tunnel = bench.do("connect", extent.handshakes, with_tunnel=True)
        bench.clear()
        at_pace = bench.do(
            "connect", extent.handshake_rate * 2, rate=extent.handshake_rate, with_tunnel=True
        )
        bench.clear()
        cold = {"without resumption": bench.cold(extent.cold, is_resumed=False)}
        bench.clear()
        if has_native_engine():
            cold["with resumption"] = bench.cold(extent.cold, is_resumed=True)
        else:
            cold["with resumption"] = {"missing": _NO_RESUMPTION}
    return {
        "rules": _RULES,
        "tunnels": {"steady": steady, "highest": highest},
        "connections": {
            "handshake": handshakes,
            "with first tunnel": with_tunnel,
            "steady": {"rate": extent.handshake_rate, **at_pace},
        },
        "cold": cold,
    }


def _percentiles(values: list[float]) -> Figures:
    """p50, p99 and the largest; nothing where there is nothing."""
    if not values:
        return {}
    values.sort()
    return {
        "p50": values[len(values) // 2],
        "p99": values[len(values) * 99 // 100],
        "max": values[-1],
    }


def report(runs: Sequence[Figures], plots: Path) -> str:
    """A section of the report."""
    return "\n".join(
        [
            "## Setting up tunnels and connections\n",
            f"One worker, a bearer token, and a policy of {runs[0]['rules']} rules of which the "
            "last one allows the target. Two client processes on the same engine share the "
            "machine's cores with the worker and the control plane. A tunnel's time runs from the "
            "moment when it was due to the answer 200, a connection's to the gateway's SETTINGS. "
            "CPU is per tunnel or connection, the kernel's share included.\n",
            _tunnels(runs),
            _plot(runs, plots),
            _connections(runs),
            _cold(runs),
        ]
    )


_COLUMNS = (
    "per second",
    "p50 ms",
    "p99 ms",
    "failed",
    "CPU ms: worker",
    "control plane",
    "clients",
    "worker busy",
)


def _cells(runs: Sequence[Figures], *path: str | int) -> list[str]:
    """What each phase has in common, in the order of ``_COLUMNS``."""
    failed = sum(sum(_at(run, *path)["failures"].values()) for run in runs)
    cpu = [
        spread(over(runs, *path, "cpu_ms", role), "{:.2f}")
        for role in ("worker", "control", "client")
    ]
    return [
        spread(over(runs, *path, "per_s")),
        spread(over(runs, *path, "ms", "p50"), "{:.1f}"),
        spread(over(runs, *path, "ms", "p99"), "{:.1f}"),
        str(failed),
        *cpu,
        spread([100 * busy for busy in over(runs, *path, "busy", "worker")], "{:.0f} %"),
    ]


def _at(run: Figures, *path: str | int) -> Figures:
    place: Any = run
    for key in path:
        place = place[key]
    found: Figures = place
    return found


def _tunnels(runs: Sequence[Figures]) -> str:
    rows = [
        [f"{each['rate']}/s asked for", *_cells(runs, "tunnels", "steady", index)]
        for index, each in enumerate(runs[0]["tunnels"]["steady"])
    ]
    rows.append(["as many as possible", *_cells(runs, "tunnels", "highest")])
    return f"Tunnels on {_CONNECTIONS} existing connections:\n\n" + table(["", *_COLUMNS], rows)


def _connections(runs: Sequence[Figures]) -> str:
    rows = [
        [
            label,
            *_cells(runs, "connections", key),
            spread(over(runs, "connections", key, "per_core_s")),
        ]
        for key, label in (
            ("handshake", "handshakes, as many as possible"),
            ("with first tunnel", "with a first tunnel, as many as possible"),
            ("steady", f"the same, {runs[0]['connections']['steady']['rate']}/s asked for"),
        )
    ]
    return (
        "Full handshakes, each with a certificate (P-256), key exchange and HTTP/3 settings. The "
        "last column is what one core would do: connections per second of the worker's CPU "
        "time.\n\n" + table(["", *_COLUMNS, "per core and second"], rows)
    )


def _cold(runs: Sequence[Figures]) -> str:
    rows = []
    for name, found in runs[0]["cold"].items():
        if "missing" in found:
            rows.append([name, f"not measured: {found['missing']}", "", "", "", "", ""])
            continue
        times = (
            spread(over(runs, "cold", name, part, rank), "{:.2f}")
            for part in ("connected_ms", "ms")
            for rank in ("p50", "p99")
        )
        cpu = (
            spread(over(runs, "cold", name, "cpu_ms", role), "{:.2f}")
            for role in ("worker", "client")
        )
        rows.append([name, *times, *cpu])
    columns = ["", "connection p50 ms", "p99", "with first tunnel p50 ms", "p99"]
    return (
        "A cold connection, one at a time: QUIC, TLS and SETTINGS take one round trip, the first "
        "tunnel one more. Here, without a path in between, only the work counts. A resumed session "
        "takes as many round trips (there is no 0-RTT) and saves the certificate's signature and "
        "its verification.\n\n" + table([*columns, "CPU ms: worker", "client"], rows)
    )


def _plot(runs: Sequence[Figures], plots: Path) -> str:
    """Set-up time over the rate asked for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steady = runs[0]["tunnels"]["steady"]
    rates = [each["rate"] for each in steady]
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for rank in ("p50", "p99"):
        axes.plot(
            rates,
            [
                statistics.median(over(runs, "tunnels", "steady", index, "ms", rank) or [0.0])
                for index in range(len(steady))
            ],
            marker="o",
            label=rank,
        )
    axes.set_xlabel("tunnels per second asked for")
    axes.set_ylabel("time to the answer, ms")
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    link = save_plot(figure, plots / "tunnel-set-up.svg")
    plt.close(figure)
    return link
