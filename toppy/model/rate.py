"""How much may go through: of one tunnel, and of all tunnels that share a budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """So many bytes or datagrams per second, and so many at once; both 0: no limit."""

    per_s: int = 0
    burst: int = 0

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self.per_s > 0


UNLIMITED = Rate()


@dataclass(frozen=True, slots=True)
class DirectionLimits:
    """What may go in one direction."""

    bytes: Rate = UNLIMITED
    """Payload bytes, without any header."""
    datagrams: Rate = UNLIMITED
    """TCP has none."""

    @property
    def is_limited(self) -> bool:
        """Whether there is any limit."""
        return self.bytes.is_limited or self.datagrams.is_limited


NO_LIMITS = DirectionLimits()


@dataclass(frozen=True, slots=True)
class Budget:
    """What all tunnels share that name it: one worker's part."""

    name: str
    """The same at every worker."""
    to_target: DirectionLimits = NO_LIMITS
    to_client: DirectionLimits = NO_LIMITS
    quota_left: int | None = None
    """Bytes, both directions together, that all workers may still pass; None: no quota."""


@dataclass(frozen=True, slots=True)
class TunnelLimits:
    """What one tunnel is held to."""

    each: DirectionLimits = NO_LIMITS
    """The tunnel's own limit, in each direction."""
    budgets: tuple[Budget, ...] = ()
    """Every one of them is charged, too."""


NO_TUNNEL_LIMITS = TunnelLimits()
