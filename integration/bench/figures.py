"""Figures of several runs, as text: medians with their spread, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil

Figures = dict[str, Any]
"""What one run of a case has measured: plain JSON."""

MISSING = "–"


def spread(values: Sequence[float], form: str = "{:,.0f}") -> str:
    """The median, and smallest and largest in parentheses where there are several."""
    if not values:
        return MISSING
    text = form.format(statistics.median(values))
    if len(values) > 1 and min(values) != max(values):
        text += f" ({form.format(min(values))}-{form.format(max(values))})"
    return text


def over(runs: Sequence[Figures], *path: str | int) -> list[float]:
    """The figure at this path in every run that has it."""
    found: list[float] = []
    for run in runs:
        place: Any = run
        try:
            for key in path:
                place = place[key]
        except (KeyError, IndexError, TypeError):
            continue
        found.append(float(place))
    return found


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """What they have used so far, user and system, the kernel's share of their calls included."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def rss_mib(processes: Iterable[psutil.Process]) -> float:
    """Resident memory of all of them."""
    return sum(process.memory_info().rss for process in processes) / (1 << 20)


def pss_mib(processes: Iterable[psutil.Process]) -> float:
    """Resident memory, where what several share counts once in all."""
    return sum(process.memory_full_info().pss for process in processes) / (1 << 20)


def save_plot(figure: Any, path: Path) -> str:
    """Write a matplotlib figure as SVG, the same bytes for the same data; its markdown link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "toppy", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"![{path.stem.replace('-', ' ')}]({path.parent.name}/{path.name})\n"
