"""The audit log: how long a million entries take to write and to verify, each signed."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from integration.bench.figures import Figures, over, spread, table
from integration.processes import BIN
from toppy.model.audit_event import AuditEvent
from toppy.observe.audit_log import AuditLog, AuditLogOptions
from toppy.wire.audit_entry import Ed25519Signer, HmacKey, Signer

_ENTRIES: Final = {"HMAC": 1_000_000, "Ed25519": 200_000}
_BATCH: Final = 1000
_SECRET: Final = "the key of the benchmark"
_FACTS: Final = (
    "the client ended it; tunnel=s0g1c{0}t0 rule=dns duration_s=1.5 bytes_to_target=1200"
)


def measure(*, is_quick: bool) -> Figures:
    """Each kind of key, in files as rotation makes them."""
    return {
        kind: _measure(kind, entries // (20 if is_quick else 1))
        for kind, entries in _ENTRIES.items()
    }


def _measure(kind: str, entries: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="bench-audit-") as name:
        folder = Path(name)
        key, options = _key(kind, folder)
        log = AuditLog(
            folder / "audit.jsonl",
            AuditLogOptions(signer=key, fsync="interval", rotate_bytes=64 << 20),
            actor="bench",
        )
        begin = time.monotonic()
        for first in range(0, entries, _BATCH):
            log.append([(1_700_000_000_000 + n, _event(n)) for n in range(first, first + _BATCH)])
            log.maintain()
        log.close()
        written_s = time.monotonic() - begin
        begin = time.monotonic()
        done = subprocess.run(
            [BIN / "toppy-gw", "audit", "verify", "--path", log.path, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        verified_s = time.monotonic() - begin
        if done.returncode or f"{entries} entries" not in done.stderr:
            raise RuntimeError(f"the log does not verify:\n{done.stdout}{done.stderr}")
        return {
            "entries": entries,
            "bytes": sum(file.stat().st_size for file in folder.glob("audit*.jsonl")),
            "write_s": written_s,
            "verify_s": verified_s,
        }


def _key(kind: str, folder: Path) -> tuple[Signer, list[str]]:
    """The signer, and the options by which ``verify`` has its key."""
    if kind == "HMAC":
        return HmacKey(_SECRET.encode()), ["--signing-key", _SECRET]
    signer = Ed25519Signer(Ed25519PrivateKey.generate())
    public = folder / "public.pem"
    public.write_text(signer.verifier.pem())
    return signer, ["--public-key", str(public)]


def _event(number: int) -> AuditEvent:
    return AuditEvent(
        "192.0.2.1",
        "tunnel.closed",
        "dns.example.com:53",
        True,
        "alice",
        _FACTS.format(number),
    )


def report(runs: Sequence[Figures], plots: Path) -> str:
    """Markdown."""
    rows = [
        [
            kind,
            spread(over(runs, kind, "entries")),
            spread([b / (1 << 20) for b in over(runs, kind, "bytes")]),
            spread(over(runs, kind, "write_s"), "{:.1f}"),
            spread(over(runs, kind, "verify_s"), "{:.1f}"),
        ]
        for kind in _ENTRIES
    ]
    return (
        "## Audit log\n\n"
        "Entries of a tunnel's end, signed, in files of 64 MiB: written in batches of 1,000 and\n"
        "brought to the disk once a second; then `toppy-gw audit verify` over all of them.\n\n"
        + table(["key", "entries", "MiB", "written in s", "verified in s"], rows)
    )
