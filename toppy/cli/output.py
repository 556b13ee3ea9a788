"""What the commands that forward say about their traffic: pure text from counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts since the start."""

    peers: int = 0
    """Now."""
    peers_total: int = 0
    out: int = 0
    out_bytes: int = 0
    """Payload bytes, without any header; likewise ``back_bytes``."""
    back: int = 0
    back_bytes: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)
    """Datagrams that were not delivered, by ``DropReason``."""

    @property
    def dropped(self) -> int:
        """All of them."""
        return sum(self.drops.values())


def summarize(traffic: Traffic) -> str:
    """Everything that went through, and what did not."""
    text = (
        f"{traffic.peers_total} peers, {traffic.out} datagrams ({traffic.out_bytes} bytes) out, "
        f"{traffic.back} datagrams ({traffic.back_bytes} bytes) in"
    )
    if traffic.dropped:
        reasons = (f"{reason} {count}" for reason, count in sorted(traffic.drops.items()))
        text += f", dropped: {', '.join(reasons)}"
    return text


def describe(
    state: str, traffic: Traffic, before: Traffic, elapsed_s: float, problem: str = ""
) -> str:
    """One line about now; the rates are those since ``before``, ``elapsed_s`` ago."""
    out, back = traffic.out - before.out, traffic.back - before.back
    bits = 8 * (traffic.out_bytes - before.out_bytes), 8 * (traffic.back_bytes - before.back_bytes)
    text = (
        f"{state}, {traffic.peers} peers, "
        f"out {out / elapsed_s:,.0f}/s {show_bits(bits[0] / elapsed_s)}, "
        f"in {back / elapsed_s:,.0f}/s {show_bits(bits[1] / elapsed_s)}"
    )
    if traffic.dropped:
        text += f", {traffic.dropped:,} dropped"
    return f"{text} · {problem}" if problem else text


@dataclass(frozen=True, slots=True)
class TcpTraffic:
    """Counts since the start, of TCP connections."""

    open: int = 0
    """Connections, now."""
    connections: int = 0
    failures: int = 0
    """Of the connections: without a way to the target, or reset."""
    out_bytes: int = 0
    """To the target."""
    back_bytes: int = 0


def add_traffic(parts: Iterable[Traffic]) -> Traffic:
    """All of them together."""
    total = Traffic()
    for part in parts:
        drops = dict(total.drops)
        for reason, count in part.drops.items():
            drops[reason] = drops.get(reason, 0) + count
        total = Traffic(
            total.peers + part.peers,
            total.peers_total + part.peers_total,
            total.out + part.out,
            total.out_bytes + part.out_bytes,
            total.back + part.back,
            total.back_bytes + part.back_bytes,
            drops,
        )
    return total


def add_tcp_traffic(parts: Iterable[TcpTraffic]) -> TcpTraffic:
    """All of them together."""
    total = TcpTraffic()
    for part in parts:
        total = TcpTraffic(
            total.open + part.open,
            total.connections + part.connections,
            total.failures + part.failures,
            total.out_bytes + part.out_bytes,
            total.back_bytes + part.back_bytes,
        )
    return total


def summarize_tcp(traffic: TcpTraffic) -> str:
    """Everything that went through."""
    text = (
        f"{traffic.connections} connections, {traffic.out_bytes} bytes out, "
        f"{traffic.back_bytes} bytes in"
    )
    return f"{text}, {traffic.failures} failed" if traffic.failures else text


def describe_tcp(
    traffic: TcpTraffic, before: TcpTraffic, elapsed_s: float, problem: str = ""
) -> str:
    """One line about now; the rates are those since ``before``, ``elapsed_s`` ago."""
    out = 8 * (traffic.out_bytes - before.out_bytes) / elapsed_s
    back = 8 * (traffic.back_bytes - before.back_bytes) / elapsed_s
    text = f"{traffic.open} open, out {show_bits(out)}, in {show_bits(back)}"
    if traffic.failures:
        text += f", {traffic.failures:,} failed"
    return f"{text} · {problem}" if problem else text


def show_bits(per_second: float) -> str:
    """``950 bit/s``, ``1.2 Mbit/s``."""
    rate = float(round(per_second))
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if rate < 999.5:
            return f"{rate:.3g} {unit}"
        rate /= 1000
    return f"{rate:.1f} Gbit/s"
