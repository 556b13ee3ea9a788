"""What grants are held to, and how workers share it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from toppy.config.policy import PolicyRule
from toppy.config.rates import RatesSection
from toppy.control.generation import Worker
from toppy.control.rates import Rates
from toppy.model.grant import Denial, Grant
from toppy.model.rate import UNLIMITED, Budget, DirectionLimits, Rate
from toppy.wire.ipc_message import BudgetUse, Usage

MIB = 1 << 20
DAY_S = 86_400
NOON = 20_000 * DAY_S + DAY_S / 2
"""Unix time, UTC."""
GRANT = Grant(("192.0.2.53",), 53, "alice", "web", 1)
BOBS = replace(GRANT, subject="bob")
ELSEWHERE = replace(GRANT, rule="mail")


class FakeWorker:
    """A worker of which only its being one matters."""


def worker() -> Worker:
    return cast(Worker, FakeWorker())


def made(rule: dict[str, Any] | None = None, attempts: int = 0, **rates: int) -> Rates:
    found = Rates()
    configure(found, rule, attempts, **rates)
    return found


def configure(
    rates: Rates, rule: dict[str, Any] | None = None, attempts: int = 0, **section: int
) -> None:
    web: dict[str, Any] = {"name": "web", "action": "allow", "limits": rule}
    rules = [PolicyRule.model_validate(each) for each in (web, {"name": "mail", "action": "allow"})]
    rates.configure(RatesSection.model_validate(section), rules, attempts)


def admit(
    rates: Rates,
    at: Worker,
    grant: Grant = GRANT,
    *,
    now: float = 0.0,
    unix_now: float = NOON,
    protocol: str = "udp",
) -> Grant | Denial:
    decided = rates.admit(at, grant, protocol, now, unix_now)
    if isinstance(decided, Grant):
        rates.sent(at, decided, is_renewal=False)
    return decided


def granted(rates: Rates, at: Worker, grant: Grant = GRANT, **options: Any) -> Grant:
    decided = admit(rates, at, grant, **options)
    assert isinstance(decided, Grant)
    return decided


def denied(rates: Rates, at: Worker, grant: Grant = GRANT, **options: Any) -> Denial:
    decided = admit(rates, at, grant, **options)
    assert isinstance(decided, Denial)
    return decided


def use(
    budget: Budget, tunnels: int = 1, *, used: int = 0, there: int = 0, back: int = 0
) -> BudgetUse:
    return BudgetUse(budget.name, tunnels, used, there, back, 0, 0)


def per_s(budget: Budget) -> tuple[int, int]:
    return budget.to_target.bytes.per_s, budget.to_client.bytes.per_s


# what a grant says


def test_without_limits_a_grant_has_none() -> None:
    rates = made()
    assert granted(rates, worker()) is GRANT


def test_a_tunnel_is_held_to_the_rate_of_its_protocol() -> None:
    rates = made(udp_bytes_per_sec=1000, tcp_bytes_per_sec=5000, tcp_burst_bytes=9000)
    at = worker()
    assert granted(rates, at).limits.each == DirectionLimits(bytes=Rate(1000, 1000))
    tcp = granted(rates, at, protocol="tcp")
    assert tcp.limits.each == DirectionLimits(bytes=Rate(5000, 9000))


def test_one_worker_has_the_whole_of_every_budget() -> None:
    rates = made({"bytes_per_sec": 1000, "datagrams_per_sec": 50}, subject_bytes_per_sec=700)
    of_subject, of_rule = granted(rates, worker()).limits.budgets
    assert of_subject.to_target == DirectionLimits(Rate(700, 700), UNLIMITED)
    assert of_rule.to_target == of_rule.to_client == DirectionLimits(Rate(1000, 1000), Rate(50, 50))
    assert of_rule.quota_left is None


def test_budgets_are_the_same_for_all_whom_they_concern_and_for_nobody_else() -> None:
    rates = made({"bytes_per_sec": 1000}, subject_bytes_per_sec=700)
    at = worker()
    names = [
        [budget.name for budget in granted(rates, at, grant).limits.budgets]
        for grant in (GRANT, BOBS, ELSEWHERE)
    ]
    (alice, web), (bob, webs), (alices,) = names
    assert alice == alices
    assert web == webs
    assert len({alice, bob, web}) == 3


# several workers


def test_a_newcomer_gets_an_equal_part_and_the_others_less() -> None:
    rates = made({"bytes_per_sec": 1000})
    first, second = worker(), worker()
    assert per_s(granted(rates, first).limits.budgets[0]) == (1000, 1000)
    assert per_s(granted(rates, second).limits.budgets[0]) == (500, 500)
    told = rates.rebalance(1.0, NOON)
    assert [per_s(budget) for budget in told[first]] == [(500, 500)]


def test_parts_follow_what_each_worker_is_asked_for_in_each_direction() -> None:
    rates = made({"bytes_per_sec": 10 * MIB})
    first, second = worker(), worker()
    (budget,) = granted(rates, first).limits.budgets
    granted(rates, second)
    told: dict[Worker, list[Budget]] = {}
    for _ in range(20):
        rates.receive(first, Usage(1, (use(budget, there=100 * MIB),)), NOON)
        rates.receive(second, Usage(1, (use(budget, back=100 * MIB),)), NOON)
        told |= rates.rebalance(1.0, NOON)
    (of_first,), (of_second,) = told[first], told[second]
    there, back = zip(per_s(of_first), per_s(of_second), strict=True)
    assert there[0] > 0.95 * 10 * MIB > 0.05 * 10 * MIB > there[1]
    assert back[1] > 0.95 * 10 * MIB > 0.05 * 10 * MIB > back[0]


def test_parts_never_add_up_to_more_than_there_is() -> None:
    rates = made({"bytes_per_sec": 1000})
    workers = [worker() for _ in range(7)]
    budgets = {each: granted(rates, each).limits.budgets[0] for each in workers}
    for turn in range(30):
        for place, each in enumerate(workers):
            wanted = turn * 7919 * (place + 1) % 3000
            rates.receive(each, Usage(1, (use(budgets[each], there=wanted),)), NOON)
        for each, changed in rates.rebalance(1.0, NOON).items():
            (budgets[each],) = changed
        assert sum(per_s(budget)[0] for budget in budgets.values()) <= 1000


def test_a_datagram_fits_into_every_part_of_a_burst() -> None:
    rates = made({"bytes_per_sec": 100_000, "datagrams_per_sec": 100})
    workers = [worker() for _ in range(10)]
    budgets = [granted(rates, each).limits.budgets[0] for each in workers]
    assert min(budget.to_target.bytes.burst for budget in budgets) >= 65_536
    assert min(budget.to_target.datagrams.burst for budget in budgets) >= 10


def test_what_a_worker_had_is_the_others_when_it_ends() -> None:
    rates = made({"bytes_per_sec": 1000})
    first, second = worker(), worker()
    granted(rates, first)
    granted(rates, second)
    rates.rebalance(1.0, NOON)
    rates.forget(second)
    told = rates.rebalance(1.0, NOON)
    assert [per_s(budget) for budget in told[first]] == [(1000, 1000)]
    assert second not in told


def test_a_worker_without_tunnels_has_no_part() -> None:
    rates = made({"bytes_per_sec": 1000})
    first, second = worker(), worker()
    (budget,) = granted(rates, first).limits.budgets
    granted(rates, second)
    rates.receive(second, Usage(1, (use(budget, tunnels=0),)), NOON)
    told = rates.rebalance(1.0, NOON)
    assert told == {}  # as before: the first has all of it
    assert per_s(granted(rates, first).limits.budgets[0]) == (1000, 1000)


def test_a_worker_that_could_not_be_told_is_told_again() -> None:
    rates = made({"bytes_per_sec": 1000})
    first = worker()
    granted(rates, first)
    granted(rates, worker())
    told = rates.rebalance(1.0, NOON)[first]
    assert first not in rates.rebalance(1.0, NOON)
    rates.unheard(first, told)
    assert rates.rebalance(1.0, NOON)[first] == told


# numbers of tunnels


def test_a_rule_that_has_its_tunnels_allows_no_other() -> None:
    rates = made({"tunnels": 2})
    first, second = worker(), worker()
    granted(rates, first)
    granted(rates, second, BOBS)
    refused = denied(rates, first, BOBS)
    assert (refused.status, refused.rule, refused.subject) == (429, "web", "bob")
    assert refused.retry_after_s == 1
    granted(rates, first, ELSEWHERE)


def test_a_subject_that_has_its_tunnels_gets_no_other_of_this_rule() -> None:
    rates = made({"tunnels_per_subject": 1})
    at = worker()
    granted(rates, at)
    assert denied(rates, at).details.startswith("1 tunnels of one subject are open")
    granted(rates, at, BOBS)


def test_tunnels_count_once_whether_their_worker_has_told_of_them_or_not() -> None:
    rates = made({"tunnels": 3})
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    granted(rates, at)
    # the word of a worker that had heard of the first alone
    rates.receive(at, Usage(1, (use(budget, tunnels=1),)), NOON)
    granted(rates, at)
    denied(rates, at)
    rates.receive(at, Usage(3, (use(budget, tunnels=3),)), NOON)
    denied(rates, at)
    rates.receive(at, Usage(3, (use(budget, tunnels=2),)), NOON)
    granted(rates, at)
    denied(rates, at)


def test_a_grant_that_its_worker_has_ignored_takes_no_place() -> None:
    rates = made({"tunnels": 1})
    at = worker()
    granted(rates, at)
    rates.receive(at, Usage(1, ()), NOON)
    granted(rates, at)


def test_a_renewal_takes_no_place_and_is_no_attempt() -> None:
    rates = made({"tunnels": 1}, attempts=1)
    at = worker()
    opened = granted(rates, at)
    for _ in range(10):
        renewed = rates.renew(at, GRANT, "udp", NOON)
        rates.sent(at, renewed, is_renewal=True)
        assert renewed.limits.budgets[0].name == opened.limits.budgets[0].name
    rates.receive(at, Usage(11, (use(opened.limits.budgets[0]),)), NOON)
    assert denied(rates, at, now=60.0).status == 429


def test_a_worker_that_ended_leaves_no_tunnel_behind() -> None:
    rates = made({"tunnels": 1})
    at = worker()
    granted(rates, at)
    rates.forget(at)
    granted(rates, worker())


# attempts


def test_a_subject_that_opens_too_many_tunnels_at_once_is_told_to_wait() -> None:
    rates = made(attempts=5)
    at = worker()
    for _ in range(10):
        granted(rates, at)
    refused = denied(rates, at)
    assert (refused.status, refused.retry_after_s) == (429, 1)
    granted(rates, at, BOBS)
    granted(rates, at, now=1.0)


# quotas


def quota_rates(period_s: int = DAY_S) -> Rates:
    return made({"quota_bytes": 10 * MIB, "quota_period_s": period_s})


def test_a_quota_is_each_subjects_and_counts_at_all_workers() -> None:
    rates = quota_rates()
    first, second = worker(), worker()
    (budget,) = granted(rates, first).limits.budgets
    assert budget.quota_left == 10 * MIB
    granted(rates, second)
    granted(rates, second, BOBS)
    for each in (first, second):
        rates.receive(each, Usage(9, (use(budget, used=4 * MIB),)), NOON)
    assert rates.used_up(NOON) == {}
    told = rates.rebalance(1.0, NOON)
    assert [budget.quota_left for budget in told[first]] == [2 * MIB]
    rates.receive(first, Usage(9, (use(budget, used=2 * MIB),)), NOON)
    ((key, denial),) = rates.used_up(NOON).items()
    assert key == ("web", "alice")
    assert denial.details == (
        "the quota of 10485760 bytes is used up; a new period begins in 43200 s"
    )
    assert denied(rates, first).retry_after_s == DAY_S / 2
    granted(rates, first, BOBS)


def test_a_new_period_begins_with_the_whole_quota() -> None:
    rates = quota_rates()
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    rates.receive(at, Usage(1, (use(budget, used=10 * MIB),)), NOON)
    rates.rebalance(1.0, NOON)
    assert denied(rates, at).status == 429
    tomorrow = NOON + DAY_S
    assert rates.used_up(tomorrow) == {}
    (told,) = rates.rebalance(1.0, tomorrow)[at]
    assert told.quota_left == 10 * MIB
    granted(rates, at, unix_now=tomorrow)


def test_a_worker_that_is_alone_counts_its_quota_itself() -> None:
    rates = quota_rates()
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    rates.rebalance(1.0, NOON)
    rates.receive(at, Usage(1, (use(budget, used=MIB),)), NOON)
    assert rates.rebalance(1.0, NOON) == {}
    granted(rates, worker())
    assert rates.rebalance(1.0, NOON) == {}  # what each has left is the same
    rates.receive(at, Usage(1, (use(budget, used=MIB),)), NOON)
    told = rates.rebalance(1.0, NOON)
    assert {budget.quota_left for changed in told.values() for budget in changed} == {8 * MIB}


def test_a_quota_of_a_subject_without_tunnels_ends_nothing() -> None:
    rates = quota_rates()
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    rates.receive(at, Usage(1, (use(budget, 0, used=10 * MIB),)), NOON)
    assert rates.used_up(NOON) == {}


def test_what_was_used_is_known_to_the_next_control_plane() -> None:
    rates = quota_rates()
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    rates.receive(at, Usage(1, (use(budget, used=9 * MIB),)), NOON)
    later = quota_rates()
    later.restore(rates.quotas())
    assert granted(later, worker()).limits.budgets[0].quota_left == MIB


def test_a_larger_quota_lets_a_subject_go_on() -> None:
    rates = quota_rates()
    at = worker()
    (budget,) = granted(rates, at).limits.budgets
    rates.receive(at, Usage(1, (use(budget, used=10 * MIB),)), NOON)
    denied(rates, at)
    configure(rates, {"quota_bytes": 20 * MIB})
    granted(rates, at)


# changes


@pytest.mark.parametrize(
    ("rule", "section", "is_change"),
    [
        ({"tunnels": 1}, {}, False),
        ({"tunnels": 2}, {}, True),
        (None, {}, True),
        ({"tunnels": 1}, {"udp_bytes_per_sec": 5}, True),
    ],
)
def test_other_limits_are_another_revision(
    rule: dict[str, Any] | None, section: dict[str, int], is_change: bool
) -> None:
    rates = made({"tunnels": 1})
    before = rates.revision
    configure(rates, rule, **section)
    assert (rates.revision > before) is is_change
