"""What a control plane leaves behind for the next one, in the runtime directory (mode 0700).

With it, workers and their counters outlive the control plane: across ``toppy-gw upgrade``, and
across its death. It has the workers' secrets and keys, so the file's mode is 0600; an orderly stop
removes it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from toppy.errors import ToppyError
from toppy.model.counters import WorkerCounters
from toppy.wire.ipc_message import WorkerSettings, encode_settings

_NAME = "state"
_MAX_BYTES = 16 << 20
FORMAT = 1


class UnreadableStateError(ToppyError):
    """There is a state, and this code cannot read it: so it cannot take the workers over."""


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
    is_steered: bool | None = None
    """Whether each worker reads its own slot's sockets; None: not known."""
    told: bytes = b""
    """See ``digest_of``: what the workers of the active generation were told."""

    def __repr__(self) -> str:
        return f"SavedState(generation={self.generation}, workers={len(self.workers)})"


def digest_of(told: WorkerSettings, workers: int) -> bytes:
    """Tells whether workers would be told other things now than those that run; what differs from
    one worker to the next, or can be changed while it runs, does not count.
    """
    same = msgspec.structs.replace(told, slot=0, generation=0, secret="", sockets=(), read=())
    same = msgspec.structs.replace(same, log_level="")
    return hashlib.sha256(b"%d" % workers + encode_settings(same)).digest()


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
    """What the last control plane left; None when there is nothing. Raises
    ``UnreadableStateError``.
    """
    path = runtime_dir / _NAME
    try:
        with path.open("rb") as file:
            state = _decoder.decode(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableStateError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise UnreadableStateError(
            f"{path} is damaged, or of another version of toppy-gw"
        ) from None
    if state.format != FORMAT:
        raise UnreadableStateError(
            f"{path} has format {state.format}, and this version of toppy-gw reads {FORMAT}"
        )
    return state


def remove_state(runtime_dir: Path) -> None:
    """The gateway has ended: nothing is to be taken over."""
    (runtime_dir / _NAME).unlink(missing_ok=True)
