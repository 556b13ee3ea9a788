"""What the relays between two TCP sockets share: their rate, and how a connection ended."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, Protocol

from toppy.policy.token_bucket import TokenBucket

_WAIT_FOR_S: Final = 0.01
"""Event loops' timers are no finer than a millisecond: with fewer bytes at a time they would decide
the rate. And a bucket is never quite empty: without a least, a few bytes would be moved again and
again without a pause.
"""
_LEAST_WAITED_FOR: Final = 4096
_SHORTEST_TIMER_S: Final = 0.001
"""uvloop rounds shorter ones to none, and would go round and round."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Of each direction of each connection."""

    bytes_per_s: int
    burst_bytes: int

    def bucket(self, now: float) -> TokenBucket:
        """A full one."""
        return TokenBucket(self.bytes_per_s, self.burst_bytes, now)

    @property
    def least(self) -> int:
        """Bytes to wait for where the bucket has fewer. At most half the burst: a bucket that is
        full before its timer is noticed loses what it would have gained.
        """
        at_once = max(int(self.bytes_per_s * _WAIT_FOR_S), _LEAST_WAITED_FOR)
        return max(1, min(at_once, self.burst_bytes // 2))

    def wait_s(self, bucket: TokenBucket, now: float) -> float:
        """For how long to set a timer until the bucket has ``least``."""
        return max(_SHORTEST_TIMER_S, bucket.wait_s(self.least, now))


@dataclass(slots=True)
class ByteCounters:
    """Payload bytes that were handed on, of any number of connections; current at every moment."""

    to_target: int = 0
    to_client: int = 0


class TcpRelay(Protocol):
    """Carries the bytes of many connections, on the event loop that it was made in."""

    async def relay(
        self,
        client: socket.socket,
        target: socket.socket,
        rate: Rate | None,
        counters: ByteCounters,
    ) -> str:
        """Relay until both directions have ended, or one side was reset; closes both sockets.

        Returns why it was reset, or nothing when all ended in order. An end in one direction is
        passed on while the other direction goes on; a reset is passed on and ends both, and what
        was on its way is lost, as with any reset. Cancelled, it resets both. The sockets are
        non-blocking and connected.
        """
        ...

    def close(self) -> None:
        """No connection is left; free what the relay has."""
        ...
