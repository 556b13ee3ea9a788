"""Lossy and slow paths: what gets through, how long it takes under load, and who gets how much."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

from integration.bench.figures import Figures, over, save_plot, spread, table
from integration.bench.path_load import BIN_S, Stream, carry
from integration.lossy_path import (
    IP_AND_UDP_BYTES,
    PathReport,
    PathSettings,
    RunningPath,
    running_path,
)
from integration.processes import Gateway, free_udp_port, running_gateway, running_udp_client
from toppy.quic.choose import has_native_engine

mpl.use("Agg")

SIZE = 1200
_RATE_BITS = 100e6
LOSSY, CLEAN, NEAR = "1 % loss, 50 ms", "no loss, 50 ms", "1 % loss, 10 ms"
PATHS: Mapping[str, PathSettings] = {
    LOSSY: PathSettings(_RATE_BITS, 0.025, 0.01),
    CLEAN: PathSettings(_RATE_BITS, 0.025),
    NEAR: PathSettings(_RATE_BITS, 0.005, 0.01),
}
"""By the loss in each direction and the round trip."""

_QUIC_BYTES = 32
"""About what QUIC and the HTTP Datagram add; only for how much is offered, results use what the
path saw."""
_CAPACITY = _RATE_BITS / 8 / (SIZE + _QUIC_BYTES + IP_AND_UDP_BYTES)
"""Tunnelled datagrams per second that fill the path."""
_OVERLOAD = 1.1
_ECHO_RATE, _ECHO_BYTES = 100.0, 200
_MODEST_BITS = 2e6
_MODEST = 9
_GREEDY = 10
_LONG_S = 11.0
"""BBR measures the path's own delay every 10 s, at the price of less in flight."""
_GOAL_SHARE, _GOAL_MS = 0.97, 100.0
_COLOURS = ("#4c72b0", "#dd8452", "#55a868")


def measure(*, is_quick: bool) -> Figures:
    """One run."""
    figures: Figures = {
        "paths": {
            name: asdict(path) | {"queue_bytes": path.largest_queue_bytes}
            for name, path in PATHS.items()
        },
        "plain": {},
        "saturated": {},
        "downward": {},
        "nearly_full": {},
        "fairness": {},
        "beside": {},
    }
    if not has_native_engine():
        return figures | {"missing": "the native engine is not built here"}
    seconds = 2.0 if is_quick else 3.0
    names = [LOSSY] if is_quick else list(PATHS)
    for name in names:
        figures["plain"][name] = _measure_plain(PATHS[name], min(seconds, 2.0))
    for control in ("bbr",) if is_quick else ("bbr", "cubic", "newreno"):
        with _gateway(control) as gateway:
            _measure_control(figures, gateway, control, seconds, is_quick=is_quick)
    return figures


def _measure_control(
    figures: Figures, gateway: Gateway, control: str, seconds: float, *, is_quick: bool
) -> None:
    def run(
        path: str, build: Callable[[list[int]], list[Stream]], seconds: float, *controls: str
    ) -> Figures:
        return _measure_tunnels(gateway, PATHS[path], controls or (control,), build, seconds)

    saturated = figures["saturated"][control] = {}
    names = {"bbr": list(PATHS), "cubic": [LOSSY, CLEAN], "newreno": [LOSSY]}[control]
    for name in [LOSSY] if is_quick else names:
        is_long = control == "bbr" and name == LOSSY and not is_quick
        saturated[name] = run(name, _saturating("up"), _LONG_S if is_long else seconds)
    if control == "bbr":
        figures["fairness"][control] = {"one greedy": run(LOSSY, _one_greedy, seconds)}
    if is_quick or control != "bbr":
        return
    figures["downward"][control] = {LOSSY: run(LOSSY, _saturating("down"), seconds)}
    figures["nearly_full"][control] = {LOSSY: run(LOSSY, _nearly_full, seconds)}
    figures["fairness"][control]["ten greedy"] = run(LOSSY, _ten_greedy, seconds)
    for other in ("bbr", "cubic"):
        figures["beside"][f"{control} and {other}"] = run(
            CLEAN, _two_connections, 2 * seconds, control, other
        )


def _saturating(direction: Any) -> Callable[[list[int]], list[Stream]]:
    def build(ports: list[int]) -> list[Stream]:
        return [
            Stream("greedy", direction, _CAPACITY * _OVERLOAD, ports[0], SIZE),
            Stream("echo", "echo", _ECHO_RATE, ports[0], _ECHO_BYTES),
        ]

    return build


def _nearly_full(ports: list[int]) -> list[Stream]:
    return [
        Stream("greedy", "up", _CAPACITY * 0.9, ports[0], SIZE),
        Stream("echo", "echo", _ECHO_RATE, ports[0], _ECHO_BYTES),
    ]


def _one_greedy(ports: list[int]) -> list[Stream]:
    modest_rate = _MODEST_BITS / 8 / SIZE
    return [
        Stream("greedy", "up", _CAPACITY * _OVERLOAD, ports[0], SIZE),
        *(Stream(f"modest {n}", "up", modest_rate, ports[0], SIZE) for n in range(1, _MODEST + 1)),
    ]


def _ten_greedy(ports: list[int]) -> list[Stream]:
    rate = 2 * _CAPACITY / _GREEDY
    return [Stream(f"greedy {n}", "up", rate, ports[0], SIZE) for n in range(1, _GREEDY + 1)]


def _two_connections(ports: list[int]) -> list[Stream]:
    return [Stream(f"client {n}", "up", _CAPACITY, port, SIZE) for n, port in enumerate(ports, 1)]


def _measure_plain(settings: PathSettings, seconds: float) -> Figures:
    """The path without a gateway: its own round trip, and what it carries."""
    target_port = free_udp_port()
    with running_path(free_udp_port(), ("127.0.0.1", target_port), settings) as path:
        echo = Stream("echo", "echo", _ECHO_RATE, path.port, _ECHO_BYTES)
        idle = carry([echo], target_port, warm_up_s=0.2, seconds=seconds / 2)
        path.report()
        greedy = Stream("greedy", "up", _CAPACITY * _OVERLOAD, path.port, SIZE)
        full = carry([greedy], target_port, warm_up_s=0.5, seconds=seconds)
        return {
            "round_trip": asdict(idle[0]),
            "streams": [asdict(each) for each in full],
            "path": _path_figures(path.report()),
        }


@contextlib.contextmanager
def _gateway(control: str) -> Iterator[Gateway]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        running_gateway(
            Path(directory), engine="native", extra=f'congestion_control = "{control}"'
        ) as gateway,
    ):
        yield gateway


@contextlib.contextmanager
def _clients(
    gateway: Gateway, settings: PathSettings, controls: Sequence[str], target_port: int
) -> Iterator[tuple[RunningPath, list[int]]]:
    """A client for each congestion control, all over one path; their local ports."""
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(
            running_path(free_udp_port(), (gateway.host, gateway.port), settings)
        )
        behind_path = replace(gateway, port=path.port)
        ports = []
        for control in controls:
            port, _ = stack.enter_context(
                running_udp_client(
                    behind_path,
                    f"127.0.0.1:{target_port}",
                    engine="native",
                    name=f"client-{next(_client_numbers)}",
                    extra=f'congestion_control = "{control}"',
                )
            )
            ports.append(port)
        yield path, ports


_client_numbers = itertools.count()


def _measure_tunnels(
    gateway: Gateway,
    settings: PathSettings,
    controls: Sequence[str],
    build: Callable[[list[int]], list[Stream]],
    seconds: float,
) -> Figures:
    """New connections over a new path, so that no run begins with what another has left."""
    target_port = free_udp_port()
    with _clients(gateway, settings, controls, target_port) as (path, ports):
        streams = build(ports)
        warm_up_s = 20 * settings.round_trip_s + 0.4
        delivered = carry(streams, target_port, warm_up_s=warm_up_s, seconds=seconds)
        report = path.report()
    large = [each for each, stream in zip(delivered, streams, strict=True) if stream.size == SIZE]
    counts = report.to_sender if streams[0].kind == "down" else report.to_target
    wire_bytes = IP_AND_UDP_BYTES + max(
        (size for size in counts.sizes if size > SIZE),
        key=lambda size: counts.sizes[size],
        default=SIZE + _QUIC_BYTES,
    )
    carries = settings.rate_bits / 8 / wire_bytes * (1 - settings.loss)
    sent = sum(each.sent for each in large)
    return {
        "streams": [asdict(each) for each in delivered],
        "path": _path_figures(report),
        "wire_bytes": wire_bytes,
        "share": sum(each.rate for each in large) / carries,
        "share_of_sent": sum(each.received for each in large) / max(1, sent) / (1 - settings.loss),
    }


def _path_figures(report: PathReport) -> Figures:
    figures: Figures = {"failures": report.failures, "cpu_s": report.cpu_s}
    for name, counts in (("to_target", report.to_target), ("to_sender", report.to_sender)):
        taken = max(1, counts.arrived - counts.queue_full)
        figures[name] = {
            "arrived": counts.arrived,
            "queue_full": counts.queue_full,
            "lost": counts.lost,
            "carried": counts.carried,
            "mean_queue_ms": counts.queue_s / taken * 1e3,
            "most_late_ms": counts.most_late_s * 1e3,
        }
    return figures


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def max_min_shares(demands: Sequence[float], total: float) -> list[float]:
    """What each gets when nobody can have more without somebody who has less having even less."""
    shares = [0.0] * len(demands)
    left = total
    ordered = sorted(range(len(demands)), key=lambda index: demands[index])
    for place, index in enumerate(ordered):
        shares[index] = min(demands[index], left / (len(demands) - place))
        left -= shares[index]
    return shares


def fairness(streams: Sequence[Figures], seconds: float) -> float:
    """Jain's index of what each stream got over its max-min fair share of what all got."""
    got = [stream["goodput_bits"] for stream in streams]
    demands = [stream["sent"] / seconds * SIZE * 8 for stream in streams]
    shares = max_min_shares(demands, sum(got))
    return jain([each / share if share else 0.0 for each, share in zip(got, shares, strict=True)])


def report(runs: Sequence[Figures], plots: Path) -> str:
    """The section, as markdown."""
    missing = [run["missing"] for run in runs if "missing" in run]
    if missing:
        return f"## Lossy and slow paths\n\nNot measured: {missing[0]}.\n"
    parts = [
        _INTRODUCTION.format(
            rate=_RATE_BITS / 1e6,
            overload=_OVERLOAD * 100,
            echo_rate=_ECHO_RATE,
            echo_bytes=_ECHO_BYTES,
        ),
        _goodput_table(runs),
        _share_plot(runs, plots),
        "### Under load\n\n" + _LATENCY_TEXT,
        _latency_table(runs),
        "### Fair shares\n\n" + _FAIRNESS_TEXT.format(modest=_MODEST, greedy=_GREEDY),
        _fairness_table(runs),
        _fairness_plot(runs, plots),
    ]
    if runs[0]["beside"]:
        parts += ["### Two connections on one path\n\n" + _BESIDE_TEXT, _beside_table(runs)]
    if failures := sum(_failures(run) for run in runs):
        parts.append(
            f"The path emulator itself failed {failures} packets: these figures are too low.\n"
        )
    return "\n".join(parts)


_INTRODUCTION = """## Lossy and slow paths

Between `toppy udp` and the gateway: {rate:.0f} Mbit/s (IP and UDP headers count), a delay, random
loss in both directions, and a drop-tail queue that holds one round trip. "The path carries" means
its rate, less its loss, in packets as large as those that it saw: so a share of 100 % is what is
possible, and QUIC's and HTTP's headers are accounted for. One tunnel offers {overload:.0f} % of
that in 1,200-byte datagrams; an echo of {echo_bytes} bytes at {echo_rate:.0f}/s goes on beside it.
"""

_LATENCY_TEXT = """Added to the path's own round trip, which a plain UDP echo without load measured.
The queue on the path is part of it: the emulator says how long packets waited in it. The greedy
tunnel's own delay, one way, has its queue at the sender on top.
"""

_FAIRNESS_TEXT = """On one connection, 1 % loss and 50 ms, BBR: first one greedy tunnel that offers
more than the path carries beside {modest} tunnels of 2 Mbit/s each, then {greedy} greedy ones.
Jain's index is that of what each got over its max-min fair share: 1 is fair.
"""

_BESIDE_TEXT = """Two clients, each with a connection of its own that offers all that the path can
carry: no loss but that of the full queue, 50 ms.
"""


def _controls(runs: Sequence[Figures], kind: str = "saturated") -> list[tuple[str, str]]:
    return [(control, path) for control, paths in runs[0][kind].items() for path in paths]


def _goodput_table(runs: Sequence[Figures]) -> str:
    rows: list[list[str]] = []
    for path in runs[0]["plain"]:
        plain = over(runs, "plain", path, "streams", 0, "goodput_bits")
        rows.append([path, "plain UDP, no gateway", _mbit(plain), "", "", ""])
        for kind, label in (
            ("saturated", "{} to the target"),
            ("downward", "{} to the client"),
            ("nearly_full", "{}, 90 % offered"),
        ):
            for control, name in _controls(runs, kind):
                if name != path:
                    continue
                at = (kind, control, name)
                share = "share_of_sent" if kind == "nearly_full" else "share"
                goodput = over(runs, *at, "streams", 0, "goodput_bits")
                direction = "to_sender" if kind == "downward" else "to_target"
                dropped = [
                    full / max(1.0, arrived)
                    for full, arrived in zip(
                        over(runs, *at, "path", direction, "queue_full"),
                        over(runs, *at, "path", direction, "arrived"),
                        strict=True,
                    )
                ]
                rows.append(
                    [
                        path,
                        label.format(_NAMES[control]),
                        _mbit(goodput),
                        _percent(over(runs, *at, share)),
                        _percent([a / b for a, b in zip(goodput, plain, strict=True)])
                        if kind != "nearly_full"
                        else "",
                        _percent(dropped, 2),
                    ]
                )
    heads = (
        "path",
        "what",
        "goodput Mbit/s",
        "of what the path carries (of what was sent, at 90 %)",
        "of plain UDP",
        "dropped by the path's queue",
    )
    return table(heads, rows)


_NAMES = {"bbr": "BBR", "cubic": "CUBIC", "newreno": "NewReno"}


def _latency_table(runs: Sequence[Figures]) -> str:
    rows = []
    for kind, label in (
        ("saturated", "{}"),
        ("downward", "{}, load to the client"),
        ("nearly_full", "{}, 90 % offered"),
    ):
        for control, path in _controls(runs, kind):
            at = (kind, control, path)
            own = over(runs, "plain", path, "round_trip", "p50_ms")
            direction = "to_sender" if kind == "downward" else "to_target"
            rows.append(
                [
                    path,
                    label.format(_NAMES[control]),
                    *(
                        spread(_less(over(runs, *at, "streams", 1, key), own), "{:.1f}")
                        for key in ("p50_ms", "p99_ms", "most_ms")
                    ),
                    spread(over(runs, *at, "path", direction, "mean_queue_ms"), "{:.1f}"),
                    *(
                        spread(over(runs, *at, "streams", 0, key), "{:.0f}")
                        for key in ("p50_ms", "p99_ms")
                    ),
                ]
            )
    heads = (
        "path",
        "congestion control",
        "echo: added p50 ms",
        "p99",
        "most",
        "wait in the path's queue, mean ms",
        "greedy tunnel, one way: p50 ms",
        "p99",
    )
    return table(heads, rows)


def _fairness_table(runs: Sequence[Figures]) -> str:
    rows = []
    for case, first in runs[0]["fairness"]["bbr"].items():
        index = [
            fairness(streams, len(streams[0]["bins_bits"]) * BIN_S)
            for streams in (run["fairness"]["bbr"][case]["streams"] for run in runs)
        ]
        for kind in ("greedy", "modest"):
            places = [n for n, each in enumerate(first["streams"]) if each["name"].startswith(kind)]
            if not places:
                continue
            goodputs, shares, delays = (
                [over(runs, "fairness", "bbr", case, "streams", n, key) for n in places]
                for key in ("goodput_bits", "received", "p99_ms")
            )
            sent = [over(runs, "fairness", "bbr", case, "streams", n, "sent") for n in places]
            arrived = [
                got / max(1.0, offered)
                for each, of in zip(shares, sent, strict=True)
                for got, offered in zip(each, of, strict=True)
            ]
            rows.append(
                [
                    case,
                    f"{len(places)} {kind}",
                    _mbit([bits for each in goodputs for bits in each], 2),
                    _percent(arrived),
                    spread([ms for each in delays for ms in each], "{:.0f}"),
                    spread(index, "{:.4f}"),
                ]
            )
    heads = ("case", "tunnels", "each gets Mbit/s", "of what each offered", "p99 one way ms")
    return table((*heads, "Jain's index"), rows)


def _beside_table(runs: Sequence[Figures]) -> str:
    rows = []
    for case in runs[0]["beside"]:
        rows.append(
            [
                " and ".join(_NAMES[each] for each in case.split(" and ")),
                *(
                    _mbit(over(runs, "beside", case, "streams", n, "goodput_bits"))
                    for n in range(2)
                ),
                _percent(over(runs, "beside", case, "share")),
            ]
        )
    return table(("connections", "first, Mbit/s", "second", "both, of what the path carries"), rows)


def _share_plot(runs: Sequence[Figures], plots: Path) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4))
    paths = list(runs[0]["plain"])
    for number, (control, measured) in enumerate(runs[0]["saturated"].items()):
        places = [n + (number - 1) * 0.27 for n, path in enumerate(paths) if path in measured]
        known = [path for path in paths if path in measured]
        shares = [
            100 * statistics.median(over(runs, "saturated", control, path, "share"))
            for path in known
        ]
        added = [
            statistics.median(
                _less(
                    over(runs, "saturated", control, path, "streams", 1, "p99_ms"),
                    over(runs, "plain", path, "round_trip", "p50_ms"),
                )
            )
            for path in known
        ]
        options = {"width": 0.25, "label": _NAMES[control], "color": _COLOURS[number]}
        axes[0].bar(places, shares, **options)
        axes[1].bar(places, added, **options)
    axes[0].axhline(100 * _GOAL_SHARE, color="grey", linestyle="--", linewidth=1)
    axes[0].set_ylabel("goodput, % of what the path carries")
    axes[1].axhline(_GOAL_MS, color="grey", linestyle="--", linewidth=1)
    axes[1].set_ylabel("p99 round trip under load, ms added")
    for each in axes:
        each.set_xticks(range(len(paths)), paths)
        each.legend()
    link = save_plot(figure, plots / "paths.svg")
    pyplot.close(figure)
    return link


def _fairness_plot(runs: Sequence[Figures], plots: Path) -> str:
    from matplotlib import pyplot

    cases = runs[0]["fairness"]["bbr"]
    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 3.6), squeeze=False)
    for axis, (case, first) in zip(axes[0], cases.items(), strict=True):
        streams = first["streams"]
        seconds = len(streams[0]["bins_bits"]) * BIN_S
        at = ("fairness", "bbr", case, "streams")
        got = [
            statistics.median(over(runs, *at, n, "goodput_bits")) / 1e6 for n in range(len(streams))
        ]
        asked = [
            statistics.median(over(runs, *at, n, "sent")) / seconds * SIZE * 8 / 1e6
            for n in range(len(streams))
        ]
        names = [stream["name"] for stream in streams]
        axis.bar(names, asked, color="none", edgecolor="grey", linewidth=1, label="offered")
        axis.bar(names, got, color=_COLOURS[0], width=0.6, label="delivered")
        axis.set_title(case)
        axis.set_ylabel("Mbit/s")
        axis.tick_params(axis="x", rotation=60)
        axis.legend()
    link = save_plot(figure, plots / "paths-fairness.svg")
    pyplot.close(figure)
    return link


def _less(values: Sequence[float], own: Sequence[float]) -> list[float]:
    return [value - base for value, base in zip(values, own, strict=True)]


def _mbit(bits: Sequence[float], digits: int = 1) -> str:
    return spread([each / 1e6 for each in bits], f"{{:.{digits}f}}")


def _percent(shares: Sequence[float], digits: int = 1) -> str:
    return spread([100 * each for each in shares], f"{{:.{digits}f}} %")


def _failures(figures: Any) -> int:
    """All that the emulator reported of its own mistakes in one run."""
    if isinstance(figures, dict):
        own = figures.get("failures", 0)
        return int(own) + sum(_failures(each) for each in figures.values())
    return 0
