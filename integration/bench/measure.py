"""One measurement each: a rate one way, an echo, with every process watched from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from integration.bench.figures import cpu_s, rss_mib
from integration.bench.load import start_load
from integration.bench.ways import Way
from integration.peers import start_peer

SIZE = 1200
_SPARE_S = 60.0
"""What a load process may take longer than it should."""
_UNDER_WAY_S = 0.4
_STEP = 1.5
_FINE_STEP = 1.2


@dataclass(frozen=True, slots=True)
class OneWay:
    """What one offered rate did."""

    offered: float
    sent: int
    received: int
    rate: float
    """Delivered per second."""
    cpu_us: dict[str, float] = field(default_factory=dict)
    """Per delivered datagram, of each role's processes together."""
    rss_mib: dict[str, float] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return self.sent - self.received


@dataclass(frozen=True, slots=True)
class Echo:
    """Round trips."""

    offered: float
    sent: int
    received: int
    p50_us: float
    p99_us: float
    p999_us: float
    rate: float
    cpu_us: dict[str, float] = field(default_factory=dict)
    """Per echo, of each role's processes together."""

    @property
    def lost(self) -> int:
        return self.sent - self.received


def _finish(process: subprocess.Popen[str], seconds: float) -> dict[str, float]:
    out, error = process.communicate(timeout=seconds + _SPARE_S)
    if process.returncode:
        raise RuntimeError(f"a load process failed:\n{error}")
    result: dict[str, float] = json.loads(out)
    return result


def _cpu_by_role(ways: Sequence[Way]) -> dict[str, float]:
    # several clients share one gateway: its processes count once
    roles = {role for way in ways for role in way.processes}
    return {
        role: cpu_s({process for way in ways for process in way.processes.get(role, ())})
        for role in roles
    }


def _each(before: dict[str, float], after: dict[str, float], count: float) -> dict[str, float]:
    return {role: (after[role] - before[role]) * 1e6 / max(1.0, count) for role in before}


def measure_one_way(
    ways: Sequence[Way], rate: float, seconds: float, *, size: int = SIZE, tunnels: int = 1
) -> OneWay:
    """Offer ``rate`` datagrams/s in all for ``seconds``."""
    ports = [way.target_port for way in ways]
    sink = start_load("sink", host=ways[0].target_host, ports=ports)
    try:
        assert sink.stderr is not None
        if not sink.stderr.readline().startswith("ready"):
            raise RuntimeError(f"the sink failed:\n{sink.stderr.read()}")
        before = _cpu_by_role(ways)
        sent = _finish(
            start_load(
                "generate",
                host=ways[0].host,
                ports=[way.port for way in ways],
                tunnels=max(tunnels, len(ways)),
                rate=rate,
                size=size,
                seconds=seconds,
            ),
            seconds + tunnels / 100,
        )
        time.sleep(_UNDER_WAY_S)
        after = _cpu_by_role(ways)
        sink.terminate()
        arrived = _finish(sink, 0)
    finally:
        sink.kill()
        sink.wait()
    received = arrived["received"]
    return OneWay(
        offered=rate,
        sent=int(sent["sent"]),
        received=int(received),
        rate=received / sent["seconds"],
        cpu_us=_each(before, after, received),
        rss_mib={
            role: rss_mib(processes) for way in ways for role, processes in way.processes.items()
        },
    )


@contextlib.contextmanager
def _echo_servers(ways: Sequence[Way]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        for way in ways:
            peer = start_peer("echo", way.target_port, Path(directory), host=way.target_host)
            stack.callback(peer.stop)
        yield


def measure_echo(
    ways: Sequence[Way], rate: float, seconds: float, *, size: int = SIZE, tunnels: int = 1
) -> Echo:
    """Round trips at ``rate`` per second in all."""
    with _echo_servers(ways):
        before = _cpu_by_role(ways)
        result = _finish(
            start_load(
                "echo",
                host=ways[0].host,
                ports=[way.port for way in ways],
                tunnels=max(tunnels, len(ways)),
                rate=rate,
                size=size,
                seconds=seconds,
            ),
            seconds + tunnels / 100,
        )
        after = _cpu_by_role(ways)
    return Echo(
        offered=rate,
        sent=int(result["sent"]),
        received=int(result["received"]),
        p50_us=result["p50_us"],
        p99_us=result["p99_us"],
        p999_us=result["p999_us"],
        rate=result["received"] / seconds,
        cpu_us=_each(before, after, result["received"]),
    )


def highest_one_way(
    ways: Sequence[Way],
    first: float,
    seconds: float,
    *,
    size: int = SIZE,
    tunnels: int = 1,
    most: float = 1e6,
) -> OneWay:
    """The highest rate that loses nothing, by steps of 1.5 and then of 1.2 from ``first`` on; at
    a loss each step gets a second chance: other work on this machine costs datagrams, too.
    """

    def attempt(rate: float) -> OneWay:
        run = measure_one_way(ways, rate, seconds, size=size, tunnels=tunnels)
        if run.lost:
            run = measure_one_way(ways, rate, seconds, size=size, tunnels=tunnels)
        return run

    best = attempt(first)
    while best.lost and first > 100:
        first /= _STEP
        best = attempt(first)
    for step in (_STEP, _FINE_STEP):
        rate = best.offered * step
        while rate <= most and best.rate > 0.9 * best.offered:  # the generator can do more, too
            run = attempt(rate)
            if run.lost:
                break
            best = run
            rate *= step
    return best
