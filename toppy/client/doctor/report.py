"""The report of `toppy doctor`: its model, its two forms, and what follows from what.

As a program it prints the JSON Schema of `toppy doctor --json`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from toppy import __version__

Fact = int | float | str | bool

SCHEMA_ID = "https://toppy.invalid/doctor.schema.json"
_REMEDY_INDENT = "    "


class Status(Enum):
    """What a check found."""

    PASS = "pass"  # noqa: S105  # a status
    SKIP = "skip"
    WARN = "warn"
    FAIL = "fail"


_SEVERITY = {Status.PASS: 0, Status.SKIP: 0, Status.WARN: 1, Status.FAIL: 2}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    id: Annotated[str, Meta(description="Which check; stable between versions.")]
    status: Annotated[
        Status, Meta(description="`skip`: nothing was checked, and that is no problem of its own.")
    ]
    summary: Annotated[str, Meta(description="One sentence for people; its text may change.")]
    remedy: Annotated[str | None, Meta(description="What to do about it.")]
    because: Annotated[
        str | None,
        Meta(description="The ID of the failed check that this one is a consequence of."),
    ]
    facts: Annotated[
        dict[str, Fact], Meta(description="What was measured, by names that docs/doctor.md lists.")
    ]


@dataclass(frozen=True, slots=True)
class Report:
    """What `toppy doctor --json` prints."""

    version: Annotated[str, Meta(description="Of the client.")]
    overall: Annotated[
        Status, Meta(description="The worst status: `pass`, `warn` or `fail`; skips do not count.")
    ]
    checks: Annotated[
        tuple[Check, ...], Meta(description="In an order that stays; new checks may be added.")
    ]

    @classmethod
    def of(cls, checks: tuple[Check, ...]) -> Report:
        """With the worst of them as the overall status."""
        worst = max((c.status for c in checks), key=_SEVERITY.__getitem__, default=Status.PASS)
        overall = Status.PASS if worst is Status.SKIP else worst
        return cls(__version__, overall, checks)

    def as_json(self) -> dict[str, Any]:
        """T-080."""
        facts: dict[str, Any] = msgspec.to_builtins(self)
        return facts

    def as_text(self) -> str:
        """T-080; what follows from a failure is named under it instead of shown."""
        lines = [f"doctor: {self.overall.value}", f"version: {self.version}"]
        for check in self.checks:
            if check.because is not None:
                continue
            lines.append(f"- [{check.status.value}] {check.id}: {check.summary}")
            if check.remedy is not None:
                lines.append(f"{_REMEDY_INDENT}{check.remedy}")
            following = [c.id for c in self.checks if c.because == check.id]
            if following:
                lines.append(f"{_REMEDY_INDENT}because of this also: {', '.join(following)}")
        return "\n".join(lines)


class Findings:
    """Checks while they are being made."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(
        self,
        check_id: str,
        status: Status,
        summary: str,
        remedy: str | None = None,
        *,
        because: str | None = None,
        facts: dict[str, Fact] | None = None,
    ) -> None:
        """One finding. ``because``: the failed check that it is a consequence of, or one that is
        itself a consequence: then the same cause is named.
        """
        cause = self._checks.get(because) if because is not None else None
        if cause is not None:
            because = cause.because or because
        self._checks[check_id] = Check(check_id, status, summary, remedy, because, facts or {})

    def add_all(self, others: Findings) -> None:
        """Those of another one, too."""
        self._checks |= others._checks

    def follow(self, check_ids: tuple[str, ...], because: str) -> None:
        """Nothing was checked there, because of a failure that is already shown."""
        for check_id in check_ids:
            cause = self._checks[because].because or because
            said = f"not checked: mend {cause} first"
            self.add(check_id, Status.SKIP, said, because=because)

    def has_failed(self, check_id: str) -> bool:
        """Whether that check failed, or was not made because of another failure."""
        check = self._checks.get(check_id)
        return check is not None and (check.status is Status.FAIL or check.because is not None)

    def is_cause(self, check_id: str) -> bool:
        """Whether that check failed, and by itself."""
        check = self._checks.get(check_id)
        return check is not None and check.status is Status.FAIL and check.because is None

    def first_failed(self, *check_ids: str) -> str | None:
        """The first of them that ``has_failed``."""
        return next((check_id for check_id in check_ids if self.has_failed(check_id)), None)

    def report(self, order: tuple[str, ...]) -> Report:
        """Everything, in that order."""
        return Report.of(tuple(self._checks[i] for i in order if i in self._checks))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the report: `docs/doctor.schema.json`."""
    schema = msgspec.json.schema(Report)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "toppy doctor --json",
        **schema,
    }


def render_schema() -> str:
    """As `docs/doctor.schema.json` has it."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_schema())
