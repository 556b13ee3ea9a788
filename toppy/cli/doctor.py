"""``toppy doctor``: prints the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from toppy.client.doctor import Status, examine
from toppy.observe.log import configure_logging


def run_doctor(config: str | None, environ: Mapping[str, str], *, as_json: bool) -> int:
    """Check everything; exit code 1 when a check failed."""
    configure_logging("warning", "auto", process="doctor")
    report = asyncio.run(examine(config, environ))
    print(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())
    return 1 if report.overall is Status.FAIL else 0
