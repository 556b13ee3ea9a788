"""When a rule holds: at a moment, and until when. Moments are Unix time, in seconds."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta

from toppy.config.policy_time import DAY_MINUTES, DAYS, When, find_zone

_EVERY_DAY = tuple(range(7))
_ALL_HOURS = ((0, DAY_MINUTES),)
_MOST_KNOWN = 256
_HORIZON_DAYS = 16
"""A week repeats; clocks that are set forward can swallow all of one week's times, so two; one day
more for what goes over midnight, one for the change itself."""


class TimeWindow:
    """The times of one rule.

    Days and hours are those of the zone's clocks. Where these are set forward, a time that does not
    exist is the one that they show then; where they are set back, a time that comes twice is the
    first one.
    """

    def __init__(self, when: When) -> None:
        self._zone = find_zone(when.zone)
        self._zone_name = when.zone
        self._is_weekly = bool(when.days or when.hours)
        self._days = when.days or _EVERY_DAY
        self._hours = when.hours or _ALL_HOURS
        self._begin = when.not_before.timestamp() if when.not_before else -math.inf
        self._end = when.not_after.timestamp() if when.not_after else math.inf
        self._since: list[float] = []
        self._known: list[tuple[float, bool]] = []
        """For each moment of ``_since``: until when, and whether it is open in between. The same
        few are asked about with every tunnel."""

    def is_open(self, now: float) -> bool:
        """Whether the rule holds at ``now``."""
        return self._look(now)[1]

    def next_change(self, now: float) -> float | None:
        """When it opens or closes next, after ``now``; None: never."""
        until = self._look(now)[0]
        return until if until < math.inf else None

    def _look(self, now: float) -> tuple[float, bool]:
        index = bisect_right(self._since, now)
        if index and now < self._known[index - 1][0]:
            return self._known[index - 1]
        is_open = self._is_open(now)
        change = self._next_change(now, is_open)
        found = math.inf if change is None else change, is_open
        if len(self._since) >= _MOST_KNOWN:
            self._since, self._known, index = [], [], 0
        self._since.insert(index, now)
        self._known.insert(index, found)
        return found

    def describe(self, now: float) -> str:
        """Why it is not open at ``now``, for people."""
        shown = datetime.fromtimestamp(now, self._zone)
        local = f"{DAYS[shown.weekday()]} {shown:%Y-%m-%d %H:%M} {self._zone_name}"
        if now < self._begin:
            return f"it begins later (now it is {local})"
        if now >= self._end:
            return f"its time is over (now it is {local})"
        return f"not at this time ({local})"

    def _is_open(self, now: float) -> bool:
        if not self._begin <= now < self._end:
            return False
        if not self._is_weekly:
            return True
        today = datetime.fromtimestamp(now, self._zone).date()
        return any(begin <= now < end for begin, end in self._spans(today, 1))

    def _next_change(self, now: float, is_open: bool) -> float | None:
        moments = {self._begin, self._end}
        if self._is_weekly and now < self._end:
            first = datetime.fromtimestamp(max(now, self._begin), self._zone).date()
            for span in self._spans(first, _HORIZON_DAYS):
                moments.update(span)
        for moment in sorted(moments):
            if now < moment < math.inf and self._is_open(moment) != is_open:
                return moment
        return None

    def _spans(self, first: date, days: int) -> Iterator[tuple[float, float]]:
        """Those that begin on the day before ``first``, and on it and the following ones."""
        for step in range(-1, days):
            day = first + timedelta(days=step)
            if day.weekday() in self._days:
                for begin, end in self._hours:
                    yield self._moment(day, begin), self._moment(day, end)

    def _moment(self, day: date, minutes: int) -> float:
        days, minute = divmod(minutes, DAY_MINUTES)
        wall = datetime.combine(day, time(*divmod(minute, 60)), self._zone)
        return (wall + timedelta(days=days)).timestamp()
