"""What a control plane leaves behind for the next one, in the runtime directory (mode 0700).

With it, workers and their counters outlive the control plane: across ``toppy-gw upgrade``, and
across its death. It has the workers' secrets and keys, so the file's mode is 0600; an orderly stop
removes it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from toppy.model.counters import WorkerCounters

_NAME = "state"
_MAX_BYTES = 16 << 20
FORMAT = 1


class SavedWorker(msgspec.Struct, frozen=True):
    slot: int
    generation: int
    place: int
    """Among the workers of its generation."""
    pid: int
    started: int
    """See ``toppy.system.processes.start_time``."""
    since: float
    secret: str

    def __repr__(self) -> str:
        return f"SavedWorker(slot={self.slot}, generation={self.generation}, pid={self.pid})"


class SavedGeneration(msgspec.Struct, frozen=True):
    number: int
    revision: int
    slots: tuple[int, ...]
    is_draining: bool
    since: float


class SavedState(msgspec.Struct, frozen=True):
    """Everything that a new control plane needs to go on."""

    format: int
    reset_key: bytes
    token_key: bytes
    certificate_chain_pem: bytes
    private_key_pem: bytes
    """The self-signed pair that this gateway made for itself; empty when it has a real one."""
    generation: int
    """The newest one's number."""
    generation_active: int
    revision: int
    started_at: float
    worker_deaths: int
    socket_rows: tuple[int, ...]
    """Sockets per listen address, in the order in which workers hand them over."""
    past: dict[int, WorkerCounters]
    workers: tuple[SavedWorker, ...]
    generations: tuple[SavedGeneration, ...]
    latest: dict[int, WorkerCounters] = {}
    """Of running workers: it counts for those that have ended when the next one comes."""
    is_upgrading: bool = False
    """The control plane replaces its own code: a reload follows."""

    def __repr__(self) -> str:
        return f"SavedState(generation={self.generation}, workers={len(self.workers)})"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SavedState)


def write_state(runtime_dir: Path, state: SavedState) -> None:
    """Replace the file in one step. Raises ``OSError``."""
    path = runtime_dir / _NAME
    unfinished = runtime_dir / f"{_NAME}.new"
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_encoder.encode(state))
    unfinished.rename(path)


def read_state(runtime_dir: Path) -> SavedState | None:
    """What the last control plane left; None when there is nothing, or nothing of use."""
    try:
        with (runtime_dir / _NAME).open("rb") as file:
            state = _decoder.decode(file.read(_MAX_BYTES))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return state if state.format == FORMAT else None


def remove_state(runtime_dir: Path) -> None:
    """The gateway has ended: nothing is to be taken over."""
    (runtime_dir / _NAME).unlink(missing_ok=True)
