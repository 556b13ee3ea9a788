"""What the gateway's operators read: answers of its admin socket as text and tables."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from toppy.model.counters import counted

WARN_DAYS = 30
"""Fewer are said loudly."""
_WIDTH = 240
"""Of tables: nothing is cut, whatever reads them; a terminal breaks longer lines itself."""


def render_status(facts: dict[str, Any]) -> str:
    """The gateway as a whole, its generations and workers."""
    lines = [
        f"toppy-gw {facts['version']}, engine {facts['engine']}, generation "
        f"{facts['generation']}, revision {facts['revision']}, up {ago(facts['since'])}, "
        f"pid {facts['pid']}",
        f"configuration {show(facts['configuration'])}",
        f"listening on {', '.join(facts['listen'])}"
        + ("" if facts["steered"] else " (without BPF steering)")
        + (f", health on {facts['health']}" if facts["health"] else ""),
        f"{counted(facts['connections'], 'connection')}, {counted(facts['tunnels'], 'tunnel')}, "
        f"{counted(facts['worker_deaths'], 'worker death')}",
    ]
    if facts["rollout"] != "idle":
        lines.append(f"a reload is under way: {facts['rollout']}")
    if (reload := facts["last_reload"]) is not None:
        what = "done" if reload["ok"] else "FAILED, nothing has changed"
        lines.append(
            f"last reload {ago(reload['at'])} ago: {what}: {_one_line(reload['message'])} "
            f"({reload['duration_s']:.1f} s)"
        )
    if (audit := facts.get("audit")) is not None and audit["path"]:
        lines.append(_audit_line(audit))
    for name, each in facts.get("certificates", {}).items():
        if name == "server" or each["days_left"] < WARN_DAYS:
            lines.append(_certificate_line(name, each))
    lines.append(
        _table(
            ("generation", "state", "up", ">revision", "workers"),
            (
                (
                    f"g{each['generation']}",
                    each["state"],
                    ago(each["since"]),
                    each["revision"],
                    " ".join(f"s{slot}" for slot in each["workers"]),
                )
                for each in facts["generations"]
            ),
        )
    )
    lines.append(
        _table(
            (
                *("worker", "generation", "state", ">pid", "engine", "up", ">connections"),
                *(">tunnels", ">to targets", ">to clients", ">dropped"),
            ),
            (
                (
                    *(each["name"], f"g{each['generation']}", each["state"], each["pid"]),
                    *(each["engine"], ago(each["since"]), each["connections"], each["tunnels"]),
                    *(each["datagrams_to_target"], each["datagrams_to_client"]),
                    sum(each["drops"].values()),
                )
                for each in facts["workers"]
            ),
        )
    )
    if facts["drops"]:
        drops = ", ".join(f"{reason} {count}" for reason, count in sorted(facts["drops"].items()))
        lines.append(f"dropped: {drops}")
    return "\n".join(lines)


def _certificate_line(name: str, facts: dict[str, Any]) -> str:
    what = "certificate" if name == "server" else "CA of clients"
    until = time.strftime("%Y-%m-%d", time.gmtime(facts["ends_at"]))
    left = facts["days_left"]
    if left < 0:
        return f"{what} EXPIRED on {until}"
    text = f"{what} until {until}, {counted(left, 'day')} left"
    return f"{text}: REPLACE IT" if left < WARN_DAYS else text


def _audit_line(audit: dict[str, Any]) -> str:
    text = f"audit log {show(audit['path'])}: {audit['entries'] or 0} entries"
    if audit["shipped"] is not None:
        text += f", {audit['shipped']} shipped"
    if audit["lost"]:
        text += f", {audit['lost']} LOST"
    if audit["problem"]:
        text += f"; CANNOT BE WRITTEN, {audit['waiting']} wait: {show(audit['problem'])}"
    if audit["ship_problem"]:
        text += f"; not shipped: {show(audit['ship_problem'])}"
    return text


def render_connections(facts: dict[str, Any]) -> str:
    """One line for each."""
    if not facts["connections"]:
        return "no connections" + _unanswered(facts)
    return _table(
        ("connection", "generation", "source", "alpn", ">tunnels", "open", ">round trip"),
        (
            (
                *(each["name"], f"g{each['generation']}", each["source"], each["alpn"]),
                *(each["tunnels"], ago(each["since"]), _milliseconds(each["round_trip_s"])),
            )
            for each in facts["connections"]
        ),
    ) + _unanswered(facts)


def render_tunnels(facts: dict[str, Any]) -> str:
    """One line for each."""
    if not facts["tunnels"]:
        return "no tunnels" + _unanswered(facts)
    return _table(
        (
            *("tunnel", "subject", "source", "protocol", "target", "rule", "open"),
            *(">to target", ">to client"),
        ),
        (
            (
                *(each["name"], each["subject"], each["source"], each["protocol"]),
                *(each["target"], each["rule"]),
                ago(each["since"]) if each["since"] else "not yet",
                *(_size(each["bytes_to_target"]), _size(each["bytes_to_client"])),
            )
            for each in facts["tunnels"]
        ),
    ) + _unanswered(facts)


def render_reload(facts: dict[str, Any]) -> str:
    """What came of it, and what needs more than a reload."""
    return "\n".join(
        [
            *(f"warning: {show(warning)}" for warning in facts["warnings"]),
            f"generation {facts['generation']} serves with revision {facts['revision']}, "
            f"after {facts['duration_s']:.1f} s",
        ]
    )


def render_upgrade(facts: dict[str, Any]) -> str:
    """Which code serves now."""
    return (
        f"toppy-gw {show(facts['to'])} serves in the place of {show(facts['from'])}: generation "
        f"{facts['generation']}, revision {facts['revision']}, pid {facts['pid']}"
    )


def render_drain(facts: dict[str, Any]) -> str:
    """Which workers take nothing new."""
    if not facts["draining"]:
        return "it had not begun to serve, and has been ended"
    return (
        f"draining: {', '.join(facts['draining'])}; each ends when its tunnels have, see: "
        "toppy-gw status"
    )


def render_kick(facts: dict[str, Any]) -> str:
    """How many were closed."""
    return f"closed {counted(facts['closed'], 'tunnel')}" + _unanswered(facts)


def _unanswered(facts: dict[str, Any]) -> str:
    """A line about workers of which nothing is known."""
    names = facts.get("unanswered") or []
    return f"\nwarning: no answer from {', '.join(map(show, names))}: try again" if names else ""


def render_stop(facts: dict[str, Any]) -> str:
    """That it is over."""
    return f"toppy-gw has stopped (it was process {facts['stopped']})"


def ago(since: float) -> str:
    """How long ago a time of day was: ``5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    seconds = int(max(0.0, time.time() - since))
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def show(value: object) -> str:
    """As text without control characters: subjects and names come from strangers."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in str(value)
    )


def _one_line(text: str) -> str:
    """A message of several lines, such as one for each error of a configuration, in one."""
    return "; ".join(map(show, text.splitlines()))


def _size(count: int) -> str:
    """Payload bytes: ``512 B``, ``1.5 kB``, ``2.0 GB``."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f} ms"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns whose title begins with ``>`` are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        is_number = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if is_number else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(show(value)) for value in row))
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
