"""What all workers counted, kept across their deaths so that counters only ever grow."""

from __future__ import annotations

from toppy.model.counters import WorkerCounters


class Statistics:
    """The latest counters of every worker, by slot, on top of its predecessors'."""

    def __init__(
        self,
        past: dict[int, WorkerCounters] | None = None,
        latest: dict[int, WorkerCounters] | None = None,
    ) -> None:
        self._latest: dict[int, WorkerCounters] = dict(latest or {})
        self._past: dict[int, WorkerCounters] = dict(past or {})

    def report(self, slot: int, counters: WorkerCounters) -> None:
        """A running worker's counters since its start."""
        self._latest[slot] = counters

    def worker_gone(self, slot: int) -> None:
        """Keep what the worker counted; what it had open is gone with it."""
        counters = self._latest.pop(slot, None)
        if counters is None:
            return
        counters.connections_open = counters.tunnels_open = counters.tcp_tunnels_open = 0
        self._past[slot] = self._past.get(slot, WorkerCounters()) + counters

    @property
    def past(self) -> dict[int, WorkerCounters]:
        """What workers that have ended counted."""
        return dict(self._past)

    @property
    def latest(self) -> dict[int, WorkerCounters]:
        """What running workers have last reported."""
        return dict(self._latest)

    def by_slot(self) -> dict[int, WorkerCounters]:
        """Counters since the gateway's start."""
        return {
            slot: self._past.get(slot, WorkerCounters()) + self._latest.get(slot, WorkerCounters())
            for slot in sorted(self._past.keys() | self._latest.keys())
        }

    def total(self) -> WorkerCounters:
        """Over all slots."""
        total = WorkerCounters()
        for counters in self.by_slot().values():
            total = total + counters
        return total
