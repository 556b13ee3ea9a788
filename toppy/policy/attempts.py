"""How often one source may try: bounded tables of token buckets (pure).

A source that is not in the table has a full bucket, so one that was silent for long is forgotten
without harm; when a table is full, the source that tried longest ago is forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from toppy.policy.token_bucket import TokenBucket

MOST_SOURCES = 65_536
"""About 20 MB, should an attacker have so many addresses."""
MOST_CREDENTIALS = 4096
_PER_MINUTE = 60
"""What one attempt costs in a bucket that gains a minute's number of them each second."""


class _Buckets:
    """One bucket for each source."""

    def __init__(self, per_s: int, burst: int, most: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._most = most
        self._known: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, source: Hashable, now: float) -> TokenBucket:
        """The source's; it has tried now."""
        bucket = self._known.get(source)
        if bucket is not None:
            self._known.move_to_end(source)
            return bucket
        if len(self._known) >= self._most:
            self._known.popitem(last=False)
        bucket = self._known[source] = TokenBucket(self._per_s, self._burst, now)
        return bucket

    def get(self, source: Hashable) -> TokenBucket | None:
        """None: it is full."""
        return self._known.get(source)


class AttemptLimit:
    """``per_s`` attempts of each source in a second, ``burst`` at once."""

    def __init__(self, per_s: int, burst: int, *, most_sources: int = MOST_SOURCES) -> None:
        self._buckets = _Buckets(per_s, burst, most_sources)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, source: Hashable, now: float) -> bool:
        """Count an attempt; False when it is one too many, which is not counted."""
        return self._buckets.of(source, now).take_whole(1, now)


class FailedAttempts:
    """Refused credentials: ``per_min`` of each source in a minute, as many at once; 0: no limit.

    Beyond it, credentials that were good here are let through, so that nobody is locked out by a
    neighbour behind the same address.
    """

    def __init__(
        self,
        per_min: int,
        *,
        most_sources: int = MOST_SOURCES,
        most_credentials: int = MOST_CREDENTIALS,
    ) -> None:
        self._is_limited = per_min > 0
        self._buckets = _Buckets(per_min, per_min * _PER_MINUTE, most_sources)
        self._most_credentials = most_credentials
        self._good: OrderedDict[Hashable, None] = OrderedDict()

    def failed(self, source: Hashable, now: float) -> None:
        """A credential of this source was refused."""
        if self._is_limited:
            self._buckets.of(source, now).take(_PER_MINUTE, now)

    def succeeded(self, credential: Hashable) -> None:
        """A credential was found good; ``credential`` is a digest, no secret."""
        if not self._is_limited:
            return
        self._good[credential] = None
        self._good.move_to_end(credential)
        if len(self._good) > self._most_credentials:
            self._good.popitem(last=False)

    def wait_s(self, source: Hashable, now: float) -> float:
        """Seconds until this source may try a credential that is not known to be good; 0.0: now."""
        bucket = self._buckets.get(source)
        return 0.0 if bucket is None else bucket.wait_s(_PER_MINUTE, now)

    def is_known_good(self, credential: Hashable) -> bool:
        """Whether a credential was found good here lately."""
        return credential in self._good
