"""Refusals that repeat: the first of a kind is told at once, further ones as a count later.

Whoever has no credential can cause refusals without end; what is written about them has a bound,
and what is not written one by one is in a count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class RefusalKind:
    """What makes refusals alike."""

    source: str
    """The client's address; empty: not known, or several."""
    status: int
    """Of HTTP."""
    reason: str = field(compare=False)
    """Numbers in it do not make two refusals different: seconds to wait, for one."""
    subject: str = ""
    """Who asked, where that is known."""
    rule: str = ""
    pattern: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", _NUMBER.sub("0", self.reason))


OTHERS = "from further sources, or for further reasons"
"""The reason of all refusals beyond the bound, of one status."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Refusals that nobody was told of yet."""

    kind: RefusalKind
    count: int
    target: str
    """What the last one asked for."""
    since: float
    """Unix time from which they are counted."""


@dataclass(slots=True)
class _Counted:
    since: float
    count: int = 0
    target: str = ""


class RefusalTally:
    """Remembers ``most_kinds`` kinds, and one more for each status (``OTHERS``).

    A kind is told at most twice in ``interval_s``, so what is told has a bound, whoever asks for
    what.
    """

    def __init__(self, *, interval_s: float, most_kinds: int) -> None:
        self._interval_s = interval_s
        self._most_kinds = most_kinds
        self._kinds: dict[RefusalKind, _Counted] = {}

    def add(self, kind: RefusalKind, target: str, now: float, count: int = 1) -> RefusalKind | None:
        """The kind as which it is to be told at once; None: it is counted and told later.

        ``now`` is Unix time.
        """
        known = self._kinds.get(kind)
        if known is None and len(self._kinds) >= self._most_kinds:
            kind = RefusalKind("", kind.status, OTHERS)
            known = self._kinds.get(kind)
        if known is None:
            self._kinds[kind] = _Counted(now)
            return kind
        known.count += count
        known.target = target
        return None

    def take_due(self, now: float, *, everything: bool = False) -> Iterator[Repeated]:
        """What was counted for an interval, or ``everything`` that was counted; kinds that did not
        repeat are forgotten. What the caller does not take stays.
        """
        for kind, counted in list(self._kinds.items()):
            # a clock that was set back must not make an interval endless
            if not everything and 0 <= now - counted.since < self._interval_s:
                continue
            if counted.count:
                self._kinds[kind] = _Counted(now)
                yield Repeated(kind, counted.count, counted.target, counted.since)
            else:
                del self._kinds[kind]
