"""What the audit log says about tunnels: opened, denied, closed; and credentials that are no good.

A tunnel is recorded before its worker hears of the grant. Its end comes from the worker, numbered,
and is acknowledged once it is in the file; of a worker that dies, the control plane knows which
tunnels it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from toppy.control.audit_writer import ACTOR, AuditWriter
from toppy.control.generation import Worker
from toppy.model.audit_event import AuditAction, Fact
from toppy.model.grant import Denial, Grant
from toppy.model.target import Target
from toppy.wire.ipc_message import (
    AdmissionRequest,
    ClosedTunnel,
    ClosedTunnels,
    LiveTunnel,
    RefusedRequests,
)

_UNAUTHENTICATED = 401
_TOO_MANY = 429
_NO_RECORD = Denial(
    503,
    "proxy_internal_error",
    "the gateway cannot write its audit log, and opens no tunnel that it cannot record; its "
    "operator finds the cause in its log",
)


@dataclass(frozen=True, slots=True)
class _Open:
    """An open tunnel of a worker."""

    source: str
    target: str
    subject: str
    rule: str


class _WorkerRecords:
    """What is known of one worker process."""

    def __init__(self) -> None:
        self.open: dict[str, _Open] = {}
        self.taken = 0
        """Number of the last closed tunnel that is queued for the log."""
        self.written = 0
        """The same, in the file."""
        self.lost = 0


class TunnelAudit:
    """Turns decisions and reports about tunnels into audit events."""

    def __init__(self, audit: AuditWriter) -> None:
        self.writer = audit
        self._workers: dict[Worker, _WorkerRecords] = {}

    def _of(self, worker: Worker) -> _WorkerRecords:
        return self._workers.setdefault(worker, _WorkerRecords())

    def decided(
        self, worker: Worker, asked: AdmissionRequest, decision: Grant | Denial
    ) -> Grant | Denial:
        """Record a decision; a grant that cannot be recorded becomes a denial, by setting."""
        audit = self.writer
        if worker.process.has_ended:
            return decision  # nobody hears it
        target = str(Target(asked.host, asked.port))
        name = worker.tunnel_name(asked.connection, asked.quarter_stream_id)
        if isinstance(decision, Denial):
            is_stranger = decision.status == _UNAUTHENTICATED
            if is_stranger or decision.status == _TOO_MANY:
                audit.record_refusal(
                    AuditAction.AUTH_FAILED if is_stranger else AuditAction.TUNNEL_DENIED,
                    target,
                    source=asked.source,
                    status=decision.status,
                    reason=decision.details,
                    subject=decision.subject,
                    rule=decision.rule,
                    tunnel=name,
                )
                return decision
            audit.record(
                AuditAction.TUNNEL_DENIED,
                target,
                actor=asked.source or ACTOR,
                allowed=False,
                subject=decision.subject or None,
                reason=decision.details,
                is_reserved=False,
                **_named(
                    tunnel=name,
                    protocol=asked.protocol,
                    status=decision.status,
                    rule=decision.rule,
                ),
            )
            return decision
        is_renewal = bool(asked.address) or (asked.connection and name in self._of(worker).open)
        is_recorded = audit.record(
            AuditAction.TUNNEL_RENEWED if is_renewal else AuditAction.TUNNEL_OPENED,
            target,
            actor=asked.source or ACTOR,
            subject=decision.subject,
            **_named(
                tunnel=name,
                protocol=asked.protocol,
                rule=decision.rule,
                revision=decision.revision,
                addresses=",".join(decision.addresses),
            ),
        )
        if not is_recorded and audit.refuses and not is_renewal:
            return _NO_RECORD
        if audit.is_enabled:
            self._of(worker).open[name] = _Open(
                asked.source, target, decision.subject, decision.rule
            )
        return decision

    def credential_refused(self, worker: Worker, source: str) -> None:
        """A ping with a token that is no good."""
        self.writer.record_refusal(
            AuditAction.AUTH_FAILED,
            "ping",
            source=source,
            status=_UNAUTHENTICATED,
            reason="the token of a ping is not good",
            worker=f"s{worker.slot}",
        )

    def refused_unread(self, worker: Worker, asked: AdmissionRequest, denial: Denial) -> None:
        """Too many tunnels are being opened."""
        self.writer.record_refusal(
            AuditAction.TUNNEL_DENIED,
            str(Target(asked.host, asked.port)),
            source=asked.source,
            status=denial.status,
            reason=denial.details,
            worker=f"s{worker.slot}",
        )

    def refused(self, worker: Worker, refusals: Iterable[RefusedRequests]) -> None:
        """What a worker refused without asking."""
        for each in refusals:
            self.writer.record_refusal(
                AuditAction.TUNNEL_DENIED,
                each.target,
                source=each.source,
                status=each.status,
                reason=each.reason,
                count=each.count,
                worker=f"s{worker.slot}",
            )

    def revoked(self, worker: Worker, tunnel: LiveTunnel, denial: Denial) -> None:
        """A live tunnel is not allowed any more, and is ended."""
        self.writer.record(
            AuditAction.TUNNEL_REVOKED,
            str(Target(tunnel.host, tunnel.port)),
            allowed=False,
            subject=tunnel.subject,
            reason=denial.details,
            **_named(
                tunnel=worker.tunnel_name(tunnel.connection, tunnel.quarter_stream_id),
                protocol=tunnel.protocol,
                source=tunnel.source,
                rule=denial.rule,
            ),
        )

    def seen(self, worker: Worker, tunnel: LiveTunnel) -> None:
        """A tunnel that is open now, perhaps from before this control plane."""
        if self.writer.is_enabled:
            name = worker.tunnel_name(tunnel.connection, tunnel.quarter_stream_id)
            self._of(worker).open.setdefault(
                name,
                _Open(
                    tunnel.source.rpartition(":")[0].strip("[]"),
                    str(Target(tunnel.host, tunnel.port)),
                    tunnel.subject,
                    tunnel.rule,
                ),
            )

    def closed(
        self, worker: Worker, said: ClosedTunnels, acknowledge: Callable[[int], None]
    ) -> None:
        """A worker's tunnels that have ended. ``acknowledge`` is called with the number of the last
        one that is in the file; what there is no room for is not, and the worker says it again.
        """
        records, audit = self._of(worker), self.writer
        if said.lost > records.lost and audit.record(
            AuditAction.AUDIT_LOST,
            f"s{worker.slot}g{worker.generation.number}",
            allowed=False,
            reason="ends of tunnels that their worker had no room for",
            count=said.lost - records.lost,
        ):
            records.lost = said.lost
        last = said.first + len(said.tunnels) - 1
        if last <= records.written:
            if said.tunnels:  # it did not hear that
                acknowledge(records.written)
            return
        for number, tunnel in enumerate(said.tunnels, said.first):
            if number <= records.taken:
                continue
            if not audit.has_room:
                return

            def written(number: int = number) -> None:
                records.written = number
                if number == records.taken:
                    acknowledge(number)

            records.taken = number
            self._record_closed(worker, tunnel, written)

    def _record_closed(
        self, worker: Worker, tunnel: ClosedTunnel, written: Callable[[], None]
    ) -> None:
        name = worker.tunnel_name(tunnel.connection, tunnel.quarter_stream_id)
        self._of(worker).open.pop(name, None)
        self.writer.record(
            AuditAction.TUNNEL_CLOSED,
            str(Target(tunnel.host, tunnel.port)),
            actor=tunnel.source or ACTOR,
            subject=tunnel.subject,
            reason=tunnel.reason,
            on_written=written,
            **_named(
                tunnel=name,
                protocol=tunnel.protocol,
                rule=tunnel.rule,
                duration_s=round(tunnel.duration_s, 3),
                bytes_to_target=tunnel.bytes_to_target,
                bytes_to_client=tunnel.bytes_to_client,
                datagrams_to_target=tunnel.datagrams_to_target,
                datagrams_to_client=tunnel.datagrams_to_client,
                drops=tunnel.drops,
                rate_limited=tunnel.rate_limited or "",
            ),
        )

    def worker_ended(self, worker: Worker, *, exit_code: int | None, has_died: bool) -> None:
        """Whatever it had open has ended with it."""
        records = self._workers.pop(worker, None) or _WorkerRecords()
        if has_died:
            self.writer.record(
                AuditAction.WORKER_DIED,
                f"s{worker.slot}g{worker.generation.number}",
                allowed=False,
                **_named(
                    pid=worker.process.pid,
                    exit_code=exit_code if exit_code is not None else "unknown",
                    tunnels=len(records.open),
                ),
            )
        for name, tunnel in records.open.items():
            self.writer.record(
                AuditAction.TUNNEL_CLOSED,
                tunnel.target,
                actor=tunnel.source or ACTOR,
                subject=tunnel.subject,
                reason="its worker died" if has_died else "its worker ended",
                **_named(tunnel=name, rule=tunnel.rule),
            )


def _named(**facts: Fact) -> dict[str, Any]:
    """Without those that say nothing."""
    return {key: value for key, value in facts.items() if value != ""}
