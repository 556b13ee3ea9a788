"""What operators are told when workers do not answer."""

from __future__ import annotations

import asyncio

import pytest

from tests.control.stage import Run, Stage, live_tunnel, until
from toppy.control import operators
from toppy.control.admin import AdminError
from toppy.wire.ipc_message import CloseTunnels, ListTunnels, TunnelPage


def hear_tunnels(stage: Stage, *connections: int, slot: int = 0) -> None:
    (number,) = {asked.request for _, asked in stage.sent(ListTunnels)}
    tunnels = tuple(live_tunnel(connection) for connection in connections)
    stage.say(TunnelPage(number, tunnels, True), slot)


def test_a_kick_says_which_workers_did_not_answer(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        kicking = asyncio.create_task(operators.kick(stage.supervisor, "alice"))
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        hear_tunnels(stage, 4)
        await stage.pass_time(5.5)
        assert await kicking == {"closed": 1, "unanswered": ["s1"]}
        assert [peer for peer, _ in stage.sent(CloseTunnels)] == [stage.peer(0)]

    run(scenario, serve=(0, 1))


@pytest.mark.parametrize(("silent", "status"), [(True, 409), (False, 404)])
def test_a_kick_that_finds_nothing_says_whether_it_has_seen_everything(
    run: Run, silent: bool, status: int
) -> None:
    async def scenario(stage: Stage) -> None:
        kicking = asyncio.create_task(operators.kick(stage.supervisor, "bob"))
        await until(lambda: stage.sent(ListTunnels))
        if not silent:
            hear_tunnels(stage, 4)
        await stage.pass_time(5.5)
        with pytest.raises(AdminError) as refused:
            await kicking
        assert refused.value.status == status
        assert ("s0 did not answer" in str(refused.value)) is silent

    run(scenario)


def test_lists_say_whose_part_is_missing(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        listing = asyncio.create_task(operators.tunnels(stage.supervisor))
        connecting = asyncio.create_task(operators.connections(stage.supervisor))
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        hear_tunnels(stage, 4, slot=1)
        await stage.pass_time(5.5)
        found = await listing
        assert [tunnel["name"] for tunnel in found["tunnels"]] == ["s1g1c4t0"]
        assert found["unanswered"] == ["s0"]
        assert await connecting == {"unanswered": ["s0", "s1"], "connections": []}

    run(scenario, serve=(0, 1))


@pytest.mark.parametrize("timeout_s", [-1.0, 1e9, float("inf"), float("nan")])
def test_a_drain_has_a_time_that_makes_sense(run: Run, timeout_s: float) -> None:
    async def scenario(stage: Stage) -> None:
        with pytest.raises(AdminError, match="0 to 2592000 s") as refused:
            operators.drain(stage.supervisor, "s0", timeout_s)
        assert refused.value.status == 400

    run(scenario, serve=(0, 1))
