"""Requests that a worker has refused unasked, counted until the control plane is told of them."""

from __future__ import annotations

from collections.abc import Callable

from toppy.model.grant import Denial
from toppy.protocol.refusal_tally import OTHERS
from toppy.wire.ipc_message import Refusals, RefusedRequests

_MOST_KINDS = 64


class RefusalTable:
    """Alike is what has the same source, status and reason; of further kinds only the status is
    kept. A refusal costs two look-ups, whoever causes it.
    """

    def __init__(self, *, most_kinds: int = _MOST_KINDS) -> None:
        self._most_kinds = most_kinds
        self._counts: dict[tuple[str, int, str], int] = {}
        self._targets: dict[tuple[str, int, str], str] = {}

    def add(self, source: str, target: str, denial: Denial) -> None:
        """One more; ``target`` is empty where the request could not be read."""
        kind = (source, denial.status, denial.details)
        if kind not in self._counts and len(self._counts) >= self._most_kinds:
            kind = ("", denial.status, OTHERS)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._targets[kind] = target

    def send(self, send: Callable[[Refusals], bool]) -> None:
        """Tell what has come together; what the channel does not take stays, and grows."""
        if not self._counts:
            return
        told = tuple(
            RefusedRequests(source, status, reason, self._targets[source, status, reason], count)
            for (source, status, reason), count in self._counts.items()
        )
        if send(Refusals(told)):
            self._counts.clear()
            self._targets.clear()
