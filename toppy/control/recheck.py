"""Applies the policy that holds now to the tunnels that are open.

A worker that does not answer is asked again and again: a change of policy is through only when
every worker has said what it has open, or has ended.
"""

from __future__ import annotations

import asyncio
import time
from weakref import WeakKeyDictionary

from toppy.control import operators
from toppy.control.admission import Admission
from toppy.control.generation import Worker
from toppy.control.live_lists import Listed
from toppy.control.rates import FIRST_REVISION
from toppy.control.supervisor import Supervisor
from toppy.control.tunnel_audit import TunnelAudit
from toppy.observe.log import get_logger
from toppy.wire.ipc_message import LiveTunnel, SetLimits, TunnelChange, pages

_PAUSE_S = 0.5
_PATIENCE_S = 30.0
"""A worker that says nothing at all is replaced after 10 s; one that reports and does not answer,
after this."""
_TUNNELS_AT_ONCE = 100
_WATCH_INTERVAL_S = 0.5
"""Rules' times are looked at so often, not slept for: clocks are set, and hosts suspended."""

_log = get_logger("control")


class Recheck:
    """One run at a time; who asks meanwhile gets the next one, together with all who do."""

    def __init__(self, supervisor: Supervisor, audit: TunnelAudit) -> None:
        self._supervisor = supervisor
        self._audit = audit
        self._running: asyncio.Task[list[str]] | None = None
        self._next: asyncio.Task[list[str]] | None = None
        self._pursuits: dict[Worker, asyncio.Task[None]] = {}
        self._rates_told: WeakKeyDictionary[Worker, int] = WeakKeyDictionary()
        """Which revision of the rates a worker's live tunnels are held to."""

    async def apply(self) -> list[str]:
        """Cut what is denied. The names of workers that have not answered; they are asked on."""
        if self._next is not None:
            run = self._next
        elif self._running is not None and not self._running.done():
            run = self._next = asyncio.create_task(self._run_after(self._running))
        else:
            run = self._running = asyncio.create_task(self._run())
        return await asyncio.shield(run)

    async def watch(self) -> None:
        """Until cancelled: apply the policy whenever a rule's time begins or ends."""
        before: tuple[Admission, tuple[bool, ...]] | None = None
        while True:
            admission = self._supervisor.admission
            now = admission, admission.open_windows()
            # also with another policy: its times may have changed since it was applied
            if before is not None and now != before and now[1]:
                await self.apply()
            before = now
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def stop(self) -> None:
        """The gateway stops, or leaves its workers to another control plane."""
        tasks = [task for task in (self._running, self._next, *self._pursuits.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_after(self, earlier: asyncio.Task[list[str]]) -> list[str]:
        await asyncio.wait({earlier})
        self._running, self._next = self._next, None
        return await self._run()

    async def _run(self) -> list[str]:
        listed = await self._supervisor.lists.tunnels(with_authorization=True)
        unconfirmed = {*listed.silent, *await self._cut_denied(listed)}
        for worker in unconfirmed:
            if worker not in self._pursuits:
                _log.warning(
                    "worker has not confirmed the policy, it is asked on", slot=worker.slot
                )
                self._pursuits[worker] = asyncio.create_task(self._pursue(worker))
        return sorted(f"s{worker.slot}" for worker in unconfirmed)

    async def _cut_denied(self, listed: Listed[LiveTunnel]) -> set[Worker]:
        """Workers that will not hear of it."""
        supervisor = self._supervisor
        deaf = set()
        revision = supervisor.rates.revision
        limited: dict[Worker, list[TunnelChange]] = {}
        for index, (worker, tunnel) in enumerate(listed.found):
            denial = supervisor.admission.recheck(tunnel)
            if denial is not None:
                _log.info(
                    "tunnel cut: the policy denies it now",
                    tunnel=operators.tunnel_name(worker, tunnel),
                    subject=tunnel.subject,
                    rule=denial.rule,
                    reason=denial.details,
                )
                self._audit.revoked(worker, tunnel, denial)
                if not supervisor.close_tunnels(worker, [tunnel], denial):
                    deaf.add(worker)
            elif revision > self._rates_told.get(worker, _told_at_birth(worker)):
                limited.setdefault(worker, []).append(self._change(worker, tunnel))
            if index % _TUNNELS_AT_ONCE == _TUNNELS_AT_ONCE - 1:
                await asyncio.sleep(0)
        for worker, changes in limited.items():
            if not all(supervisor.tell(worker, SetLimits(page)) for page, _ in pages(changes)):
                deaf.add(worker)
        for worker in {worker for worker, _ in listed.found} - deaf - set(listed.silent):
            self._rates_told[worker] = revision
        return deaf

    def _change(self, worker: Worker, tunnel: LiveTunnel) -> TunnelChange:
        """What a live tunnel is held to from now on."""
        supervisor = self._supervisor
        rule = supervisor.admission.rule_of(tunnel)
        return TunnelChange(
            tunnel.connection,
            tunnel.quarter_stream_id,
            rule,
            supervisor.rates.limits_of(worker, tunnel.subject, rule, tunnel.protocol, time.time()),
        )

    async def _pursue(self, worker: Worker) -> None:
        supervisor = self._supervisor
        end = time.monotonic() + _PATIENCE_S
        try:
            while supervisor.workers.get(worker.slot) is worker:
                if time.monotonic() > end:
                    _log.error("worker does not confirm the policy, it is ended", slot=worker.slot)
                    worker.process.kill()
                    return
                await asyncio.sleep(_PAUSE_S)
                listed = await supervisor.lists.tunnels(with_authorization=True, of=worker)
                if not await self._cut_denied(listed) and not listed.silent:
                    break
            _log.info("worker has confirmed the policy, or has ended", slot=worker.slot)
        finally:
            del self._pursuits[worker]


def _told_at_birth(worker: Worker) -> int:
    """The earliest revision of its grants; of a worker that was taken over nothing is known."""
    return FIRST_REVISION if worker.line is None else 0
