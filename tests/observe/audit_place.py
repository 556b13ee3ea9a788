"""Audit logs in a test's own directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toppy.model.audit_event import AuditEvent
from toppy.observe.audit_log import AuditLog, AuditLogOptions
from toppy.observe.audit_reader import Verified, checkpoint_path, log_files, verify_log
from toppy.wire.audit_entry import AuditEntry, HmacKey, parse_entry

KEY = HmacKey(b"the key")


def event(number: int) -> AuditEvent:
    return AuditEvent("alice", "udp", f"192.0.2.1:{number}", True)


@dataclass
class Place:
    """One log; time stands still unless a test moves it."""

    directory: Path
    now: float = 1_700_000_000.0
    options: AuditLogOptions = field(default_factory=lambda: AuditLogOptions(signer=KEY))

    @property
    def path(self) -> Path:
        return self.directory / "audit.jsonl"

    @property
    def checkpoints(self) -> Path:
        return checkpoint_path(self.path)

    def set(self, **options: object) -> None:
        self.options = replace(self.options, **options)  # type: ignore[arg-type]

    def open(self) -> AuditLog:
        return AuditLog(self.path, self.options, actor="tester", clock=lambda: self.now)

    def write(self, numbers: Sequence[int]) -> None:
        """One writer's life: each event in an ``append`` of its own."""
        log = self.open()
        try:
            for number in numbers:
                self.append(log, number)
        finally:
            log.close()

    def append(self, log: AuditLog, *numbers: int) -> None:
        log.append([(int(self.now * 1000), event(number)) for number in numbers])
        log.maintain()

    def verify(self) -> Verified:
        return verify_log(self.path, KEY, checkpoints=self.checkpoints)

    def names(self) -> list[str]:
        return [file.name for file in log_files(self.path)]

    def entries(self) -> list[AuditEntry]:
        return [
            parse_entry(line)
            for file in log_files(self.path)
            for line in file.read_bytes().splitlines()
        ]
