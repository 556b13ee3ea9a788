"""Where workers can be found in the runtime directory."""

from __future__ import annotations

from pathlib import Path


def takeover_path(runtime_dir: str, slot: int) -> str:
    """Where the worker of ``slot`` waits for a new control plane."""
    return str(Path(runtime_dir) / f"worker-{slot}.sock")


def stray_path(runtime_dir: str, slot: int) -> str:
    """Where the worker of ``slot`` takes strays."""
    return str(Path(runtime_dir) / f"stray-{slot}.sock")


def remove_sockets(runtime_dir: str, slot: int) -> None:
    """Those of a worker that was killed."""
    for path in (takeover_path(runtime_dir, slot), stray_path(runtime_dir, slot)):
        Path(path).unlink(missing_ok=True)
