"""Rates while the gateway runs: workers are told, quotas end tunnels, and nothing is forgotten."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.control.stage import GRANT, Run, Stage, live_tunnel, question, settle, until
from toppy.config.policy import PolicyRule
from toppy.config.rates import RatesSection
from toppy.control.rate_keeper import RateKeeper
from toppy.control.rates import Rates
from toppy.control.tunnel_audit import TunnelAudit
from toppy.model.rate import Budget
from toppy.wire.ipc_message import (
    Admitted,
    BudgetUse,
    CloseTunnels,
    ListTunnels,
    Ready,
    SetBudgets,
    TunnelPage,
    Usage,
)

MIB = 1 << 20
ALICES = replace(GRANT, subject="alice")


def keeping(stage: Stage, **limits: int) -> asyncio.Task[None]:
    rule = {"name": "dns", "action": "allow", "limits": limits}
    stage.supervisor.rates.configure(
        RatesSection.model_validate({}), [PolicyRule.model_validate(rule)], 0
    )
    stage.admission.decision = ALICES
    return asyncio.create_task(keeper(stage).run())


def keeper(stage: Stage) -> RateKeeper:
    audit = TunnelAudit(stage.audit)
    return RateKeeper(stage.supervisor, stage.supervisor.rates, audit, stage.directory)


async def admitted(stage: Stage, slot: int = 0, number: int = 1) -> Admitted:
    before = len(stage.sent(Admitted))
    stage.say(question(number), slot)
    await until(lambda: len(stage.sent(Admitted)) > before)
    return stage.sent(Admitted)[-1][1]


async def granted(stage: Stage, slot: int = 0) -> Budget:
    """The one budget of a new tunnel."""
    grant = (await admitted(stage, slot)).grant
    assert grant is not None
    (budget,) = grant.limits.budgets
    return budget


def use(budget: Budget, *, tunnels: int = 1, used: int = 0, wanted: int = 0) -> Usage:
    return Usage(1, (BudgetUse(budget.name, tunnels, used, wanted, 0, 0, 0),))


def test_a_grant_carries_its_limits_and_a_rule_with_enough_tunnels_gives_no_other(
    run: Run,
) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, bytes_per_sec=1000, tunnels=1)
        budget = await granted(stage)
        assert budget.to_target.bytes.per_s == 1000
        denial = (await admitted(stage, 0, 2)).denial
        assert denial is not None
        assert (denial.status, denial.rule) == (429, "dns")
        task.cancel()

    run(scenario)


def test_workers_that_share_a_budget_are_told_their_parts(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, bytes_per_sec=1000)
        await granted(stage, 0)
        await granted(stage, 1)
        await stage.pass_time(1.1)
        ((peer, told),) = stage.sent(SetBudgets)
        assert peer == stage.peer(0)
        assert [budget.to_target.bytes.per_s for budget in told.budgets] == [500]
        task.cancel()

    run(scenario, serve=(0, 1))


def test_a_worker_that_does_not_hear_is_told_again(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, bytes_per_sec=1000)
        await granted(stage, 0)
        await granted(stage, 1)
        stage.server.is_full = True
        await stage.pass_time(1.1)
        assert stage.sent(SetBudgets) == []
        stage.server.is_full = False
        await stage.pass_time(1.1)
        assert stage.sent(SetBudgets)
        task.cancel()

    run(scenario, serve=(0, 1))


def test_a_worker_that_ends_leaves_its_part_to_the_others(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, bytes_per_sec=1000)
        await granted(stage, 0)
        await granted(stage, 1)
        await stage.pass_time(1.1)
        first = stage.peer(0)
        stage.process(1).end(-9)
        await stage.pass_time(1.1)
        peer, told = stage.sent(SetBudgets)[-1]
        assert peer == first
        assert [budget.to_target.bytes.per_s for budget in told.budgets] == [1000]
        task.cancel()

    run(scenario, serve=(0, 1))


def test_workers_of_older_code_are_not_spoken_to_in_words_they_do_not_know(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.start(0, 1)
        for slot in (0, 1):
            stage.greet(slot)
            stage.say(Ready("native"), slot)
        task = keeping(stage, bytes_per_sec=1000)
        await granted(stage, 0)
        await granted(stage, 1)
        await stage.pass_time(2.1)
        assert stage.sent(SetBudgets) == []
        task.cancel()

    run(scenario, serve=())


def test_a_quota_that_is_used_up_ends_the_subjects_tunnels_of_the_rule(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, quota_bytes=MIB)
        budget = await granted(stage)
        stage.say(use(budget, used=MIB))
        await until(lambda: stage.sent(Admitted))
        await stage.pass_time(1.1)
        ((_, asked),) = stage.sent(ListTunnels)
        tunnels = (live_tunnel(7), msgspec.structs.replace(live_tunnel(8), subject="bob"))
        stage.say(TunnelPage(asked.request, tunnels, True))
        await until(lambda: stage.sent(CloseTunnels))
        ((_, closing),) = stage.sent(CloseTunnels)
        assert closing.tunnels == ((7, 0),)
        assert closing.denial.rule == "dns"
        assert "used up" in closing.denial.details
        denial = (await admitted(stage, 0, 2)).denial
        assert denial is not None
        assert denial.status == 429
        task.cancel()

    run(scenario)


def test_what_was_used_is_known_to_the_next_control_plane(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        task = keeping(stage, quota_bytes=10 * MIB)
        budget = await granted(stage)
        stage.say(use(budget, used=4 * MIB))
        await settle()
        await stage.pass_time(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        later = Rates()
        RateKeeper(stage.supervisor, later, TunnelAudit(stage.audit), stage.directory)
        assert later.quotas() == stage.supervisor.rates.quotas() != {}
        assert (stage.directory / "quotas").stat().st_mode & 0o777 == 0o600

    run(scenario)


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x81\xa1x\x05"])
def test_a_file_that_is_damaged_is_no_reason_not_to_start(
    run: Run, tmp_path: Path, content: bytes
) -> None:
    async def scenario(stage: Stage) -> None:
        (stage.directory / "quotas").write_bytes(content)
        later = Rates()
        RateKeeper(stage.supervisor, later, TunnelAudit(stage.audit), stage.directory)
        assert later.quotas() == {}

    run(scenario)
