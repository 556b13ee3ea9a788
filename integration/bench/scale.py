"""What idle connections and tunnels cost, and how the cost of a datagram grows with tunnels."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from integration.bench.crowd import CrowdProcess, crowds, shares, together
from integration.bench.figures import Figures, over, pss_mib, save_plot, spread, table
from integration.bench.ways import worker_processes
from integration.peers import start_peer
from integration.processes import Gateway, free_udp_port, running_gateway

_CLIENTS = 2
_CONNECTIONS = 10
"""That the tunnels are on: a thousand each at the most, the default bound."""
_AT_ONCE = 16
_DEADLINE_S = 120.0
_SIZE = 1200
_EXTRA = """
[limits]
max_connections = 50000
max_connections_per_source = 50000
tunnel_idle_timeout_s = 3600.0
"""


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much is done in one run."""

    counts: tuple[int, ...]
    """Of connections and tunnels at which memory is read."""
    idle: tuple[int, ...]
    """Of tunnels at which an idle gateway is watched; also the largest count of connections."""
    idle_s: float
    busy: tuple[int, ...]
    """Of tunnels that datagrams are spread over."""
    busy_s: float
    rate: int
    """Round trips per second."""
    settle_s: float = 1.5
    """Until the worker is quiet."""


_FULL = _Extent(
    (100, 1000, 5000, 10_000), (0, 1000, 10_000), 10.0, (10_000, 1000, 100, 10, 1), 3.0, 8000
)
_QUICK = _Extent((100, 500), (0, 500), 1.5, (500, 1), 1.0, 4000, 0.5)


@dataclass(frozen=True, slots=True)
class _Bench:
    """One gateway with one worker, and its clients."""

    gateway: Gateway
    members: list[CrowdProcess]
    settle_s: float

    @property
    def worker(self) -> psutil.Process:
        return worker_processes(self.gateway)[0]

    def connect(self, count: int) -> Figures:
        """``count`` connections more."""
        details = [
            {"count": share, "at_once": _AT_ONCE, "deadline_s": _DEADLINE_S}
            for share in shares(count, len(self.members))
        ]
        return _sum(together(self.members, "connect", details))

    def open(self, count: int) -> Figures:
        """``count`` tunnels in all: those that are missing are opened."""
        have = [member.ask("count")["tunnels"] for member in self.members]
        wanted = shares(count, len(self.members))
        details = [
            {"count": want - has, "at_once": _AT_ONCE, "deadline_s": _DEADLINE_S}
            for want, has in zip(wanted, have, strict=True)
        ]
        return _sum(together(self.members, "open", details))

    def keep(self, count: int) -> None:
        """``count`` tunnels in all: the others are closed."""
        for member, share in zip(self.members, shares(count, len(self.members)), strict=True):
            member.ask("close_tunnels", keep=share)

    def memory(self) -> Figures:
        """What the worker holds once it is quiet, in MiB."""
        time.sleep(self.settle_s)
        worker = self.worker
        return {
            "pss_mib": pss_mib([worker]),
            "rss_mib": worker.memory_info().rss / (1 << 20),
            "slab_mib": _slab_mib(),
        }

    def idle(self, seconds: float) -> Figures:
        """Percent of a core while nothing is asked of the gateway."""
        processes = {
            "worker": self.worker,
            "control": psutil.Process(self.gateway.running.pid),
        }
        before = {role: _cpu_ns(process) for role, process in processes.items()}
        begin = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - begin
        return {
            role: (_cpu_ns(process) - before[role]) / elapsed / 1e7
            for role, process in processes.items()
        }

    def busy(self, tunnels: int, rate: int, seconds: float) -> Figures:
        """Round trips at a steady rate, spread over all ``tunnels``."""
        worker = self.worker
        before = _cpu_ns(worker)
        details = [
            {"rate": rate * share / tunnels, "seconds": seconds, "size": _SIZE}
            for share in shares(tunnels, len(self.members))
        ]
        results = together(self.members, "send", details)
        used = _cpu_ns(worker) - before
        sent = sum(result["sent"] for result in results)
        received = sum(result["received"] for result in results)
        times = sorted(us for result in results for us in result["us"])
        return {
            "tunnels": tunnels,
            "rate": rate,
            "sent": sent,
            "received": received,
            "worker_us": used / 1e3 / max(1, sent + received),
            "p50_us": times[len(times) // 2] if times else 0.0,
            "p99_us": times[len(times) * 99 // 100] if times else 0.0,
        }


def _sum(results: Sequence[Figures]) -> Figures:
    failures: dict[str, int] = {}
    for result in results:
        for reason, number in result["failures"].items():
            failures[reason] = failures.get(reason, 0) + number
    return {"done": sum(result["done"] for result in results), "failures": failures}


def _cpu_ns(process: psutil.Process) -> int:
    """CPU time of all its threads; ``/proc/PID/stat`` counts hundredths of a second only."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def _slab_mib() -> float:
    """The kernel's own objects, sockets among them, of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def _bench(settle_s: float, *, has_target: bool) -> Iterator[_Bench]:
    port = free_udp_port()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        if has_target:
            echo = start_peer("echo", port, directory)
            stack.callback(echo.stop)
        gateway = stack.enter_context(running_gateway(directory, extra=_EXTRA))
        members = stack.enter_context(crowds(gateway, ("127.0.0.1", port), count=_CLIENTS))
        yield _Bench(gateway, members, settle_s)


def measure(*, is_quick: bool) -> Figures:
    """One run."""
    extent = _QUICK if is_quick else _FULL
    return {
        "connections": _measure_connections(extent),
        "tunnels": _measure_tunnels(extent),
        "on_connections": _CONNECTIONS,
        "idle_s": extent.idle_s,
    }


def _measure_connections(extent: _Extent) -> Figures:
    with _bench(extent.settle_s, has_target=False) as bench:
        empty = bench.memory()
        memory = []
        there = 0
        for count in extent.counts:
            added = bench.connect(count - there)
            there += added["done"]
            found = bench.memory()
            memory.append(
                {"count": there, "failures": added["failures"], **_each(found, empty, there)}
            )
        idle = [{"count": there, **bench.idle(extent.idle_s)}]
        lost = [member.ask("count")["lost"] for member in bench.members]
    return {"empty": empty, "memory": memory, "idle": idle, "lost": lost}


def _measure_tunnels(extent: _Extent) -> Figures:
    with _bench(extent.settle_s, has_target=True) as bench:
        idle = [{"count": 0, **bench.idle(extent.idle_s)}]
        bench.connect(_CONNECTIONS)
        empty = bench.memory()
        memory = []
        there = 0
        for count in extent.counts:
            added = bench.open(count)
            there += added["done"]
            found = bench.memory()
            memory.append(
                {"count": there, "failures": added["failures"], **_each(found, empty, there)}
            )
            if count in extent.idle:
                idle.append({"count": there, **bench.idle(extent.idle_s)})
        busy = []
        for count in extent.busy:
            bench.keep(count)
            time.sleep(extent.settle_s)
            bench.busy(count, extent.rate, extent.busy_s / 3)  # congestion control finds its rate
            busy.append(bench.busy(count, extent.rate, extent.busy_s))
        bench.keep(0)
        after = bench.memory()
        lost = [member.ask("count")["lost"] for member in bench.members]
    return {
        "empty": empty,
        "memory": memory,
        "idle": idle,
        "busy": busy,
        "after": after,
        "lost": lost,
    }


def _each(found: Figures, empty: Figures, count: int) -> Figures:
    """What each of ``count`` has added, in KiB, beside the whole."""
    return {
        **found,
        **{
            f"{name}_kib_each": (found[f"{name}_mib"] - empty[f"{name}_mib"]) * 1024 / max(1, count)
            for name in ("pss", "rss", "slab")
        },
    }


def report(runs: Sequence[Figures], plots: Path) -> str:
    """A section of the report."""
    idle_s = runs[0]["idle_s"]
    rate = runs[0]["tunnels"]["busy"][0]["rate"]
    return "\n".join(
        [
            "## Many connections and tunnels\n",
            "One worker. Memory is the growth of the worker's PSS, once it is quiet, for each idle "
            f"connection, and for each idle tunnel on {runs[0]['on_connections']} existing "
            "connections. The kernel's objects (sockets above all) are the growth of the whole "
            "machine's slab: connections need none of their own, each tunnel has a socket. Clients "
            "send a PING every five seconds, as `toppy udp` does.\n",
            _memory(runs),
            f"CPU of an idle gateway, in percent of a core, over {idle_s:.0f} s:\n",
            _idle(runs),
            f"How the cost of a datagram grows: {rate:,} round trips of {_SIZE:,} bytes per "
            "second, spread over all tunnels; each counts as two datagrams of the worker. With "
            "more tunnels fewer datagrams fall to one socket at a time, so that batches "
            "disappear.\n",
            _busy(runs),
            _plot(runs, plots),
        ]
    )


def _memory(runs: Sequence[Figures]) -> str:
    rows = []
    for kind, label in (("connections", "connections"), ("tunnels", "tunnels")):
        for index, each in enumerate(runs[0][kind]["memory"]):
            path = (kind, "memory", index)
            rows.append(
                [
                    f"{each['count']:,} {label}",
                    spread(over(runs, *path, "pss_mib"), "{:.0f}"),
                    spread(over(runs, *path, "pss_kib_each"), "{:.1f}"),
                    spread(over(runs, *path, "rss_kib_each"), "{:.1f}"),
                    spread(over(runs, *path, "slab_kib_each"), "{:.1f}"),
                ]
            )
    after = spread(over(runs, "tunnels", "after", "pss_mib"), "{:.0f}")
    empty = spread(over(runs, "tunnels", "empty", "pss_mib"), "{:.0f}")
    columns = ["", "worker's PSS MiB", "KiB each: PSS", "RSS", "kernel"]
    return (
        table(columns, rows)
        + f"\nThe worker begins with {empty} MiB; when all tunnels are closed it has {after} MiB.\n"
    )


def _idle(runs: Sequence[Figures]) -> str:
    rows = []
    for kind in ("tunnels", "connections"):
        for index, each in enumerate(runs[0][kind]["idle"]):
            rows.append(
                [
                    f"{each['count']:,} {kind}",
                    *(
                        spread(over(runs, kind, "idle", index, role), "{:.2f}")
                        for role in ("worker", "control")
                    ),
                ]
            )
    return table(["", "worker", "control plane"], rows)


def _busy(runs: Sequence[Figures]) -> str:
    rows = []
    for index, each in sorted(
        enumerate(runs[0]["tunnels"]["busy"]), key=lambda pair: int(pair[1]["tunnels"])
    ):
        path = ("tunnels", "busy", index)
        lost = [
            run["tunnels"]["busy"][index]["sent"] - run["tunnels"]["busy"][index]["received"]
            for run in runs
        ]
        rows.append(
            [
                f"{each['tunnels']:,}",
                spread(over(runs, *path, "worker_us"), "{:.1f}"),
                spread(over(runs, *path, "p50_us")),
                spread(over(runs, *path, "p99_us")),
                spread(lost),
            ]
        )
    return table(["tunnels", "worker CPU us per datagram", "p50 us", "p99 us", "lost"], rows)


def _plot(runs: Sequence[Figures], plots: Path) -> str:
    """CPU per datagram over the number of tunnels."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = sorted(
        (
            int(each["tunnels"]),
            statistics.median(over(runs, "tunnels", "busy", index, "worker_us")),
        )
        for index, each in enumerate(runs[0]["tunnels"]["busy"])
    )
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.plot([count for count, _ in points], [cost for _, cost in points], marker="o")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tunnels")
    axes.set_ylabel("worker CPU per datagram, us")
    axes.grid(visible=True, alpha=0.3)
    link = save_plot(figure, plots / "cost-by-tunnels.svg")
    plt.close(figure)
    return link
