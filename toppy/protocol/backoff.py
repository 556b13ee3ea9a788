"""How long to wait before the next attempt: exponential, bounded, with jitter."""

from __future__ import annotations

from collections.abc import Callable


class Backoff:
    """Delays that double from ``first_s`` to ``most_s``, each spread over its upper half.

    ``chance`` returns a float in [0, 1): many clients that lost one gateway must not return
    together.
    """

    def __init__(self, chance: Callable[[], float], *, first_s: float = 0.1, most_s: float = 10.0):
        self._chance = chance
        self._first_s = first_s
        self._most_s = most_s
        self._failures = 0

    def next_delay_s(self) -> float:
        """The wait after one more failure."""
        delay = min(self._most_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return delay * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """The attempt succeeded; the next failure starts from ``first_s`` again."""
        self._failures = 0
