"""The times of a policy rule, as they are written: days, hours, a zone, a first and a last moment.

Zone data is the interpreter's, like its codecs: the host's database, or the ``tzdata`` package.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
_HOURS = re.compile(r"\s*([0-9]{2}):([0-9]{2})\s*-\s*([0-9]{2}):([0-9]{2})\s*\Z", re.ASCII)
Minutes = tuple[int, int]
"""From and to, in minutes of the local day; ``to`` is above 1440 where the next day has it."""


def find_zone(name: str) -> tzinfo:
    """A time zone by its IANA name. Raises ``ValueError``."""
    if name == "UTC":  # known without any database
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"{name!r} is no time zone here; write UTC or a name such as Europe/Berlin (the "
            "host's package tzdata has them)"
        ) from None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _parse_days(value: Any) -> tuple[int, ...]:
    days: set[int] = set()
    for item in _listed(value):
        text = item.lower() if isinstance(item, str) else ""
        first, dash, last = (part.strip() for part in text.partition("-"))
        last = last if dash else first
        if first not in DAYS or last not in DAYS:
            raise ValueError(f"{item!r} is no day; write mon, or a range such as mon-fri")
        begin, end = DAYS.index(first), DAYS.index(last)
        days |= {(begin + step) % 7 for step in range((end - begin) % 7 + 1)}
    return tuple(sorted(days))


def _parse_hours(value: Any) -> tuple[Minutes, ...]:
    return tuple(_parse_span(item) for item in _listed(value))


def _parse_span(item: Any) -> Minutes:
    found = _HOURS.match(item) if isinstance(item, str) else None
    if found is None:
        raise ValueError(f"{item!r} is no time of day; write 08:00-18:00, or 22:00-06:00")
    hours_and_minutes = [int(part) for part in found.groups()]
    begin = hours_and_minutes[0] * 60 + hours_and_minutes[1]
    end = hours_and_minutes[2] * 60 + hours_and_minutes[3]
    is_time = begin < DAY_MINUTES and end <= DAY_MINUTES
    if not is_time or max(hours_and_minutes[1], hours_and_minutes[3]) > 59 or begin == end:
        raise ValueError(f"{item!r}: times go from 00:00 to 24:00, and the two must differ")
    return begin, end if end > begin else end + DAY_MINUTES


class When(BaseModel):
    """When a rule holds; what is left out does not restrict it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zone: str = Field(
        "UTC", description="Whose days and hours: an IANA time zone such as `Europe/Berlin`."
    )
    days: Annotated[tuple[int, ...], BeforeValidator(_parse_days)] = Field(
        (), description="Days and ranges: `['mon-thu', 'sat']`."
    )
    hours: Annotated[tuple[Minutes, ...], BeforeValidator(_parse_hours)] = Field(
        (),
        description=(
            "From and to, local time: `'08:00-18:00'`, or a list. `'22:00-06:00'` goes on until "
            "the morning after; `days` are those on which it begins."
        ),
    )
    not_before: datetime | None = Field(
        None,
        description=(
            "The first moment, a TOML date-time or date. Without an offset it is the zone's."
        ),
    )
    not_after: datetime | None = Field(
        None, description="The last moment, likewise; a date means the whole of that day."
    )

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str) -> str:
        find_zone(value)
        return value

    @field_validator("days", "hours")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("must not be an empty list, which would never match")
        return value

    @field_validator("not_before", "not_after", mode="before")
    @classmethod
    def _moment(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        zone = find_zone(info.data.get("zone", "UTC"))
        return parse_moment(value, zone, is_end=info.field_name == "not_after")

    @model_validator(mode="after")
    def _restricts(self) -> When:
        if self.not_before and self.not_after and self.not_before >= self.not_after:
            raise ValueError("not_before must be earlier than not_after")
        if not (self.days or self.hours or self.not_before or self.not_after):
            raise ValueError("needs days, hours, not_before or not_after")
        return self


def parse_moment(value: Any, zone: tzinfo, *, is_end: bool = False) -> datetime:
    """A date-time or a date, or ISO 8601 text of one, as a moment; without an offset in ``zone``.

    ``is_end``: a date is the end of that day instead of its beginning. Raises ``ValueError``.
    """
    try:
        if isinstance(value, str):
            text = value.strip()
            value = date.fromisoformat(text) if len(text) <= 10 else datetime.fromisoformat(text)
        if isinstance(value, datetime):
            moment = value if value.tzinfo is not None else value.replace(tzinfo=zone)
        elif isinstance(value, date):
            day = value + timedelta(days=1) if is_end else value
            moment = datetime.combine(day, time(), zone)
        else:
            raise ValueError(value)  # noqa: TRY004  # told like every other value that is none
        moment.timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"{value!r} is no moment; write 2026-03-01T08:00:00Z, or a date such as 2026-03-01"
        ) from None
    if not 1970 < moment.year < 9999:
        raise ValueError("the year must be between 1970 and 9999")
    return moment
