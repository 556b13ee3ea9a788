"""When each of many connections is due: cheap to change, nothing to pay for the idle ones."""

from __future__ import annotations

import heapq


class Deadlines:
    """One deadline per connection number, in seconds on the caller's clock.

    A heap with lazy deletion. Each number has a stack of entries in the heap, the earliest on top:
    only a deadline earlier than that needs a new entry; a later one is looked at when the entry
    comes up. So a connection that alternates between near and far deadlines has two entries.
    Numbers are never used again after ``remove``.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._deadlines: dict[int, float] = {}
        self._entries: dict[int, list[float]] = {}

    def set(self, number: int, deadline: float | None) -> None:
        """Give ``number`` a new deadline, or none for now."""
        if deadline is None:
            self._deadlines.pop(number, None)
            return
        self._deadlines[number] = deadline
        entries = self._entries.setdefault(number, [])
        if not entries or deadline < entries[-1]:
            entries.append(deadline)
            heapq.heappush(self._heap, (deadline, number))

    def remove(self, number: int) -> None:
        """Forget ``number`` for good."""
        self._deadlines.pop(number, None)
        self._entries.pop(number, None)

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap:
            due, number = self._heap[0]
            deadline = self._deadlines.get(number)
            if deadline == due:
                return due
            self._pop()
            if deadline is not None:
                self.set(number, deadline)
        return None

    def take_due(self, now: float) -> list[int]:
        """The numbers whose deadline is not after ``now``, earliest first; they have none then."""
        due = []
        while (earliest := self.next()) is not None and earliest <= now:
            number = self._pop()
            del self._deadlines[number]
            due.append(number)
        return due

    def _pop(self) -> int:
        _, number = heapq.heappop(self._heap)
        entries = self._entries.get(number)
        if entries:
            entries.pop()
        return number
