"""Workers and generations as the control plane knows them."""

from __future__ import annotations

import asyncio
import hmac
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from toppy.ipc.control_channel import Peer
from toppy.protocol.worker_lifecycle import WorkerInput, WorkerState, next_state
from toppy.system.processes import Process
from toppy.wire.ipc_message import WorkerSettings

SettingsFor = Callable[[int, int, int, str], WorkerSettings]
"""What a worker is told: from slot, generation, place among its workers, and its secret."""


class GenerationState(Enum):
    STARTING = "starting"
    ACTIVE = "active"
    """Takes new connections."""
    DRAINING = "draining"


@dataclass(slots=True)
class Generation:
    """Workers that were started together, with the same settings."""

    number: int
    revision: int
    """Of the configuration."""
    slots: tuple[int, ...]
    settings_for: SettingsFor
    since: float
    state: GenerationState = GenerationState.STARTING


class Worker:
    """One worker process as the control plane knows it."""

    def __init__(
        self, slot: int, generation: Generation, process: Process, secret: str, since: float
    ) -> None:
        self.slot = slot
        self.generation = generation
        self.process = process
        self.secret = secret
        self.peer: Peer | None = None
        self.line: socket.socket | None = None
        """To a worker that was taken over: its end tells it that we are gone."""
        self.engine = ""
        self.has_meters = False
        """See ``Ready``."""
        self.state = WorkerState.SPAWNED
        self.started_at = since
        self.is_expected_to_end = False
        self.settled: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether it came to serve, or ended before."""
        self.heard_at = time.monotonic()
        """When its last report came."""

    @property
    def is_serving(self) -> bool:
        """Whether it relays."""
        return self.state in (WorkerState.SERVING, WorkerState.DRAINING)

    def is_proved_by(self, secret: str) -> bool:
        """Whether a message with ``secret`` comes from this worker."""
        return hmac.compare_digest(self.secret.encode(), secret.encode("utf-8", "surrogatepass"))

    def tunnel_name(self, connection: int, quarter_stream_id: int) -> str:
        """What operators and the audit log call one of its tunnels."""
        return f"s{self.slot}g{self.generation.number}c{connection}t{quarter_stream_id}"

    def handle(self, happened: WorkerInput) -> None:
        """Take one step of the lifecycle; raises ``IllegalTransitionError``."""
        self.state = next_state(self.state, happened)
        if self.state in (WorkerState.SERVING, WorkerState.GONE) and not self.settled.done():
            self.settled.set_result(self.state is WorkerState.SERVING)
            self.heard_at = time.monotonic()

    def close(self) -> None:
        """The process has ended."""
        if self.line is not None:
            self.line.close()
            self.line = None
