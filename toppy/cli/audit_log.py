"""What ``toppy audit`` and ``toppy-gw audit`` do."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from toppy.client.audit import (
    ClientAudit,
    environment_config,
    log_path,
    ship_options,
    verify_options,
)
from toppy.client.settings import load_client_config
from toppy.config.client import ClientConfig, client_config_path
from toppy.control.audit_settings import (
    SYSTEM_STATE_DIRECTORY,
    audit_paths,
    collector_options,
    signing_key,
)
from toppy.control.settings import SYSTEM_CONFIG, config_path, load_config
from toppy.errors import ConfigError, ToppyError
from toppy.model.audit_event import AuditAction, parse_facts
from toppy.observe.audit_reader import (
    AuditLogError,
    Verified,
    checkpoint_path,
    last_lines,
    log_files,
    read_lines,
    verify_log,
)
from toppy.observe.audit_shipper import (
    AuditShipper,
    Collector,
    CollectorOptions,
    verify_remotely,
)
from toppy.observe.log import configure_logging
from toppy.system.files import read_file
from toppy.wire.audit_entry import (
    AuditEntry,
    AuditError,
    Verifier,
    parse_entry,
    parse_public_key,
    parse_signing_key,
)

EXIT_FAILURE = 1
EXIT_WRONG_USAGE = 2
_FOLLOW_INTERVAL_S = 0.25
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_COLUMNS = (
    *("seq", "time", "actor", "action", "target", "allowed", "auth_subject", "reason"),
    *("facts", "hash"),
)
_NO_FILE = "there is no such log"


@dataclass(frozen=True, slots=True)
class AuditPlace:
    """A log, and what belongs to it. Secrets are read when they are needed."""

    program: str
    path: Path
    checkpoints: Path
    signing_key: Callable[[], str]
    """Empty: there is none. Raises ``ConfigError``."""
    ship: Callable[[], CollectorOptions | None]
    verify: Callable[[], CollectorOptions | None]
    own_log: ClientAudit | None = None
    """Where the command itself is recorded (T-107)."""


Find = Callable[[], AuditPlace]


def find_client_log(
    config: str | None, environ: Mapping[str, str], path: Path | None
) -> AuditPlace:
    """The client's. It needs no configuration file. Raises ``ToppyError``."""
    settings: ClientConfig
    file = Path(client_config_path(config, environ, environ.get("HOME", "")))
    if config is not None or environ.get("TOPPY_CONFIG") or file.exists():
        loaded = load_client_config(config, environ)
        settings, file = loaded.config, loaded.path
    else:
        settings = environment_config(environ)
    own = log_path(settings, file, environ)
    where = path or own
    key = settings.audit_signing_key
    return AuditPlace(
        program="toppy",
        path=where,
        checkpoints=checkpoint_path(where),
        signing_key=lambda: key.get_secret_value() if key is not None else "",
        ship=lambda: ship_options(settings),
        verify=lambda: verify_options(settings),
        own_log=ClientAudit.of(settings, file, environ) if where == own else None,
    )


def find_gateway_log(
    config: str | None, environ: Mapping[str, str], path: Path | None
) -> AuditPlace:
    """The gateway's. Raises ``ConfigError``."""
    file = config_path(config, environ)
    base = str(file.absolute().parent) if file is not None else os.getcwd()  # noqa: PTH109
    is_copy = file is None and path is not None  # on a machine without a gateway
    section = None if is_copy else load_config(file, environ).config.audit

    def read(name: str, key: str) -> str:
        return read_file(Path(base) / name, key).decode("utf-8", "replace").strip()

    paths = audit_paths(section, base, environ) if section is not None else None
    if paths is None and section is not None and file == Path(SYSTEM_CONFIG):
        # the service has a state directory; whoever types this command has no variable for it
        service = audit_paths(section, base, {"STATE_DIRECTORY": SYSTEM_STATE_DIRECTORY})
        paths = service if service is not None and log_files(service[0]) else None
    if path is not None:
        is_own = paths is not None and paths[0] == path.absolute()
        paths = paths if is_own else (path, checkpoint_path(path))
    if paths is None:
        raise ConfigError(
            "this gateway has no audit log: set audit.path, or name a log with --path",
            key="audit.path",
        )
    if section is None:
        return AuditPlace("toppy-gw", *paths, lambda: "", lambda: None, lambda: None)
    found = section
    return AuditPlace(
        program="toppy-gw",
        path=paths[0],
        checkpoints=paths[1],
        signing_key=lambda: signing_key(found, read),
        ship=lambda: collector_options(found, read),
        verify=lambda: _verify_options_of(environ),
    )


def _verify_options_of(environ: Mapping[str, str]) -> CollectorOptions | None:
    return verify_options(environment_config(environ))


# verify


def run_verify(
    find: Find,
    *,
    signing_key: str | None,
    public_key: Path | None,
    checkpoints: Path | None,
    unsigned: bool,
    every_signature: bool,
    as_json: bool,
) -> int:
    """Exit code 0 when the log is what was written (T-016, T-019)."""
    configure_logging("warning", "auto", process="audit")
    try:
        place = find()
        verifier = _verifier(place, signing_key, public_key)
    except (ToppyError, OSError) as error:
        return _fail(error)
    problem = ""
    found: Verified | None = None
    try:
        with _progress(place.path) as on_progress:
            found = verify_log(
                place.path,
                verifier,
                checkpoints=checkpoints or place.checkpoints,
                unsigned=unsigned,
                every_signature=every_signature,
                on_progress=on_progress,
            )
    except AuditLogError as error:
        problem = error.cause if error.path == place.path else str(error)
    except AuditError as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or str(error)
    if as_json:
        print(json.dumps(_verified_facts(place.path, found, problem), indent=2))
    elif found is None:
        print(f"audit invalid: {place.path}: {problem}")
    else:
        print(f"audit ok: {place.path}")
        print(
            f"{found.entries} entries in {found.files} files, {found.checkpoints} checkpoints, "
            f"{'signatures checked' if verifier is not None else 'no key given'}; "
            f"head {found.head or 'none'}",
            file=sys.stderr,
        )
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
    if place.own_log is not None and log_files(place.path):
        place.own_log.record_and_ship(
            AuditAction.AUDIT_VERIFY, str(place.path), allowed=found is not None, reason=problem
        )
    return 0 if found is not None else EXIT_FAILURE


def _verified_facts(path: Path, found: Verified | None, problem: str) -> dict[str, Any]:
    if found is None:
        return {"ok": False, "path": str(path), "error": problem}
    return {
        "ok": True,
        "path": str(path),
        "entries": found.entries,
        "count": found.count,
        "head": found.head,
        "files": found.files,
        "checkpoints": found.checkpoints,
        "notes": list(found.notes),
    }


def _verifier(
    place: AuditPlace, signing_key: str | None, public_key: Path | None
) -> Verifier | None:
    if public_key is not None:
        pem = read_file(public_key, "--public-key").decode("utf-8", "replace")
        return parse_public_key(pem)
    key = signing_key if signing_key is not None else place.signing_key()
    return parse_signing_key(key) if key else None


@contextlib.contextmanager
def _progress(path: Path) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    total = sum(file.stat().st_size for file in log_files(path))
    columns = (
        TextColumn("verifying"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda read: progress.update(task, completed=min(read, total))


# tail


def run_tail(find: Find, count: int, *, follow: bool, as_json: bool) -> int:
    """Exit code 0."""
    show = _show_json if as_json else _show_entry
    try:
        place = find()
        if not log_files(place.path) and not follow:
            raise FileNotFoundError(2, _NO_FILE, str(place.path))
        shown = 0
        for line in _last_of_all(place.path, count):
            shown = show(line) or shown
        if follow:
            _follow(place.path, shown, show)
    except (ToppyError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        pass
    return 0


def _last_of_all(path: Path, count: int) -> list[bytes]:
    lines: list[bytes] = []
    for file in reversed(log_files(path)):
        if len(lines) >= count:
            break
        lines = last_lines(file, count - len(lines)) + lines
    return lines


def _follow(path: Path, seq: int, show: Callable[[bytes], int]) -> None:
    """Every entry after ``seq``, across rotations. What has nothing before it starts at its end."""
    if not seq:
        last = _last_of_all(path, 1)
        seq = parse_entry(last[0]).seq if last else 0
    offset, inode = 0, 0
    while True:
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if facts.st_ino != inode:
                for file in log_files(path):
                    seq, offset = _show_after(file, 0, seq, show)
                inode = facts.st_ino
            elif facts.st_size > offset:
                seq, offset = _show_after(path, offset, seq, show)
        time.sleep(_FOLLOW_INTERVAL_S)


def _show_after(file: Path, offset: int, seq: int, show: Callable[[bytes], int]) -> tuple[int, int]:
    for line, is_whole in read_lines(file, offset):
        if not is_whole:
            break
        offset += len(line) + 1
        if parse_entry(line).seq > seq:
            seq = show(line)
    return seq, offset


def _show_json(line: bytes) -> int:
    print(line.decode("utf-8", "replace"), flush=True)
    return parse_entry(line).seq


def _show_entry(line: bytes) -> int:
    entry = parse_entry(line)
    event = entry.event
    parts = [
        _time_of(entry),
        str(entry.seq),
        event.action,
        "allowed" if event.allowed else "DENIED",
        event.target,
        f"by {event.actor}" + (f" ({event.auth_subject})" if event.auth_subject else ""),
    ]
    text = "  ".join(parts) + (f": {event.reason}" if event.reason else "")
    print(text.translate(_CONTROLS), flush=True)
    return entry.seq


def _time_of(entry: AuditEntry) -> str:
    try:
        moment = datetime.fromtimestamp(entry.unix_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return str(entry.unix_ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ship


def run_ship(find: Find, batch_size: int | None, url: str | None, *, as_json: bool) -> int:
    """Exit code 0 when the collector has everything."""
    configure_logging("warning", "auto", process="audit")
    try:
        place = find()
        options = _collector(place.ship(), url, "TOPPY_AUDIT_SHIP_URL or audit_ship_url", place)
        if batch_size is not None:
            options = replace(options, batch_size=batch_size)
        if not log_files(place.path):
            raise FileNotFoundError(2, _NO_FILE, str(place.path))
        count, position = asyncio.run(_ship(place, options))
    except (ToppyError, OSError) as error:
        return _fail(error)
    if as_json:
        print(json.dumps({"shipped": count, "position": position}, indent=2))
    else:
        print(f"shipped {count} entries; the collector has {position}")
    return 0


async def _ship(place: AuditPlace, options: CollectorOptions) -> tuple[int, int]:
    async with Collector(options) as collector:
        shipper = AuditShipper(
            place.path, collector, batch_size=options.batch_size, checkpoints=place.checkpoints
        )
        return await shipper.ship_new(), shipper.position


def _collector(
    found: CollectorOptions | None, url: str | None, keys: str, place: AuditPlace
) -> CollectorOptions:
    if url is not None:
        return replace(found, url=url) if found is not None else CollectorOptions(url=url)
    if found is None:
        if place.program == "toppy-gw":
            keys = keys.replace("TOPPY_", "TOPPY_GW_", 1).replace("audit_ship", "audit.ship")
        raise ConfigError(f"there is no collector: set {keys}, or name one with --url")
    return found


def run_remote_verify(find: Find, url: str | None, *, as_json: bool) -> int:
    """Exit code 0 when the other end says that the log is what it knows."""
    try:
        place = find()
        options = place.verify()
        if url is None and options is None:
            raise ConfigError("there is nobody to ask: set TOPPY_AUDIT_VERIFY_URL, or give --url")
        default = CollectorOptions(url=url or "", timeout_s=5.0)
        options = replace(options or default, url=url or (options or default).url)
        answer = asyncio.run(_remote_verify(place.path, options))
    except (ToppyError, OSError) as error:
        return _fail(error)
    if as_json:
        print(json.dumps({"ok": answer.is_ok, "message": answer.message}, indent=2))
    else:
        word = "ok" if answer.is_ok else "invalid"
        said = f": {answer.message.translate(_CONTROLS)}" if answer.message else ""
        print(f"audit remote {word}: {place.path}{said}")
    return 0 if answer.is_ok else EXIT_FAILURE


async def _remote_verify(path: Path, options: CollectorOptions) -> Any:
    async with Collector(options) as collector:
        return await verify_remotely(path, collector)


# export


def run_export(
    find: Find,
    format: str,
    output: Path | None,
    *,
    since: str | None,
    until: str | None,
    actions: frozenset[str],
    only_denied: bool,
) -> int:
    """Exit code 0. It does not verify; ``verify`` does."""
    try:
        begin, end = _unix_ms("--since", since), _unix_ms("--until", until)
        place = find()
        if not log_files(place.path):
            raise FileNotFoundError(2, _NO_FILE, str(place.path))
    except (ToppyError, OSError) as error:
        return _fail(error, EXIT_WRONG_USAGE if isinstance(error, UsageError) else EXIT_FAILURE)

    def wanted(entry: AuditEntry) -> bool:
        return (
            (begin is None or entry.unix_ms >= begin)
            and (end is None or entry.unix_ms < end)
            and (not actions or entry.event.action in actions)
            and not (only_denied and entry.event.allowed)
        )

    try:
        with _open_output(output) as sink:
            rows = (_row(e) for e in _entries(place.path) if wanted(e))
            _write_rows(format, rows, sink)
    except BrokenPipeError:
        # whoever read has enough; the interpreter must not complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (ToppyError, OSError) as error:
        return _fail(error)
    return 0


class UsageError(ToppyError):
    """An argument is wrong."""


def _unix_ms(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise UsageError(f"{option} {text!r} is no time of ISO 8601, such as 2026-11-21") from None


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8", newline="") as file:
        yield file


def _entries(path: Path) -> Iterator[AuditEntry]:
    for file in log_files(path):
        for number, (line, is_whole) in enumerate(read_lines(file), 1):
            if not is_whole:
                return
            try:
                yield parse_entry(line)
            except AuditError as error:
                raise AuditLogError(file, number, str(error)) from None


def _row(entry: AuditEntry) -> dict[str, Any]:
    event = entry.event
    reason, facts = parse_facts(event.reason or "")
    return {
        "seq": entry.seq,
        "time": _time_of(entry),
        "actor": event.actor,
        "action": event.action,
        "target": event.target,
        "allowed": event.allowed,
        "auth_subject": event.auth_subject,
        "reason": reason or None,
        "facts": facts,
        "hash": entry.hash,
    }


def _write_rows(format: str, rows: Iterator[dict[str, Any]], sink: IO[str]) -> None:
    if format == "csv":
        table = csv.writer(sink, lineterminator="\n")
        table.writerow(_COLUMNS)
        for row in rows:
            row["facts"] = " ".join(f"{key}={value}" for key, value in row["facts"].items())
            row["allowed"] = str(row["allowed"]).lower()
            table.writerow([_cell(row[name]) for name in _COLUMNS])
        return
    if format == "jsonl":
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    separator = "[\n"
    for row in rows:
        sink.write(separator + json.dumps(row, ensure_ascii=False))
        separator = ",\n"
    sink.write("[]\n" if separator == "[\n" else "\n]\n")


def _cell(value: object) -> str:
    """A spreadsheet must not take what a peer has chosen for a formula."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _fail(error: Exception, exit_code: int = EXIT_FAILURE) -> int:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"audit: {text}", file=sys.stderr)
    return exit_code
