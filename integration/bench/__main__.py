"""``make bench``: measure every case three times, and write ``docs/performance.md``, its plots and
the raw figures. ``make bench-quick``: the main figures, in under a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from rich.console import Console

from integration.bench import (
    audit,
    forward,
    paths,
    peers,
    rates,
    relay,
    scale,
    setup,
    side_by_side,
    tcp,
    workers,
)
from integration.bench.figures import Figures
from integration.bench.quick import measure_quick
from toppy import __version__

CASES: dict[str, ModuleType] = {
    "relay": relay,
    "setup": setup,
    "scale": scale,
    "paths": paths,
    "side_by_side": side_by_side,
    "workers": workers,
    "audit": audit,
    "forward": forward,
    "rates": rates,
    "tcp": tcp,
}
_RUNS = 3
_DOCS = Path(__file__).parents[2] / "docs"
_BEGIN = "<!-- `make bench` writes what follows -->\n"
_SETTLE_S = 2.0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the main figures only; writes nothing"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some cases")
    parser.add_argument("--runs", type=int, default=_RUNS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=_DOCS, help="where to write")
    parser.add_argument("--report", action="store_true", help="write the report, measure nothing")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(_machine())
    if options.quick:
        measure_quick(console)
        return 0
    raw = options.docs / "performance.json"
    results: dict[str, list[Figures]] = json.loads(raw.read_text()) if raw.exists() else {}
    if not options.report:
        for name in options.only:
            results[name] = _measure(console, name, CASES[name].measure, options.runs)
            results["machine"] = [{"text": _machine(), "peers": peers.versions()}]
            raw.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    _write_report(options.docs, results)
    console.print(f"written: {options.docs / 'performance.md'}")
    return 0


def _measure(
    console: Console, name: str, measure: Callable[..., Figures], runs: int
) -> list[Figures]:
    figures = []
    for number in range(1, runs + 1):
        begin = time.monotonic()
        figures.append(measure(is_quick=False))
        console.print(f"{name}, run {number} of {runs}: {time.monotonic() - begin:.0f} s")
        time.sleep(_SETTLE_S)
    return figures


def _write_report(docs: Path, results: dict[str, list[Figures]]) -> None:
    page = docs / "performance.md"
    written = page.read_text().partition(_BEGIN)[0] if page.exists() else ""
    machine = results["machine"][0]
    lines = [f"- {name}: {text}" for name, text in sorted(machine["peers"].items())]
    counts = ", ".join(f"{name} {len(results[name])}" for name in CASES if results.get(name))
    sections = [
        f"Measured with {machine['text']}. Runs of each case: {counts}.\n\nOther programs:\n\n"
        + "\n".join(lines)
        + "\n"
    ]
    sections += [
        case.report(results[name], docs / "performance")
        for name, case in CASES.items()
        if results.get(name)
    ]
    page.write_text(written + _BEGIN + "\n" + "\n".join(sections))


def _machine() -> str:
    libraries: Sequence[str] = ("aioquic", "pyzmq", "uvloop")
    return (
        f"toppy {__version__}, Python {platform.python_version()}, "
        f"Linux {platform.release().partition('-')[0]}, "
        f"{os.cpu_count()} {platform.machine()} cores, "
        + ", ".join(f"{library} {version(library)}" for library in libraries)
        + "; every process on this machine"
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
