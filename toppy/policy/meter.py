"""Charges what tunnels carry to their limits: their own, and those that several share (pure).

One call per stretch of datagrams, or per piece of a stream. UDP takes what may go and drops the
rest (``take_datagrams``); TCP takes what may go and waits for the rest (``take_bytes``,
``wait_s``). A tunnel without any limit has no meter and pays nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from toppy.model.rate import NO_LIMITS, Budget, DirectionLimits, Rate, TunnelLimits
from toppy.policy.token_bucket import TokenBucket

Payloads = bytes | bytearray | memoryview

MOST_IDLE_BUDGETS = 4096
"""Budgets without tunnels that are remembered until what was taken from them has come back."""
QUOTA_PAUSE_S = 0.5
"""How long a stream waits whose quota is used up, before it asks again."""


class _Quota:
    """What a budget has left for both directions, and what has been used of it."""

    __slots__ = ("left", "used")

    def __init__(self) -> None:
        self.left: int | None = None
        self.used = 0


class _Side:
    """One direction of one limit: at most a bucket of bytes and one of datagrams."""

    __slots__ = ("_limits", "bytes", "datagrams", "quota", "wanted_bytes", "wanted_datagrams")

    def __init__(self, limits: DirectionLimits, now: float, quota: _Quota | None = None) -> None:
        self._limits = NO_LIMITS
        self.bytes: TokenBucket | None = None
        self.datagrams: TokenBucket | None = None
        self.quota = quota
        self.wanted_bytes = 0
        self.wanted_datagrams = 0
        self.change(limits, now)

    def change(self, limits: DirectionLimits, now: float) -> None:
        if limits != self._limits:
            self.bytes = _changed(self.bytes, limits.bytes, now)
            self.datagrams = _changed(self.datagrams, limits.datagrams, now)
            self._limits = limits

    def is_full(self, now: float) -> bool:
        """Whether one that begins now would have no more."""
        buckets = (self.bytes, self.datagrams)
        return all(bucket is None or bucket.is_full(now) for bucket in buckets)

    @property
    def is_limited(self) -> bool:
        return (
            self.bytes is not None
            or self.datagrams is not None
            or (self.quota is not None and self.quota.left is not None)
        )


def _changed(bucket: TokenBucket | None, rate: Rate, now: float) -> TokenBucket | None:
    if not rate.is_limited:
        return None
    if bucket is None:
        return TokenBucket(rate.per_s, rate.burst, now)
    bucket.change(rate.per_s, rate.burst, now)
    return bucket


class Lane:
    """One direction of one tunnel."""

    __slots__ = ("_sides",)

    def __init__(self, sides: tuple[_Side, ...]) -> None:
        self._sides = sides

    def take_datagrams(self, size: int, segment_size: int, now: float) -> int:
        """Charge a stretch of ``size`` bytes in datagrams of ``segment_size`` (0: one datagram).

        Returns how many of its datagrams may go: the first ones; the others are to be dropped.
        """
        count = may = -(-size // segment_size) if segment_size else 1
        for side in self._sides:
            side.wanted_bytes += size
            side.wanted_datagrams += count
            bucket, quota = side.bytes, side.quota
            if bucket is not None and (room := bucket.available(now)) < size:
                may = min(may, room // segment_size if segment_size else 0)
            if quota is not None and quota.left is not None and quota.left < size:
                may = min(may, max(0, quota.left) // segment_size if segment_size else 0)
            if side.datagrams is not None:
                may = min(may, side.datagrams.available(now))
        if not may:
            return 0
        taken = size if may == count else may * segment_size
        for side in self._sides:
            if side.bytes is not None:
                side.bytes.take(taken, now)
            if side.datagrams is not None:
                side.datagrams.take(may, now)
            if side.quota is not None:
                _use(side.quota, taken)
        return may

    def take_payloads(
        self, payloads: Payloads, segment_size: int, now: float
    ) -> tuple[int, int, Payloads]:
        """The same for datagrams that stand back to back: how many may go, how many are to be
        dropped, and those that may go.
        """
        size = len(payloads)
        count = -(-size // segment_size) if segment_size else 1
        granted = self.take_datagrams(size, segment_size, now)
        if granted == count:
            return count, 0, payloads
        return granted, count - granted, memoryview(payloads)[: granted * segment_size]

    def take_bytes(self, wanted: int, now: float) -> int:
        """Charge a piece of a stream; how many of ``wanted`` bytes may go now, 0 to ``wanted``."""
        granted = self.room(wanted, now)
        for side in self._sides:
            side.wanted_bytes += wanted
        if granted:
            for side in self._sides:
                if side.bytes is not None:
                    side.bytes.take(granted, now)
                if side.quota is not None:
                    _use(side.quota, granted)
        return granted

    def count_unmet(self, wanted: int) -> None:
        """So much more of a stream would go if it might, for all that is known. Budgets are divided
        by what is wanted: a stream that told only what it got would never get more.
        """
        for side in self._sides:
            side.wanted_bytes += wanted

    def room(self, wanted: int, now: float) -> int:
        """How many of ``wanted`` bytes ``take_bytes`` would grant now; charges nothing.

        For a stream of which it is not known how much can be read.
        """
        room = wanted
        for side in self._sides:
            if side.bytes is not None:
                room = min(room, side.bytes.available(now))
            if side.quota is not None and side.quota.left is not None:
                room = min(room, max(0, side.quota.left))
        return room

    def wait_s(self, wanted: int, now: float) -> float:
        """Seconds until ``take_bytes`` may grant ``wanted`` bytes, or a whole burst if that is
        less; 0.0: now.
        """
        waits = [side.bytes.wait_s(wanted, now) for side in self._sides if side.bytes is not None]
        if self.is_spent:
            waits.append(QUOTA_PAUSE_S)
        return max(waits, default=0.0)

    @property
    def is_spent(self) -> bool:
        """Whether a quota is used up but for less than a datagram."""
        return any(
            side.quota is not None
            and side.quota.left is not None
            and side.quota.left < _SMALLEST_REST_BYTES
            for side in self._sides
        )


_SMALLEST_REST_BYTES = 65_536
"""A quota with less left than the largest datagram is as good as used up."""


def _use(quota: _Quota, size: int) -> None:
    quota.used += size
    if quota.left is not None:
        quota.left -= size


class Meter:
    """Both directions of one tunnel; a direction without any limit is None."""

    __slots__ = ("to_client", "to_target")

    def __init__(self, to_target: Lane | None, to_client: Lane | None) -> None:
        self.to_target = to_target
        self.to_client = to_client


@dataclass(frozen=True, slots=True)
class BudgetDemand:
    """What the tunnels of one budget have asked for and got, since it was last told."""

    name: str
    tunnels: int
    """Now."""
    used_bytes: int
    """Both directions together."""
    to_target_bytes: int
    """What was wanted, whether it went or not; likewise the next three."""
    to_client_bytes: int
    to_target_datagrams: int
    to_client_datagrams: int


class _Pool:
    """A budget, and the tunnels that share it."""

    def __init__(self, budget: Budget, now: float) -> None:
        self.quota = _Quota()
        self.to_target = _Side(budget.to_target, now, self.quota)
        self.to_client = _Side(budget.to_client, now, self.quota)
        self.quota.left = budget.quota_left
        self.tunnels = 0
        self.told_tunnels = 0

    def change(self, budget: Budget, now: float) -> None:
        self.to_target.change(budget.to_target, now)
        self.to_client.change(budget.to_client, now)
        # what was used and not told is not in it yet
        left = budget.quota_left
        self.quota.left = None if left is None else left - self.quota.used

    def is_full(self, now: float) -> bool:
        return self.to_target.is_full(now) and self.to_client.is_full(now)

    def take_demand(self, name: str) -> BudgetDemand | None:
        """None when there is nothing new."""
        there, back = self.to_target, self.to_client
        is_quiet = not any(
            (there.wanted_bytes, back.wanted_bytes, there.wanted_datagrams, back.wanted_datagrams)
        )
        if is_quiet and self.tunnels == self.told_tunnels:
            return None
        demand = BudgetDemand(
            name,
            self.tunnels,
            self.quota.used,
            there.wanted_bytes,
            back.wanted_bytes,
            there.wanted_datagrams,
            back.wanted_datagrams,
        )
        self.quota.used = 0
        self.told_tunnels = self.tunnels
        for side in (there, back):
            side.wanted_bytes = side.wanted_datagrams = 0
        return demand


class _Metered:
    """A tunnel as ``Meters`` knows it."""

    __slots__ = ("budgets", "to_client", "to_target")

    def __init__(self, now: float) -> None:
        self.to_target = _Side(NO_LIMITS, now)
        self.to_client = _Side(NO_LIMITS, now)
        self.budgets: tuple[str, ...] = ()


class Meters:
    """The meters of one worker's tunnels, and the budgets that they share.

    A tunnel is known by any key. A budget exists as long as there is a tunnel that names it, and
    then until its buckets are full again: who closes a tunnel and opens another gains no burst.
    """

    def __init__(self, *, most_idle: int = MOST_IDLE_BUDGETS) -> None:
        self._pools: dict[str, _Pool] = {}
        self._tunnels: dict[Hashable, _Metered] = {}
        self._most_idle = most_idle
        self._now = 0.0
        """The latest that was heard of; whoever opens a tunnel tells it."""

    def attach(self, key: Hashable, limits: TunnelLimits, now: float) -> Meter | None:
        """A tunnel is open, or has other limits now. None: nothing limits it.

        What its own buckets have gained stays when only the rate changes.
        """
        self._now = max(self._now, now)
        if not limits.each.is_limited and not limits.budgets and key not in self._tunnels:
            return None
        tunnel = self._tunnels.get(key)
        if tunnel is None:
            tunnel = self._tunnels[key] = _Metered(now)
        tunnel.to_target.change(limits.each, now)
        tunnel.to_client.change(limits.each, now)
        before = tunnel.budgets
        tunnel.budgets = tuple(budget.name for budget in limits.budgets)
        for budget in limits.budgets:
            self._join(budget, now)
        self._leave(before)
        pools = [self._pools[name] for name in tunnel.budgets]
        to_target = _lane(tunnel.to_target, [pool.to_target for pool in pools])
        to_client = _lane(tunnel.to_client, [pool.to_client for pool in pools])
        if to_target is None and to_client is None:
            return None
        return Meter(to_target, to_client)

    def detach(self, key: Hashable) -> None:
        """A tunnel has ended; one that is not known is ignored."""
        tunnel = self._tunnels.pop(key, None)
        if tunnel is not None:
            self._leave(tunnel.budgets)

    def change(self, budgets: Iterable[Budget], now: float) -> None:
        """Other amounts for budgets that are known; others are ignored.

        Which directions a budget limits at all is a matter of ``attach``.
        """
        self._now = max(self._now, now)
        for budget in budgets:
            pool = self._pools.get(budget.name)
            if pool is not None:
                pool.change(budget, now)

    def take_demands(self) -> Iterator[BudgetDemand]:
        """Budgets with something new, each once; those without a tunnel for the last time."""
        idle: list[str] = []
        for name, pool in list(self._pools.items()):
            demand = pool.take_demand(name)
            if demand is not None:
                yield demand
            if pool.tunnels:
                continue
            if pool.is_full(self._now):
                del self._pools[name]
            else:
                idle.append(name)
        for name in idle[: max(0, len(idle) - self._most_idle)]:
            del self._pools[name]

    def tell_again(self) -> None:
        """Somebody new listens: every budget has something new."""
        for pool in self._pools.values():
            pool.told_tunnels = -1

    @property
    def budgets(self) -> int:
        """How many are known."""
        return len(self._pools)

    def _join(self, budget: Budget, now: float) -> None:
        pool = self._pools.get(budget.name)
        if pool is None:
            pool = self._pools[budget.name] = _Pool(budget, now)
        else:
            pool.change(budget, now)
        pool.tunnels += 1

    def _leave(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._pools[name].tunnels -= 1


def single_meter(limits: DirectionLimits, now: float) -> Meter | None:
    """For what shares nothing with anybody; None: nothing limits it."""
    if not limits.is_limited:
        return None
    return Meter(Lane((_Side(limits, now),)), Lane((_Side(limits, now),)))


def _lane(own: _Side, shared: list[_Side]) -> Lane | None:
    sides = tuple(side for side in (own, *shared) if side.is_limited)
    return Lane(sides) if sides else None
