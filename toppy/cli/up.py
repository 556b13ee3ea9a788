"""``toppy up``: local TCP ports that lead to targets, through the gateway or directly."""

from __future__ import annotations

from collections.abc import Mapping

from toppy.cli.forwards import run_forwards


def run_up(
    listen: str | None,
    target: str | None,
    config: str | None,
    environ: Mapping[str, str],
    *,
    is_direct: bool = False,
    is_once: bool = False,
) -> int:
    """Forward until a signal, or one connection; returns the exit code (T-014, T-018). Without
    ``listen`` and ``target`` every ``[[forward]]`` entry is started, those of UDP as well.
    """
    return run_forwards(
        "up",
        config,
        environ,
        options=(listen, target) if listen is not None and target is not None else None,
        protocols=("tcp",) if listen is not None else ("tcp", "udp"),
        is_direct=is_direct,
        is_once=is_once,
    )
