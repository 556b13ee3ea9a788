"""Divides an amount among those who want parts of it (pure)."""

from __future__ import annotations

from collections.abc import Sequence

_FLOOR_PART = 20
"""Who wants nothing now gets a twentieth of an equal share: when it begins, something is there."""


def apportion(total: int, wanted: Sequence[int]) -> list[int]:
    """Whole parts of ``total``, one for each of ``wanted``; they add up to ``total`` or less.

    Max-min fair: who wants less than an equal share gets it, the others share what is left; what
    nobody wants is shared by all. Every part is at least 1, also where ``total`` is too small for
    that.
    """
    if len(wanted) == 1:
        return [total]
    floor = max(1, total // (len(wanted) * _FLOOR_PART))
    demands = [max(floor, want) for want in wanted]
    parts = [0] * len(demands)
    left = total
    # the most modest first: what they leave is for the others
    order = sorted(range(len(demands)), key=demands.__getitem__)
    for place, index in enumerate(order):
        parts[index] = min(demands[index], left // (len(order) - place))
        left -= parts[index]
    spare = left // len(parts)
    return [max(1, part + spare) for part in parts]
