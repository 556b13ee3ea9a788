"""Keeps rates and quotas true while the gateway runs: once a second, and across control planes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from toppy.control import operators
from toppy.control.rates import Rates
from toppy.control.supervisor import Supervisor
from toppy.control.tunnel_audit import TunnelAudit
from toppy.model.grant import Denial
from toppy.observe.log import get_logger
from toppy.wire.ipc_message import SetBudgets, pages

_INTERVAL_S = 1.0
_SAVE_INTERVAL_S = 5.0
_FILE = "quotas"
_MAX_BYTES = 64 << 20
_Quotas = dict[str, tuple[int, int]]

_log = get_logger("control")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Quotas)


class RateKeeper:
    """Divides budgets among the workers, ends tunnels whose quota is used up, and remembers in the
    runtime directory what was used.
    """

    def __init__(
        self, supervisor: Supervisor, rates: Rates, audit: TunnelAudit, runtime_dir: Path
    ) -> None:
        self._supervisor = supervisor
        self._rates = rates
        self._audit = audit
        self._path = runtime_dir / _FILE
        self._saved: Mapping[str, tuple[int, int]] = {}
        self._load()

    async def run(self) -> None:
        """Until cancelled."""
        before, saved_at = time.monotonic(), 0.0
        try:
            while True:
                await asyncio.sleep(_INTERVAL_S)
                now = time.monotonic()
                self._rebalance(now - before)
                before = now
                used_up = self._rates.used_up(time.time())
                if used_up:
                    await self._end(used_up)
                if now - saved_at >= _SAVE_INTERVAL_S:
                    self._save()
                    saved_at = now
        finally:
            self._save()

    def _rebalance(self, elapsed_s: float) -> None:
        for worker, budgets in self._rates.rebalance(elapsed_s, time.time()).items():
            for page, _ in pages(budgets):
                if not self._supervisor.tell(worker, SetBudgets(page)):
                    self._rates.unheard(worker, page)

    async def _end(self, used_up: Mapping[tuple[str, str], Denial]) -> None:
        listed = await self._supervisor.lists.tunnels()
        for worker, tunnel in listed.found:
            denial = used_up.get((tunnel.rule, tunnel.subject))
            if denial is None:
                continue
            _log.info(
                "tunnel cut: the quota is used up",
                tunnel=operators.tunnel_name(worker, tunnel),
                subject=tunnel.subject,
                rule=denial.rule,
                reason=denial.details,
            )
            # a worker that does not hear it lets nothing through, and is asked again
            if self._supervisor.close_tunnels(worker, [tunnel], denial):
                self._audit.revoked(worker, tunnel, denial)

    # across control planes

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file:
                self._saved = _decoder.decode(file.read(_MAX_BYTES))
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _log.error("used quotas are forgotten, they cannot be read", reason=str(error))
            return
        self._rates.restore(self._saved)

    def _save(self) -> None:
        quotas = self._rates.quotas()
        if quotas == self._saved:
            return
        unfinished = self._path.with_suffix(".new")
        try:
            unfinished.unlink(missing_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encoder.encode(quotas))
            unfinished.rename(self._path)
        except OSError as error:
            _log.error("used quotas cannot be saved", reason=str(error))
            return
        self._saved = quotas
