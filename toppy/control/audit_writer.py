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
from toppy.observe.audit_reader import checkpoint_path
from toppy.observe.audit_shipper import AuditShipper, Collector
from toppy.observe.log import get_logger
from toppy.wire.audit_entry import AuditError

ACTOR = "toppy-gw"
"""Of what the gateway does by itself."""
OPERATOR = "operator"
"""Whoever may use the admin socket: the gateway's user, or root."""
_BATCH_EVENTS = 1000
_RETRY_S = 1.0
_MAINTENANCE_INTERVAL_S = 1.0
_CLOSE_DEADLINE_S = 2.0
_RESERVED = 2
"""What strangers can cause (denials) gets one of so many parts of the queue and no more."""

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
            batch = list(islice(self._queue, _BATCH_EVENTS))
            lost = self._lost
            try:
                warning = await loop.run_in_executor(self._executor, self._write, batch, lost)
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
            if batch:
                self._ship_wake_up.set()

    def _write(self, batch: Sequence[_Waiting], lost: int) -> str:
        """In the writer's thread. All of the batch is written, or it raises; what else went wrong
        is returned.
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
        except OSError as error:
            return _reason(error)
        return ""

    def _release(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()

    def _fail(self, problem: str) -> None:
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
