"""``toppy doctor``: prints the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from toppy.client.audit import record_command
from toppy.client.doctor.examine import examine
from toppy.client.doctor.report import Status
from toppy.model.audit_event import AuditAction
from toppy.model.target import Protocol
from toppy.observe.log import configure_logging


def run_doctor(
    config: str | None,
    environ: Mapping[str, str],
    *,
    as_json: bool,
    target: str | None = None,
    protocol: Protocol | None = None,
) -> int:
    """Check everything; exit code 1 when a check failed."""
    configure_logging("warning", "auto", process="doctor")
    report = asyncio.run(examine(config, environ, target=target, protocol=protocol))
    print(json.dumps(report.as_json(), indent=2) if as_json else report.as_text(), flush=True)
    has_failed = report.overall is Status.FAIL
    failed = [check.id for check in report.checks if check.status is Status.FAIL]
    reason = f"failed: {', '.join(failed)}" if failed else report.overall.value
    record_command(
        config, environ, AuditAction.DOCTOR, "gateway", allowed=not has_failed, reason=reason
    )
    return 1 if has_failed else 0
