"""Sends audit entries to a collector over HTTP (T-105, T-106).

The log itself is the spool: what a collector has taken is remembered beside it, by sequence number,
and everything after that is sent when the collector is there again. Entries are sent in order, at
least once: again only when the answer to them was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from toppy.errors import ToppyError
from toppy.observe.audit_position import (
    Position,
    first_seq,
    give_to_owner,
    read_position,
    shipped_path,
    write_position,
)
from toppy.observe.audit_reader import last_checkpoint, log_files, read_lines
from toppy.observe.log import get_logger
from toppy.protocol.backoff import Backoff
from toppy.wire.audit_entry import AuditError, encode_checkpoint, parse_entry

CHECKPOINT_FIELD = "toppy-audit-checkpoint"
"""Has the newest checkpoint, as JSON, that the entries sent so far bear out."""
_MAX_BATCH_BYTES = 4 << 20
_MAX_ANSWER_BYTES = 1 << 20
_SHOWN_CHARACTERS = 200
_MOST_BACKOFF_S = 60.0
_LATER_STATUSES = (408, 425, 429)
"""Beside 5xx: the same request may succeed later."""

_log = get_logger("audit")


class ShipError(ToppyError):
    """The collector did not take it."""

    retryable = True


@dataclass(frozen=True, slots=True)
class CollectorOptions:
    """How a collector is spoken to."""

    url: str
    token: str = field(default="", repr=False)
    """Sent as a Bearer token; empty: none."""
    timeout_s: float = 3.0
    """For one request."""
    retries: int = 2
    """After the first attempt."""
    backoff_s: float = 0.25
    """Before the first retry; doubles from then on."""
    batch_size: int = 100
    """Entries of one request, as a JSON array; 1: one entry, as an object."""


class Collector:
    """HTTP with retries. Use it as an async context manager."""

    def __init__(
        self,
        options: CollectorOptions,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._options = options
        self._sleep = sleep
        self._chance = chance
        self._client = httpx.AsyncClient(
            timeout=options.timeout_s, transport=transport, follow_redirects=False
        )

    async def __aenter__(self) -> Collector:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def post(
        self, body: Callable[[], bytes | AsyncIterator[bytes]], headers: dict[str, str]
    ) -> httpx.Response:
        """The answer, 2xx, read. ``body`` is called for every attempt. Raises ``ShipError``."""
        options = self._options
        fields = {"content-type": "application/json", **headers}
        if options.token:
            fields["authorization"] = f"Bearer {options.token}"
        backoff = Backoff(self._chance, first_s=options.backoff_s, most_s=_MOST_BACKOFF_S)
        for attempt in range(options.retries + 1):
            try:
                return await self._post_once(body(), fields)
            except ShipError as error:
                if not error.retryable or attempt == options.retries:
                    raise
            await self._sleep(backoff.next_delay_s())
        raise AssertionError("the last attempt returns or raises")

    async def _post_once(
        self, body: bytes | AsyncIterator[bytes], fields: dict[str, str]
    ) -> httpx.Response:
        try:
            async with self._client.stream(
                "POST", self._options.url, content=body, headers=fields
            ) as answer:
                content = b""
                async for chunk in answer.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_ANSWER_BYTES:
                        break
        except httpx.TimeoutException:
            raise ShipError(
                f"{self._where} has not answered within {self._options.timeout_s:g} s"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ShipError(f"{self._where} cannot be reached: {error}") from None
        if answer.is_success:
            return httpx.Response(answer.status_code, content=content)
        shown = content.decode("utf-8", "replace").strip()[:_SHOWN_CHARACTERS]
        said = f"{self._where} answered {answer.status_code} {shown!r}"
        if answer.status_code >= 500 or answer.status_code in _LATER_STATUSES:
            raise ShipError(said)
        raise RefusedByCollectorError(said)

    @property
    def _where(self) -> str:
        """Without what may be secret in a URL."""
        try:
            url = httpx.URL(self._options.url)
        except (httpx.InvalidURL, TypeError):
            return "the collector (its URL is wrong)"
        port = f":{url.port}" if url.port is not None else ""
        return f"{url.scheme}://{url.host}{port}{url.path}"


class RefusedByCollectorError(ShipError):
    """The collector will not take it, however often it is asked."""

    retryable = False


class AuditShipper:
    """Ships one log to one collector. ``shipped`` is where it remembers how far it is."""

    def __init__(
        self,
        path: Path,
        collector: Collector,
        *,
        batch_size: int,
        shipped: Path | None = None,
        checkpoints: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._path = path
        self._collector = collector
        self._batch_size = batch_size
        self._shipped = shipped or shipped_path(path)
        self._checkpoints = checkpoints
        self.failures = 0
        """In a row."""
        self.failures_total = 0
        self.last_success: float | None = None
        """Unix time at which the collector last had everything that was there."""
        self.oldest_ms: int | None = None
        """Unix time of the oldest entry that the collector is known not to have."""
        self.problem = ""
        """Why the last attempt failed; empty: it did not."""

    @property
    def position(self) -> int:
        """The last entry that the collector has taken."""
        return read_position(self._shipped).seq

    async def ship_new(self, *, most: int | None = None) -> int:
        """Everything that the collector does not have; how many entries, at most ``most``.

        Raises ``ShipError``, ``OSError``, ``AuditError``; what was taken until then stays taken.
        """
        with _claim(self._shipped):
            position = read_position(self._shipped)
            count = 0
            batch: list[bytes] = []
            size = 0
            reached = position
            for line, here in self._lines_after(position):
                batch.append(line)
                size += len(line)
                reached = here
                is_last = most is not None and count + len(batch) >= most
                if len(batch) >= self._batch_size or size >= _MAX_BATCH_BYTES or is_last:
                    count += await self._ship(batch, reached)
                    batch, size = [], 0
                if is_last:
                    return count
            if batch:
                count += await self._ship(batch, reached)
            return count

    async def run(self, wake_up: asyncio.Event) -> None:
        """Ship whenever ``wake_up`` is set, until cancelled; while the collector is down, try again
        at longer and longer intervals.
        """
        backoff = Backoff(random.random, first_s=1.0, most_s=_MOST_BACKOFF_S)
        while True:
            wake_up.clear()
            try:
                await self.ship_new()
            except (ShipError, AuditError, OSError) as error:
                self.failures += 1
                self.failures_total += 1
                self.problem = str(error)
                delay_s = backoff.next_delay_s()
                if self.failures == 1:
                    _log.warning("audit entries are not shipped", reason=self.problem)
                await asyncio.sleep(delay_s)
                continue
            if self.failures:
                _log.info("audit entries are shipped again")
            self.failures, self.problem = 0, ""
            self.last_success, self.oldest_ms = self._clock(), None
            backoff.reset()
            await wake_up.wait()

    async def _ship(self, batch: list[bytes], reached: Position) -> int:
        self.oldest_ms = parse_entry(batch[0]).unix_ms
        body = batch[0] if self._batch_size == 1 else b"[" + b",".join(batch) + b"]"
        headers = {}
        mark = last_checkpoint(self._checkpoints)
        if mark is not None and mark.count <= reached.seq:
            headers[CHECKPOINT_FIELD] = encode_checkpoint(mark).decode()
        await self._collector.post(lambda: body, headers)
        write_position(self._shipped, reached)
        return len(batch)

    def _lines_after(self, position: Position) -> Iterator[tuple[bytes, Position]]:
        """Lines that the collector does not have, and the position after each."""
        seq, head = position.seq, position.hash
        last_seq = 0
        for file in log_files(self._path):
            begins_with, offset = 0, 0
            if position.first_seq:
                begins_with = first_seq(file)
                if begins_with and begins_with < position.first_seq:
                    continue  # all of it was taken
                if begins_with == position.first_seq and _begins_line(file, position.offset):
                    offset = position.offset
            for line, is_whole in read_lines(file, offset):
                if not is_whole:
                    break  # it is being written
                offset += len(line) + 1
                entry = parse_entry(line)
                begins_with = begins_with or entry.seq
                last_seq = entry.seq
                if entry.seq <= position.seq:
                    if entry.seq == position.seq and entry.hash != position.hash:
                        raise self._replaced(entry.seq)
                    continue
                if seq and entry.seq != seq + 1:
                    raise AuditError(
                        f"{file.name}: entry {entry.seq} follows entry {seq}: those between are "
                        "not here and cannot be shipped"
                    )
                if seq and entry.prev_hash != head:
                    raise self._replaced(seq)
                seq, head = entry.seq, entry.hash
                yield line, Position(seq, head, begins_with, offset)
            if not last_seq and offset and position.first_seq == begins_with:
                last_seq = position.seq  # nothing new
        if last_seq < position.seq:
            raise self._replaced(position.seq)

    def _replaced(self, seq: int) -> AuditError:
        return AuditError(
            f"{self._path} is another log than the one whose first {seq} entries the collector "
            f"has, or was cut; to ship it from its beginning remove {self._shipped}"
        )


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """What a collector says about a chain."""

    is_ok: bool
    message: str


async def verify_remotely(path: Path, collector: Collector) -> RemoteAnswer:
    """Send the whole chain as one JSON array (T-106). Raises ``ShipError`` and ``OSError``."""
    if not log_files(path):
        raise FileNotFoundError(2, "there is no such log", str(path))

    async def chain() -> AsyncIterator[bytes]:
        separator = b"["
        pending: list[bytes] = []
        size = 0
        for file in log_files(path):
            for line, _ in read_lines(file):
                pending += (separator, line)
                separator = b","
                size += len(line)
                if size > 1 << 16:
                    yield b"".join(pending)
                    pending, size = [], 0
        yield b"".join((*pending, b"[]" if separator == b"[" else b"]"))

    try:
        answer = await collector.post(chain, {})
    except RefusedByCollectorError as error:
        return RemoteAnswer(False, str(error))
    try:
        said = json.loads(answer.content)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return RemoteAnswer(True, "")
    message = said.get("message")
    is_ok = said.get("verified") is not False and said.get("ok") is not False
    return RemoteAnswer(is_ok, message if isinstance(message, str) else "")


def _begins_line(file: Path, offset: int) -> bool:
    with file.open("rb") as opened:
        opened.seek(max(offset - 1, 0))
        return opened.read(1) == b"\n"


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[None]:
    """Two that ship one log would send everything twice. Raises ``ShipError``."""
    lock = os.open(
        path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        give_to_owner(lock, path.parent)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShipError("another process ships this log now") from None
        yield
    finally:
        os.close(lock)
