"""What tunnels are held to: limits for grants, budgets among workers, numbers of tunnels, quotas.

No clock and no channel here: ``rate_keeper`` has them.

A budget (of a subject, of a rule, or of a subject under a rule) belongs to the gateway, and every
worker with a tunnel that names it has a part. With one worker that is all of it, and exact; with
several the parts follow once a second what each was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from toppy.config.policy import PolicyRule
from toppy.config.rates import NO_RULE_LIMITS, RatesSection, RuleLimits
from toppy.control.generation import Worker
from toppy.model.grant import Denial, Grant
from toppy.model.rate import (
    NO_LIMITS,
    NO_TUNNEL_LIMITS,
    UNLIMITED,
    Budget,
    DirectionLimits,
    Rate,
    TunnelLimits,
)
from toppy.policy.apportion import apportion
from toppy.policy.attempts import AttemptLimit
from toppy.wire.ipc_message import BudgetUse, Usage

_LEAST_BURST_BYTES = 65_536
_LEAST_BURST_DATAGRAMS = 64
"""A worker's part of a burst is no smaller, unless the burst is: a datagram must fit."""
SPENT_BYTES = 65_536
"""A quota with less left is used up: the next datagram may not fit."""
FIRST_REVISION = 1
_RETRY_AFTER_S = 1
_Key = tuple[str, str]
"""(rule, subject); the one or the other is empty for budgets of all rules or all subjects."""


@dataclass(slots=True)
class _Share:
    """A worker's part in a budget."""

    tunnels: int = 0
    """As the worker has told."""
    under_way: int = 0
    """Granted, and not among ``tunnels`` yet."""
    wanted: list[int] | None = None
    """A second's bytes to target and to client, and datagrams; None: not known yet."""
    since: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """The same, since it was last looked at."""
    told: Budget | None = None

    @property
    def is_used(self) -> bool:
        return self.tunnels + self.under_way > 0

    def look(self, elapsed_s: float) -> None:
        """Parts follow what was wanted lately, and not each pause."""
        now_wanted = [round(amount / elapsed_s) for amount in self.since]
        self.since = [0, 0, 0, 0]
        if self.wanted is None:
            self.wanted = now_wanted
        else:
            self.wanted = [
                (before + now) // 2 for before, now in zip(self.wanted, now_wanted, strict=True)
            ]


@dataclass(slots=True)
class _Quota:
    """What one subject has used under one rule, in one period."""

    period: int
    """Its number."""
    used: int = 0


class Rates:
    """``configure`` first; then every grant passes ``admit``."""

    def __init__(self) -> None:
        self._rates = RatesSection()
        self._rules: dict[str, RuleLimits] = {}
        self._attempts: AttemptLimit | None = None
        self._attempts_per_s = 0
        self._shares: dict[_Key, dict[Worker, _Share]] = {}
        self._grants: dict[Worker, _Grants] = {}
        self._quotas: dict[_Key, _Quota] = {}
        self._touched: set[_Key] = set()
        """Keys of budgets of which there is something new since they were divided."""
        self.revision = FIRST_REVISION - 1
        """Raised when limits of live tunnels may have changed."""

    def configure(
        self, rates: RatesSection, rules: Iterable[PolicyRule], tunnels_per_subject_per_s: int
    ) -> None:
        """These limits hold from now on."""
        found = {rule.name: rule.limits or NO_RULE_LIMITS for rule in rules}
        # order counts: it decides which rule allows what
        is_first = self.revision < FIRST_REVISION
        if is_first or rates != self._rates or list(found.items()) != list(self._rules.items()):
            self.revision += 1
        self._rates, self._rules = rates, found
        if tunnels_per_subject_per_s != self._attempts_per_s:
            per_s = self._attempts_per_s = tunnels_per_subject_per_s
            self._attempts = AttemptLimit(per_s, 2 * per_s) if per_s else None

    # admission

    def admit(
        self, worker: Worker, grant: Grant, protocol: str, now: float, unix_now: float
    ) -> Grant | Denial:
        """The grant with its limits, or why there may not be another tunnel now."""
        subject, rule = grant.subject, grant.rule
        if self._attempts is not None and not self._attempts.take(subject, now):
            return Denial(
                429,
                "connection_limit_reached",
                "too many tunnels were opened within a second",
                subject=subject,
                retry_after_s=_RETRY_AFTER_S,
            )
        limits = self._rules.get(rule, NO_RULE_LIMITS)
        denial = self._too_many(limits, rule, subject) or self._used_up(
            limits, rule, subject, unix_now
        )
        if denial is not None:
            return denial
        return self.renew(worker, grant, protocol, unix_now)

    def renew(self, worker: Worker, grant: Grant, protocol: str, unix_now: float) -> Grant:
        """The grant with its limits, for a tunnel that is open already."""
        limits = self.limits_of(worker, grant.subject, grant.rule, protocol, unix_now)
        return replace(grant, limits=limits) if limits != grant.limits else grant

    def sent(self, worker: Worker, grant: Grant, *, is_renewal: bool) -> None:
        """A grant is on its way to its worker, which counts it."""
        grants = self._grants.setdefault(worker, _Grants())
        keys = [] if is_renewal else [_key_of(budget.name) for budget in grant.limits.budgets]
        grants.sent += 1
        if keys:
            grants.under_way.append((grants.sent, keys))
            for key in keys:
                self._share(key, worker).under_way += 1

    def _too_many(self, limits: RuleLimits, rule: str, subject: str) -> Denial | None:
        for most, key, whose in (
            (limits.tunnels, (rule, ""), ""),
            (limits.tunnels_per_subject, (rule, subject), " of one subject"),
        ):
            if most and self.tunnels(key) >= most:
                return Denial(
                    429,
                    "connection_limit_reached",
                    f"{most} tunnels{whose} are open, as many as the rule allows",
                    rule,
                    subject,
                    _RETRY_AFTER_S,
                )
        return None

    def _used_up(
        self, limits: RuleLimits, rule: str, subject: str, unix_now: float
    ) -> Denial | None:
        left = self._quota_left(limits, rule, subject, unix_now)
        if left is None or left >= SPENT_BYTES:
            return None
        wait_s = limits.quota_period_s - int(unix_now) % limits.quota_period_s
        return Denial(
            429,
            "connection_limit_reached",
            f"the quota of {limits.quota_bytes} bytes is used up; a new period begins in "
            f"{wait_s} s",
            rule,
            subject,
            wait_s,
        )

    def tunnels(self, key: _Key) -> int:
        """How many there are, those under way included."""
        return sum(share.tunnels + share.under_way for share in self._shares.get(key, {}).values())

    # limits

    def limits_of(
        self, worker: Worker, subject: str, rule: str, protocol: str, unix_now: float
    ) -> TunnelLimits:
        """What a tunnel at ``worker`` is held to now."""
        rate = self._rates.tcp if protocol == "tcp" else self._rates.udp
        each = DirectionLimits(bytes=rate) if rate.is_limited else NO_LIMITS
        limits = self._rules.get(rule, NO_RULE_LIMITS)
        keys: list[_Key] = []
        if self._rates.subject.is_limited:
            keys.append(("", subject))
        if limits.rate.is_limited or limits.datagram_rate.is_limited or limits.tunnels:
            keys.append((rule, ""))
        if limits.tunnels_per_subject or limits.quota_bytes:
            keys.append((rule, subject))
        if not keys and each is NO_LIMITS:
            return NO_TUNNEL_LIMITS
        budgets = tuple(self._budget(key, worker, unix_now) for key in keys)
        return TunnelLimits(each, budgets)

    def _whole(self, key: _Key) -> DirectionLimits:
        """Of the whole gateway, in each direction."""
        rule, subject = key
        if not rule:
            return DirectionLimits(bytes=self._rates.subject)
        if subject:
            return NO_LIMITS
        limits = self._rules.get(rule, NO_RULE_LIMITS)
        return DirectionLimits(limits.rate, limits.datagram_rate)

    def _budget(self, key: _Key, worker: Worker, unix_now: float) -> Budget:
        """A worker's part, which is one of those that have tunnels from now on."""
        self._share(key, worker)
        budget = self._divide(key, unix_now)[worker]
        self._share(key, worker).told = budget
        return budget

    def _share(self, key: _Key, worker: Worker) -> _Share:
        shares = self._shares.setdefault(key, {})
        if worker not in shares:
            shares[worker] = _Share()
            self._touched.add(key)
        return shares[worker]

    def _divide(self, key: _Key, unix_now: float) -> dict[Worker, Budget]:
        """Every worker's part of a budget now."""
        shares = self._shares[key]
        whole = self._whole(key)
        rule, subject = key
        limits = self._rules.get(rule, NO_RULE_LIMITS)
        left = self._quota_left(limits, rule, subject, unix_now) if subject else None
        rates = (whole.bytes, whole.bytes, whole.datagrams, whole.datagrams)
        bursts = (_LEAST_BURST_BYTES,) * 2 + (_LEAST_BURST_DATAGRAMS,) * 2
        parts: list[list[Rate]] = []
        for number, (rate, least_burst) in enumerate(zip(rates, bursts, strict=True)):
            # of a newcomer it is not known what it will want: as much as any
            wanted = [
                share.wanted[number] if share.wanted is not None else rate.per_s
                for share in shares.values()
            ]
            parts.append(list(_parts(rate, wanted, least_burst)))
        name = _name_of(key)
        return {
            worker: Budget(
                name,
                DirectionLimits(parts[0][place], parts[2][place]),
                DirectionLimits(parts[1][place], parts[3][place]),
                left,
            )
            for place, worker in enumerate(shares)
        }

    # what workers say

    def receive(self, worker: Worker, usage: Usage, unix_now: float) -> None:
        """A worker's word about its budgets."""
        grants = self._grants.setdefault(worker, _Grants())
        while grants.under_way and grants.under_way[0][0] <= usage.grants:
            for key in grants.under_way.popleft()[1]:
                share = self._shares.get(key, {}).get(worker)
                if share is not None:
                    share.under_way -= 1
                    self._touched.add(key)
        for use in usage.budgets:
            key = _key_of(use.name)
            share = self._share(key, worker)
            self._touched.add(key)
            share.tunnels = use.tunnels
            for number, amount in enumerate(_wanted(use)):
                share.since[number] += amount
            limits = self._rules.get(key[0], NO_RULE_LIMITS)
            if key[0] and key[1] and limits.quota_bytes:
                self._quota(limits, *key, unix_now).used += use.used_bytes

    def forget(self, worker: Worker) -> None:
        """It has ended, and with it what it had."""
        self._grants.pop(worker, None)
        for key, shares in list(self._shares.items()):
            if shares.pop(worker, None) is not None:
                self._touched.add(key)

    # once a second

    def rebalance(self, elapsed_s: float, unix_now: float) -> dict[Worker, list[Budget]]:
        """Divide anew what several workers share, by what each was asked for in the last
        ``elapsed_s``; what workers must be told, and see ``unheard``.
        """
        changed: dict[Worker, list[Budget]] = {}
        touched, self._touched = self._touched, set()
        for key in touched:
            shares = self._shares.get(key, {})
            for worker, share in list(shares.items()):
                if share.is_used:
                    share.look(elapsed_s)
                else:
                    del shares[worker]
            if not shares:
                self._shares.pop(key, None)
                continue
            for worker, budget in self._divide(key, unix_now).items():
                told, shares[worker].told = shares[worker].told, budget
                if budget != told and not (len(shares) == 1 and _is_only_used(told, budget)):
                    changed.setdefault(worker, []).append(budget)
        return changed

    def unheard(self, worker: Worker, budgets: Iterable[Budget]) -> None:
        """A worker could not be told; it will be the next time."""
        for budget in budgets:
            key = _key_of(budget.name)
            share = self._shares.get(key, {}).get(worker)
            if share is not None:
                share.told = None
                self._touched.add(key)

    # quotas

    def used_up(self, unix_now: float) -> dict[tuple[str, str], Denial]:
        """By (rule, subject): quotas that are used up while there are tunnels, which must end."""
        found = {}
        for (rule, subject), quota in list(self._quotas.items()):
            limits = self._rules.get(rule, NO_RULE_LIMITS)
            if not limits.quota_bytes or quota.period != _period(limits, unix_now):
                del self._quotas[rule, subject]
                self._touched.add((rule, subject))
                continue
            denial = self._used_up(limits, rule, subject, unix_now)
            if denial is not None and self.tunnels((rule, subject)):
                found[rule, subject] = denial
        return found

    def quotas(self) -> dict[str, tuple[int, int]]:
        """What the next control plane must know: period and bytes used, by name."""
        return {_name_of(key): (each.period, each.used) for key, each in self._quotas.items()}

    def restore(self, quotas: Mapping[str, tuple[int, int]]) -> None:
        """What ``quotas`` of an earlier control plane has said."""
        for name, (period, used) in quotas.items():
            self._quotas[_key_of(name)] = _Quota(period, used)

    def _quota(self, limits: RuleLimits, rule: str, subject: str, unix_now: float) -> _Quota:
        period = _period(limits, unix_now)
        quota = self._quotas.get((rule, subject))
        if quota is None or quota.period != period:
            quota = self._quotas[rule, subject] = _Quota(period)
        return quota

    def _quota_left(
        self, limits: RuleLimits, rule: str, subject: str, unix_now: float
    ) -> int | None:
        """None: there is no quota. May be negative: several workers may have passed a bit more."""
        if not limits.quota_bytes:
            return None
        quota = self._quotas.get((rule, subject))
        if quota is None or quota.period != _period(limits, unix_now):
            return limits.quota_bytes
        return limits.quota_bytes - quota.used


class _Grants:
    """Of one worker."""

    def __init__(self) -> None:
        self.sent = 0
        self.under_way: deque[tuple[int, list[_Key]]] = deque()
        """Grants that it has not counted yet: the number of each, and what it names."""


def _is_only_used(told: Budget | None, budget: Budget) -> bool:
    """Whether nothing differs but that less of the quota is left. A worker that is alone with a
    budget knows that first, and better.
    """
    if told is None or told.quota_left is None or budget.quota_left is None:
        return False
    return budget.quota_left <= told.quota_left and budget == replace(
        told, quota_left=budget.quota_left
    )


def _period(limits: RuleLimits, unix_now: float) -> int:
    return int(unix_now) // limits.quota_period_s


def _parts(rate: Rate, wanted: list[int], least_burst: int) -> Iterator[Rate]:
    if not rate.is_limited:
        yield from (UNLIMITED for _ in wanted)
        return
    for part in apportion(rate.per_s, wanted):
        burst = rate.burst * part // rate.per_s
        yield Rate(part, max(1, burst, min(rate.burst, least_burst)))


def _wanted(use: BudgetUse) -> tuple[int, int, int, int]:
    return (
        use.to_target_bytes,
        use.to_client_bytes,
        use.to_target_datagrams,
        use.to_client_datagrams,
    )


def _name_of(key: _Key) -> str:
    # names of rules are printable
    return "\0".join(key)


def _key_of(name: str) -> _Key:
    rule, _, subject = name.partition("\0")
    return rule, subject
