"""``toppy udp``: local UDP ports that lead to targets through the gateway."""

from __future__ import annotations

from collections.abc import Mapping

from toppy.cli.forwards import run_forwards


def run_udp(
    listen: str | None, target: str | None, config: str | None, environ: Mapping[str, str]
) -> int:
    """Forward until a signal; returns the exit code (T-018). Without ``listen`` and ``target``
    every ``[[forward]]`` entry of UDP is started.
    """
    return run_forwards(
        "udp",
        config,
        environ,
        options=(listen, target) if listen is not None and target is not None else None,
        protocols=("udp",),
    )
