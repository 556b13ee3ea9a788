"""The control plane's audit log: events wait in a bounded queue, one thread writes them.

Nothing is lost in silence: an event that finds no room is counted, and the count is written as soon
as the log can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from toppy.control.audit_settings import AuditSettings
from toppy.errors import ConfigError
from toppy.model.audit_event import AuditAction, AuditEvent, Fact, reason_with_facts
from toppy.observe.audit_log import AuditLog
from toppy.observe.audit_metrics import AuditMetrics, ShippingMetrics
from toppy.observe.audit_reader import checkpoint_path
from toppy.observe.audit_shipper import AuditShipper, Collector
from toppy.observe.log import get_logger
from toppy.protocol.refusal_tally import RefusalKind, RefusalTally
from toppy.wire.audit_entry import AuditError

ACTOR = "toppy-gw"
"""Of what the gateway does by itself."""
OPERATOR = "operator"
"""Whoever may use the admin socket: the gateway's user, or root."""
_BATCH_EVENTS = 1000
_RETRY_S = 1.0
_MAINTENANCE_INTERVAL_S = 1.0
_CLOSE_DEADLINE_S = 2.0
_MOST_REFUSAL_KINDS = 100
"""Sources and reasons that are told apart: two entries each in an interval are below 100 kB."""
_RESERVED = 2
"""What strangers can cause (denials) gets one of so many parts of the queue and no more."""

_REFUSAL_ACTIONS = {401: AuditAction.AUTH_FAILED}
"""Every other status is a denial."""

_log = get_logger("audit")


@dataclass(frozen=True, slots=True)
class _Waiting:
    unix_ms: int
    event: AuditEvent
    on_written: Callable[[], None] | None


class AuditWriter:
    """Writes and ships one log; without a path it takes every event and does nothing.

    ``open`` it, ``start`` it on a running loop, and ``close`` it at the end.
    """

    def __init__(self, settings: AuditSettings, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._queue: deque[_Waiting] = deque()
        self._log: AuditLog | None = None
        self._lost = 0
        """Events that found no room and of which the log does not know."""
        self.lost_total = 0
        self.problem = ""
        """Why the log cannot be written now; empty: it can."""
        self._failures = 0
        """Attempts to write that failed."""
        self._written_at: float | None = None
        """Unix time of the last batch that is in the file."""
        self._tally = RefusalTally(
            interval_s=settings.repeat_interval_s, most_kinds=_MOST_REFUSAL_KINDS
        )
        self._is_closing = False
        self._wake_up = asyncio.Event()
        self._ship_wake_up = asyncio.Event()
        self._shipper: AuditShipper | None = None
        self._executor: ThreadPoolExecutor | None = None
        self.tasks: list[asyncio.Task[None]] = []
        """None of them ends before ``close``."""

    @property
    def is_enabled(self) -> bool:
        """Whether there is a log."""
        return self._settings.path is not None

    @property
    def has_room(self) -> bool:
        """Whether another event would be taken."""
        return not self.is_enabled or len(self._queue) < self._settings.queue_events

    @property
    def refuses(self) -> bool:
        """Whether what cannot be recorded must not happen."""
        return self.is_enabled and self._settings.refuses_when_full

    def open(self) -> None:
        """Take the log now, so that what is wrong with it is known. Raises ``ConfigError``."""
        if self._settings.path is None or self._log is not None:
            return
        try:
            self._log = self._opened()
        except AuditError as error:
            raise ConfigError(f"audit.path: {error}", key="audit.path") from None
        except OSError as error:
            raise ConfigError(
                f"audit.path: cannot write {error.filename or self._settings.path}: "
                f"{error.strerror}; choose a directory that this user may write",
                key="audit.path",
            ) from None

    def _opened(self) -> AuditLog:
        assert self._settings.path is not None
        return AuditLog(self._settings.path, self._settings.options, actor=ACTOR, clock=self._clock)

    def start(self) -> None:
        """Begin to write. A log that could not be opened is tried again and again."""
        if not self.is_enabled:
            return
        loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self.tasks = [loop.create_task(self._write_all())]
        if self._settings.collector is not None:
            self.tasks.append(loop.create_task(self._ship_all()))

    # events

    def record(
        self,
        action: AuditAction,
        target: str,
        *,
        actor: str = ACTOR,
        allowed: bool = True,
        subject: str | None = None,
        reason: str = "",
        on_written: Callable[[], None] | None = None,
        is_reserved: bool = True,
        **facts: Fact,
    ) -> bool:
        """Queue an event of now; False when there is no room: then it is counted as lost.

        ``on_written`` is called once it is in the file. Not ``is_reserved``: it must leave room.
        """
        if not self.is_enabled:
            if on_written is not None:
                on_written()
            return True
        room = self._settings.queue_events // (1 if is_reserved else _RESERVED)
        if len(self._queue) >= room:
            self._lost += 1
            self.lost_total += 1
            return False
        event = AuditEvent(
            actor=actor,
            action=action.value,
            target=target,
            allowed=allowed,
            auth_subject=subject,
            reason=reason_with_facts(reason, facts) or None,
        )
        self._queue.append(_Waiting(int(self._clock() * 1000), event, on_written))
        self._wake_up.set()
        return True

    def record_refusal(
        self,
        action: AuditAction,
        target: str,
        *,
        source: str,
        status: int,
        reason: str,
        subject: str = "",
        rule: str = "",
        count: int = 1,
        **facts: Fact,
    ) -> None:
        """Record what can be caused without end: the first of a source and reason at once, further
        ones as one entry per ``repeat_interval_s`` with their count.
        """
        if not self.is_enabled:
            return
        kind = RefusalKind(source, status, reason, subject, rule)
        told = self._tally.add(kind, target, self._clock(), count)
        if told is None:
            return
        if count > 1:
            facts["count"] = count
        self._record_refused(action, target, told, facts, is_reserved=False)

    def _record_refused(
        self,
        action: AuditAction,
        target: str,
        kind: RefusalKind,
        facts: dict[str, Any],
        *,
        is_reserved: bool,
    ) -> None:
        self.record(
            action,
            target,
            actor=kind.source or ACTOR,
            allowed=False,
            subject=kind.subject or None,
            reason=kind.reason,
            is_reserved=is_reserved,
            **{**facts, "status": kind.status, **({"rule": kind.rule} if kind.rule else {})},
        )

    def _record_repeated(self, *, everything: bool = False) -> None:
        """Their number has a bound, so they may take what room there is."""
        now = self._clock()
        due = self._tally.take_due(now, everything=everything)
        while self.has_room and (each := next(due, None)) is not None:
            action = _REFUSAL_ACTIONS.get(each.kind.status, AuditAction.TUNNEL_DENIED)
            seconds = round(max(0.0, now - each.since))
            facts = {"count": each.count, "seconds": seconds}
            self._record_refused(action, each.target, each.kind, facts, is_reserved=True)

    def metrics(self) -> AuditMetrics | None:
        """For ``/metrics``; None: there is no log."""
        if not self.is_enabled:
            return None
        log, shipper = self._log, self._shipper
        entries = log.seq if log is not None else 0
        shipping = None
        if shipper is not None:
            oldest_ms = shipper.oldest_ms
            behind_s = self._clock() - oldest_ms / 1000 if oldest_ms is not None else 0.0
            shipping = ShippingMetrics(
                backlog=max(0, entries - shipper.position),
                behind_s=max(0.0, behind_s),
                failures=shipper.failures_total,
                last_success=shipper.last_success,
            )
        return AuditMetrics(
            is_writable=not self.problem,
            entries=entries,
            waiting=len(self._queue),
            lost=self.lost_total,
            failures=self._failures,
            last_write=self._written_at,
            shipping=shipping,
        )

    def facts(self) -> dict[str, Any]:
        """For operators."""
        log, shipper = self._log, self._shipper
        return {
            "path": str(self._settings.path) if self.is_enabled else None,
            "entries": log.seq if log is not None else None,
            "waiting": len(self._queue),
            "lost": self.lost_total,
            "problem": self.problem or None,
            "shipped": shipper.position if shipper is not None else None,
            "ship_problem": (shipper.problem or None) if shipper is not None else None,
        }

    # writing

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._is_closing and not self._queue):
            if not self._queue:
                self._wake_up.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_MAINTENANCE_INTERVAL_S):
                        await self._wake_up.wait()
            self._record_repeated()
            batch = list(islice(self._queue, _BATCH_EVENTS))
            lost = self._lost
            try:
                told, warning = await loop.run_in_executor(self._executor, self._write, batch, lost)
            except (AuditError, OSError) as error:
                self._fail(_reason(error))
                if self._is_closing:
                    return
                await asyncio.sleep(_RETRY_S)
                continue
            self._lost -= lost
            for waiting in batch:
                self._queue.popleft()
                if waiting.on_written is not None:
                    waiting.on_written()
            if warning:
                self._fail(warning)
            elif self.problem:
                _log.info("the audit log is written again", count=len(self._queue))
                self.problem = ""
            if told:
                self._written_at = self._clock()
                self._ship_wake_up.set()

    def _write(self, batch: Sequence[_Waiting], lost: int) -> tuple[bool, str]:
        """In the writer's thread. All of the batch is written, or it raises; whether there was
        anything to write, and what else went wrong, is returned.
        """
        if self._log is None:
            self._log = self._opened()
        log = self._log
        events = [(waiting.unix_ms, waiting.event) for waiting in batch]
        if lost:
            reason = reason_with_facts("events that found no room", {"count": lost})
            told = AuditEvent(
                ACTOR, AuditAction.AUDIT_LOST.value, str(log.path), False, None, reason
            )
            events.insert(0, (int(self._clock() * 1000), told))
        if events:
            try:
                log.append(events)
            except AuditError:
                # somebody else changed the file: look at it anew before anything is written
                self._release()
                raise
        try:
            log.maintain()
            retired = log.retire()
        except (OSError, AuditError) as error:
            return bool(events), _reason(error)
        return bool(events or retired), ""

    def _release(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()

    def _fail(self, problem: str) -> None:
        self._failures += 1
        if problem != self.problem:
            _log.error("the audit log cannot be written", reason=problem)
        self.problem = problem

    async def _ship_all(self) -> None:
        options, path = self._settings.collector, self._settings.path
        assert options is not None
        assert path is not None
        async with Collector(options) as collector:
            self._shipper = AuditShipper(
                path,
                collector,
                batch_size=options.batch_size,
                checkpoints=self._settings.options.checkpoints or checkpoint_path(path),
            )
            await self._shipper.run(self._ship_wake_up)

    async def close(self) -> None:
        """Write what waits, within two seconds, and give the log back."""
        self._record_repeated(everything=True)
        self._is_closing = True
        self._wake_up.set()
        if self.tasks:
            writing, *others = self.tasks
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.wait({writing}, timeout=_CLOSE_DEADLINE_S)
            if not writing.done():
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
        if self._queue:
            _log.error("audit events are lost", count=len(self._queue), reason=self.problem)
        if self._executor is not None:
            # the log is this thread's
            await asyncio.wait(
                {asyncio.get_running_loop().run_in_executor(self._executor, self._release)},
                timeout=_CLOSE_DEADLINE_S,
            )
            self._executor.shutdown(wait=False)
        else:
            self._release()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)
