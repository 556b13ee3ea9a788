"""What a worker's tunnels are held to, and what the control plane is told about that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from toppy.policy.meter import Meters
from toppy.wire.ipc_message import BudgetUse, SetBudgets, TunnelChange, Usage, pages
from toppy.worker.tunnel import Tunnel


class Metering:
    """Gives each tunnel its meter. ``tunnels`` are the router's own."""

    def __init__(self, tunnels: Mapping[tuple[int, int], Tunnel]) -> None:
        self._tunnels = tunnels
        self._meters = Meters()
        self._grants = 0
        self._told_grants = 0
        self._unsent: list[BudgetUse] = []

    def count_grant(self) -> None:
        """A grant has come, whatever becomes of it."""
        self._grants += 1

    def attach(self, tunnel: Tunnel, now: float) -> None:
        """A tunnel has a grant, or another one."""
        if tunnel.grant is not None:
            tunnel.meter = self._meters.attach(tunnel.key, tunnel.grant.limits, now)

    def detach(self, tunnel: Tunnel) -> None:
        """It is over."""
        self._meters.detach(tunnel.key)

    def set_budgets(self, message: SetBudgets, now: float) -> None:
        """The control plane's word about budgets that several workers share."""
        self._meters.change(message.budgets, now)

    def set_limits(self, changes: Iterable[TunnelChange], now: float) -> None:
        """Live tunnels go on under other limits."""
        for change in changes:
            tunnel = self._tunnels.get((change.connection, change.quarter_stream_id))
            if tunnel is not None and tunnel.grant is not None:
                tunnel.grant = replace(tunnel.grant, rule=change.rule, limits=change.limits)
                self.attach(tunnel, now)

    def send(self, send: Callable[[Usage], bool]) -> None:
        """Tell what is new; what the channel does not take is told the next time."""
        self._unsent += [
            BudgetUse(
                each.name,
                each.tunnels,
                each.used_bytes,
                each.to_target_bytes,
                each.to_client_bytes,
                each.to_target_datagrams,
                each.to_client_datagrams,
            )
            for each in self._meters.take_demands()
        ]
        if not self._unsent and self._told_grants == self._grants:
            return
        # a list that the channel does not take for long is no longer than the budgets are many
        uses, self._unsent = _joined(self._unsent), []
        is_taken = True
        for page, _ in pages(uses):
            is_taken = is_taken and send(Usage(self._grants, page))
            if not is_taken:
                self._unsent += page
        if is_taken:
            self._told_grants = self._grants

    def tell_again(self) -> None:
        """There is a new control plane: it has heard nothing, and has granted nothing yet."""
        self._grants = self._told_grants = 0
        self._meters.tell_again()


def _joined(uses: Iterable[BudgetUse]) -> list[BudgetUse]:
    """One for each budget: amounts add up, of the number of tunnels the newest counts."""
    joined: dict[str, BudgetUse] = {}
    for use in uses:
        before = joined.get(use.name)
        joined[use.name] = (
            use
            if before is None
            else BudgetUse(
                use.name,
                use.tunnels,
                before.used_bytes + use.used_bytes,
                before.to_target_bytes + use.to_target_bytes,
                before.to_client_bytes + use.to_client_bytes,
                before.to_target_datagrams + use.to_target_datagrams,
                before.to_client_datagrams + use.to_client_datagrams,
            )
        )
    return list(joined.values())
