"""TCP through the gateway on a long path with loss, alone and beside others.

Clients and gateway are in two network namespaces with ``tun_path`` between them, so that a kernel's
TCP flow can take the same path. ``python -m integration.bench.tcp_paths JSON`` is the process that
measures; it runs in the gateway's namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from integration.bench.figures import Figures, over, save_plot, spread, table
from integration.bench.forward import HOST
from integration.bench.tcp_load import start_tcp_load
from integration.bench.tcp_ways import finish, running_sink, running_up
from integration.bench.tun_path import FAR_HOST, TUN, running_tun_path
from integration.lossy_path import PathSettings
from integration.processes import Gateway, free_tcp_port, running_gateway, wait_until
from toppy.quic.choose import has_native_engine

LOSSY, SHARED, CLEAN = "1 Gbit/s, 1 % loss", "200 Mbit/s, 1 % loss", "200 Mbit/s, no loss"
PATHS: Final = {
    LOSSY: PathSettings(1e9, 0.025, 0.01),
    SHARED: PathSettings(200e6, 0.025, 0.01),
    CLEAN: PathSettings(200e6, 0.025),
}
"""Each with 50 ms there and back, the loss in each direction, and a queue of one round trip."""
TOPPY, CUBIC, BBR = "toppy", "kernel's CUBIC", "kernel's BBR"
CASES: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    LOSSY: ((TOPPY,), (CUBIC,), (BBR,)),
    SHARED: ((TOPPY, TOPPY), (CUBIC,), (TOPPY, CUBIC)),
    CLEAN: ((TOPPY, TOPPY), (CUBIC,), (TOPPY, CUBIC)),
}
"""By path, the flows that go on at the same time, all to the client; each toppy flow has a client
and a connection of its own."""
_BIN_S: Final = 0.25
_WARM_UP_S: Final = 2.0
"""Until congestion control has found its rate; shown, not counted."""
_SPARE_S: Final = 120.0
_GOAL_MB: Final = 40.0


def measure(*, is_quick: bool) -> Figures:
    """One run; a host that cannot make the path leaves its reason."""
    reason = _missing()
    if reason:
        return {"missing": reason}
    seconds, warm_up_s = (0.5, 0.25) if is_quick else (6.0, _WARM_UP_S)
    cases = {SHARED: ((TOPPY, CUBIC),)} if is_quick else CASES
    options = {"cases": cases, "seconds": seconds, "warm_up_s": warm_up_s}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", __name__, json.dumps(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=sum(map(len, CASES.values())) * (seconds + _SPARE_S),
        check=True,
    )
    figures: Figures = json.loads(done.stdout)
    return figures


def _missing() -> str:
    if not has_native_engine():
        return "the native engine is not built here"
    if os.geteuid() != 0 or not TUN.exists():
        return f"the path needs root and {TUN}"
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    return f"{', '.join(missing)}: not installed" if missing else ""


def _measure_here(
    cases: Mapping[str, Sequence[Sequence[str]]], seconds: float, warm_up_s: float
) -> Figures:
    """Cases like ``CASES``, in this namespace, which is the gateway's."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    figures: Figures = {"cases": {}, "up": {}}
    for name, all_flows in cases.items():
        with _path(PATHS[name]) as (prefix, path):
            figures["cases"][name] = {}
            for flows in all_flows:
                path.ask()
                bins = _carry(prefix, flows, "download", warm_up_s + seconds)
                figures["cases"][name][" and ".join(flows)] = {
                    "bins": bins,
                    "mb_s": [_mean_mb(each, warm_up_s) for each in bins],
                    "path": _counts(path.ask()),
                }
            if name == LOSSY:
                (up,) = _carry(prefix, (TOPPY,), "upload", warm_up_s + seconds)
                figures["up"][name] = {"bins": up, "mb_s": _mean_mb(up, warm_up_s)}
    return figures


@contextlib.contextmanager
def _path(settings: PathSettings) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A new path; and a command that runs others in the clients' namespace."""
    near = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
    try:
        there, here = f"/proc/{near.pid}/ns/net", f"/proc/{os.getpid()}/ns/net"
        wait_until("a namespace", lambda: Path(there).readlink() != Path(here).readlink())
        prefix = ("nsenter", f"--net={there}")
        subprocess.run([*prefix, "ip", "link", "set", "lo", "up"], check=True)
        with running_tun_path(there, here, settings) as path:
            yield prefix, path
    finally:
        near.communicate()


@contextlib.contextmanager
def _gateway() -> Iterator[Gateway]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        running_gateway(Path(directory), host=FAR_HOST, engine="native") as gateway,
    ):
        yield gateway


def _carry(
    prefix: Sequence[str], flows: Sequence[str], kind: str, seconds: float
) -> list[list[float]]:
    """Bytes per second of each flow, for each bin."""
    target = free_tcp_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(running_sink("0.0.0.0", target))  # in a namespace
        gateway = stack.enter_context(_gateway()) if TOPPY in flows else None
        ways = []
        for number, flow in enumerate(flows):
            if flow == TOPPY and gateway is not None:
                up = running_up(gateway, f"{HOST}:{target}", name=f"up-{number}", prefix=prefix)
                port, _ = stack.enter_context(up)
                ways.append((HOST, port, ""))
            else:
                ways.append((FAR_HOST, target, "cubic" if flow == CUBIC else "bbr"))
        load = start_tcp_load(kind, prefix=prefix, flows=ways, seconds=seconds, bin_s=_BIN_S)
        bins: list[list[float]] = finish(load, seconds)["bytes_per_s"]
        return bins


def _mean_mb(bins: Sequence[float], warm_up_s: float) -> float:
    return statistics.fmean(bins[round(warm_up_s / _BIN_S) :]) / 1e6


def _counts(report: dict[str, Any]) -> Figures:
    counts = report["to_near"]
    return {
        "failures": report["failures"],
        "queue_full": counts["queue_full"] / max(1, counts["arrived"]),
        "most_late_ms": counts["most_late_s"] * 1e3,
    }


def report(runs: Sequence[Figures], plots: Path) -> str:
    """A part of the section on TCP."""
    title = "### TCP on long paths with loss\n"
    missing = [run["missing"] for run in runs if "missing" in run]
    if missing:
        return f"{title}\nNot measured: {missing[0]}.\n"
    rows = []
    for path, cases in CASES.items():
        for flows in cases:
            at = ("cases", path, " and ".join(flows))
            if not over(runs, *at, "mb_s", 0):
                continue
            each = [over(runs, *at, "mb_s", n) for n in range(len(flows))]
            rows.append(
                [
                    path,
                    " and ".join(flows),
                    *(spread(mb, "{:.1f}") for mb in each),
                    *([""] if len(flows) == 1 else []),
                    spread([100 * x for x in over(runs, *at, "path", "queue_full")], "{:.2f} %"),
                ]
            )
    return "\n".join(
        [
            title,
            "The path of 50 ms there and back lies between two network namespaces, so that the "
            "kernel's own TCP takes the same one: its rate (Ethernet's headers count), random loss "
            "in both directions, a drop-tail queue of one round trip. Flows go to the client; each "
            f"toppy flow has a client and a connection of its own. The first {_WARM_UP_S:.0f} s "
            "are not counted.\n",
            table(["path", "flows", "first, MB/s", "second", "dropped by the queue"], rows),
            _goals(runs),
            _plot(runs, plots),
        ]
    )


def _goals(runs: Sequence[Figures]) -> str:
    """What was asked for, and what there is."""

    def rates(path: str, *flows: str) -> list[list[float]]:
        at = ("cases", path, " and ".join(flows), "mb_s")
        return [over(runs, *at, n) for n in range(len(flows))]

    (down,) = rates(LOSSY, TOPPY)
    up = over(runs, "up", LOSSY, "mb_s")
    lines = [
        f"- at least {_GOAL_MB:.0f} MB/s with 1 % loss: {spread(down, '{:.1f}')} to the client, "
        f"{spread(up, '{:.1f}')} to the target"
    ]
    for path in (SHARED, CLEAN):
        first, second = rates(path, TOPPY, TOPPY)
        ratios = [max(pair) / max(0.001, min(pair)) for pair in zip(first, second, strict=True)]
        (alone,), (_, beside) = rates(path, CUBIC), rates(path, TOPPY, CUBIC)
        kept = [100 * b / max(0.001, a) for a, b in zip(alone, beside, strict=False)]
        lines.append(
            f"- {path}: two toppy flows share {spread(ratios, '{:.2f}')} : 1 (asked for: at most "
            f"2); {CUBIC} keeps {spread(kept, '{:.0f} %')} of what it has alone beside toppy"
        )
    failures = sum(
        case["path"]["failures"]
        for run in runs
        for cases in run["cases"].values()
        for case in cases.values()
    )
    if failures:
        lines.append(f"- the path itself failed {failures} packets: these figures are too low")
    return "What was asked for, and what was measured:\n\n" + "\n".join(lines) + "\n"


def _plot(runs: Sequence[Figures], plots: Path) -> str:
    """How flows share, over time, in the first run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shared = [
        (path, flows, case)
        for path in (SHARED, CLEAN)
        for flows in CASES[path]
        if len(flows) > 1 and (case := runs[0]["cases"].get(path, {}).get(" and ".join(flows)))
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey=True)
    for axis, (path, flows, case) in zip(axes.flat, shared, strict=False):
        for number, (flow, bins) in enumerate(zip(flows, case["bins"], strict=True), 1):
            seconds = [_BIN_S * (place + 1) for place in range(len(bins))]
            axis.plot(seconds, [each / 1e6 for each in bins], label=f"{number}: {flow}")
        axis.set_title(path, fontsize="medium")
        axis.set_ylabel("MB/s")
        axis.legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    link = save_plot(figure, plots / "tcp-shares.svg")
    plt.close(figure)
    return link


def main() -> None:
    """Entry point of the process that measures."""
    print(json.dumps(_measure_here(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
