"""A rate limit: so many bytes per second, and a burst (pure)."""

from __future__ import annotations

from toppy.errors import LocalError

_UNIT = 1_000_000_000
"""Parts of a byte that are counted, and nanoseconds of a second: so many bytes per second are as
many parts per nanosecond, and all arithmetic is exact."""


class TokenBucket:
    """Starts full with ``burst_bytes``, gains ``bytes_per_s``, never holds more than the burst.

    ``now`` is monotonic, in seconds. Time that was seen once gives no second time: a clock that
    stands still or goes back gives nothing until it is past the latest ``now``.
    """

    __slots__ = ("_burst", "_bytes_per_s", "_latest_ns", "_level")

    def __init__(self, bytes_per_s: int, burst_bytes: int, now: float) -> None:
        """Raises ``LocalError`` unless both are positive: without a limit there is no bucket."""
        _check(bytes_per_s, burst_bytes)
        self._bytes_per_s = bytes_per_s
        self._burst = burst_bytes * _UNIT
        self._level = self._burst
        self._latest_ns = round(now * _UNIT)

    def change(self, bytes_per_s: int, burst_bytes: int, now: float) -> None:
        """Another rate and burst from now on; what was gained stays, up to the new burst.

        Raises ``LocalError`` as the constructor does.
        """
        _check(bytes_per_s, burst_bytes)
        self.available(now)
        self._bytes_per_s = bytes_per_s
        self._burst = burst_bytes * _UNIT
        self._level = min(self._level, self._burst)

    def available(self, now: float) -> int:
        """Bytes that may go now."""
        now_ns = round(now * _UNIT)
        elapsed_ns = now_ns - self._latest_ns
        if elapsed_ns > 0:
            self._latest_ns = now_ns
            self._level = min(self._burst, self._level + elapsed_ns * self._bytes_per_s)
        return self._level // _UNIT

    def is_full(self, now: float) -> bool:
        """Whether nothing is missing from the burst: a new bucket would be the same."""
        self.available(now)
        return self._level == self._burst

    def take(self, wanted: int, now: float) -> int:
        """Take as many of ``wanted`` bytes as may go now; returns how many, 0 to ``wanted``."""
        granted = min(wanted, self.available(now))
        self._level -= granted * _UNIT
        return granted

    def take_whole(self, size: int, now: float) -> bool:
        """Take ``size`` bytes, or none; False if they may not go now. More than the burst never
        may.
        """
        if size > self.available(now):
            return False
        self._level -= size * _UNIT
        return True

    def wait_s(self, wanted: int, now: float) -> float:
        """Seconds until ``wanted`` bytes, or the whole burst if that is less, may go; 0.0: now."""
        self.available(now)
        missing = min(wanted * _UNIT, self._burst) - self._level
        if missing <= 0:
            return 0.0
        # in whole microseconds: timers are no finer, and the second one covers what adding the
        # wait to a float clock rounds off
        return (missing // (self._bytes_per_s * 1000) + 2) / 1_000_000


def _check(bytes_per_s: int, burst_bytes: int) -> None:
    if bytes_per_s < 1 or burst_bytes < 1:
        raise LocalError(
            f"a token bucket needs a rate and a burst of at least 1 byte, not {bytes_per_s} "
            f"and {burst_bytes}"
        )
