"""Tunnels that have ended and are not in the audit log yet: bounded, numbered, said until heard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from toppy.wire.ipc_message import ClosedTunnel, ClosedTunnels, pages

_MOST = 10_000
_AGAIN_AFTER_S = 5.0
"""A control plane that writes its log acknowledges within a moment."""


class ClosedTunnelQueue:
    """Give it what has ended with ``add``; ``send`` what is due now and then."""

    def __init__(self, *, most: int = _MOST) -> None:
        self._most = most
        self._waiting: deque[ClosedTunnel] = deque()
        self._first = 1
        """Number of the first that waits."""
        self._said = 0
        """Number of the last that was sent to this control plane."""
        self._said_at = 0.0
        self.lost = 0
        """What there was no room for."""
        self._lost_said = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether the next one would be lost."""
        return len(self._waiting) >= self._most

    def add(self, tunnel: ClosedTunnel) -> None:
        """One that has ended."""
        if self.is_full:
            self.lost += 1
        else:
            self._waiting.append(tunnel)

    def say_again(self) -> None:
        """There is a new control plane: it has heard nothing."""
        self._said = self._first - 1
        self._lost_said = 0

    def acknowledge(self, number: int) -> None:
        """Everything up to ``number`` is in the audit log."""
        while self._waiting and self._first <= number:
            self._waiting.popleft()
            self._first += 1
        self._said = max(self._said, self._first - 1)

    def send(self, send: Callable[[ClosedTunnels], bool], now: float) -> None:
        """Say what was not said, or was not acknowledged for long. What the channel does not take
        is said the next time.
        """
        if self._said >= self._first and now - self._said_at >= _AGAIN_AFTER_S:
            self.say_again()
        for message in self._messages():
            if not send(message):
                return
            self._said = message.first + len(message.tunnels) - 1
            self._said_at = now
            self._lost_said = message.lost

    def _messages(self) -> Iterator[ClosedTunnels]:
        number = self._said + 1
        unsaid = list(self._waiting)[number - self._first :]
        if not unsaid and self.lost == self._lost_said:
            return
        for page, _ in pages(unsaid):
            yield ClosedTunnels(number, page, self.lost)
            number += len(page)
