"""What is open at the workers now: asked of all, answered in parts, by some perhaps not in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from toppy.control.generation import Worker
from toppy.wire.ipc_message import (
    ListConnections,
    ListTunnels,
    LiveConnection,
    LiveTunnel,
    ToWorker,
)

_DEADLINE_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """What was found where, and who has not said everything."""

    found: list[tuple[Worker, T]]
    silent: tuple[Worker, ...] = ()
    """Workers whose answer is missing, or a part of it: they may have more."""

    @property
    def unanswered(self) -> list[str]:
        """The names of those that are silent."""
        return sorted(f"s{worker.slot}" for worker in self.silent)


class LiveLists:
    """Asks ``workers``, as many as there are, and collects what they answer."""

    def __init__(
        self, workers: Mapping[int, Worker], send: Callable[[Worker, ToWorker], bool]
    ) -> None:
        self._workers = workers
        self._send = send
        self._under_way: dict[int, _Answer] = {}
        self._next = 1

    async def tunnels(
        self, *, with_authorization: bool = False, of: Worker | None = None
    ) -> Listed[LiveTunnel]:
        """Every open tunnel, or those ``of`` one worker, as far as is known within 5 s."""
        listed = await self._ask(
            lambda number: ListTunnels(number, with_authorization=with_authorization), of
        )
        found = [(worker, item) for worker, item in listed.found if isinstance(item, LiveTunnel)]
        return Listed(found, listed.silent)

    async def connections(self) -> Listed[LiveConnection]:
        """Every open connection, as far as is known within 5 s."""
        listed = await self._ask(ListConnections, None)
        found = [
            (worker, item) for worker, item in listed.found if isinstance(item, LiveConnection)
        ]
        return Listed(found, listed.silent)

    async def _ask(
        self, question: Callable[[int], ListTunnels | ListConnections], of: Worker | None
    ) -> Listed[LiveTunnel | LiveConnection]:
        number, self._next = self._next, self._next + 1
        asked = [
            worker
            for worker in ([of] if of is not None else self._workers.values())
            # one that was taken over has tunnels, even if it has not been heard yet
            if worker.is_serving or worker.line is not None
        ]
        silent = [w for w in asked if not w.is_serving or not self._send(w, question(number))]
        answer = self._under_way[number] = _Answer(set(asked) - set(silent))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEADLINE_S):
                    await answer.is_complete.wait()
        finally:
            del self._under_way[number]
        return Listed(answer.found, (*silent, *answer.awaited))

    def receive(
        self,
        worker: Worker,
        number: int,
        items: Iterable[LiveTunnel | LiveConnection],
        is_last: bool,
    ) -> None:
        """A part of a worker's answer to question ``number``; ignored when it comes too late."""
        answer = self._under_way.get(number)
        if answer is None or worker not in answer.awaited:
            return
        answer.found += [(worker, item) for item in items]
        if is_last:
            answer.end(worker)

    def forget(self, worker: Worker) -> None:
        """It has ended, and with it what it had."""
        for answer in self._under_way.values():
            answer.end(worker)


class _Answer:
    """What several workers say in parts."""

    def __init__(self, awaited: set[Worker]) -> None:
        self.awaited = awaited
        self.found: list[tuple[Worker, LiveTunnel | LiveConnection]] = []
        self.is_complete = asyncio.Event()
        if not awaited:
            self.is_complete.set()

    def end(self, worker: Worker) -> None:
        self.awaited.discard(worker)
        if not self.awaited:
            self.is_complete.set()
