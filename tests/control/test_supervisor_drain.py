"""The supervisor: workers that drain or are adopted, and what is asked of all of them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.control.stage import (
    FakeProcess,
    Run,
    Stage,
    live_tunnel,
    saved_generation,
    saved_worker,
    settings_for,
    settle,
    until,
)
from toppy.control import found_workers
from toppy.control.found_workers import find_saved_worker
from toppy.control.generation import GenerationState
from toppy.control.live_lists import Listed
from toppy.control.saved_state import SavedGeneration, SavedWorker
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial
from toppy.protocol.worker_lifecycle import WorkerState
from toppy.wire.ipc_message import (
    CloseTunnels,
    ConnectionPage,
    Drain,
    Hello,
    ListConnections,
    ListTunnels,
    LiveConnection,
    LiveTunnel,
    Owners,
    Ready,
    TunnelPage,
)

# draining


def test_an_earlier_generation_drains_when_the_next_one_is_active(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(2, 3)
        assert first.state is GenerationState.DRAINING
        assert stage.supervisor.drain_generation(first, 30.0) == [0, 1]
        assert stage.sent(Drain) == [(stage.peer(slot), Drain(30.0)) for slot in range(2)]
        assert stage.worker(0).state is WorkerState.DRAINING
        assert stage.processes[0].signals == []

    run(scenario, serve=(0, 1))


def test_packets_of_a_draining_workers_connections_still_reach_it(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(1)
        stage.supervisor.drain_generation(first, 0.0)
        stage.supervisor.steer_if_possible()
        assert (stage.listeners.active, stage.listeners.live) == ([1], [0, 1])
        stage.process(0).end(0)
        await until(lambda: stage.listeners.live == [1])

    run(scenario)


def test_a_drained_worker_is_not_replaced_and_not_counted_as_dead(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(1)
        stage.supervisor.drain_generation(first, 0.0)
        stage.report(WorkerCounters(pings=2, connections_open=1), 0)
        stage.process(0).end(0)
        await settle()
        await stage.pass_time(20.0)
        assert len(stage.processes) == 2
        assert stage.supervisor.deaths == 0
        assert list(stage.supervisor.generations) == [2]
        assert stage.supervisor.free_slots() == [0, 2, 3]
        assert stage.statistics.total() == WorkerCounters(pings=2)

    run(scenario, slots=4)


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, 1])
def test_a_draining_worker_that_is_killed_is_counted_and_not_replaced(run: Run, code: int) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(1)
        stage.supervisor.drain_generation(first, 0.0)
        stage.process(0).end(code)
        await stage.pass_time(20.0)
        assert stage.supervisor.deaths == 1
        assert len(stage.processes) == 2

    run(scenario)


def test_a_draining_worker_that_says_nothing_is_ended(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        hanging = stage.process(0)
        stage.serve(1)
        stage.supervisor.drain_generation(first, 0.0)
        for _ in range(40):
            stage.report(WorkerCounters(), 1)
            await asyncio.sleep(0.5)
        assert hanging.signals == [signal.SIGKILL]
        assert list(stage.supervisor.generations) == [2]

    run(scenario)


def test_one_worker_that_drains_leaves_new_connections_to_the_others(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        assert stage.supervisor.drain_worker(stage.worker(0), 5.0)
        stage.supervisor.steer_if_possible()
        assert (stage.listeners.active, stage.listeners.live) == ([1], [0, 1])
        stage.process(0).end(0)
        await stage.pass_time(20.0)
        assert len(stage.processes) == 2
        assert list(stage.supervisor.generations) == [1]

    run(scenario, serve=(0, 1))


def test_a_worker_that_does_not_serve_yet_cannot_drain_and_is_ended(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.start(1)
        stage.greet(1)
        process = stage.process(1)
        assert not stage.supervisor.drain_worker(stage.worker(1), 5.0)
        assert process.signals == [signal.SIGKILL]

    run(scenario)


def test_several_generations_drain_beside_each_other(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        for slot in range(1, 4):
            before = stage.supervisor.active
            stage.serve(slot)
            assert before is not None
            stage.supervisor.drain_generation(before, 0.0)
        states = {g.number: g.state for g in stage.supervisor.generations.values()}
        assert states == {
            1: GenerationState.DRAINING,
            2: GenerationState.DRAINING,
            3: GenerationState.DRAINING,
            4: GenerationState.ACTIVE,
        }
        assert stage.supervisor.free_slots() == []
        stage.supervisor.slot_freed.clear()
        stage.process(1).end(0)
        await stage.supervisor.slot_freed.wait()
        assert stage.supervisor.free_slots() == [1]

    run(scenario, slots=4)


# adoption


class Left:
    """What an earlier control plane left: generation 2 in slots 2 and 3 serves, generation 1 in
    slots 0 and 1 drains.
    """

    def __init__(self, *slots: int) -> None:
        self.slots = slots
        self.processes: dict[int, FakeProcess] = {}

    def begin(self, stage: Stage) -> None:
        self.processes = {slot: FakeProcess(is_child=False) for slot in self.slots}
        stage.supervisor.adopt(
            [
                saved_worker(slot, 1 + slot // 2, process, place=slot % 2)
                for slot, process in self.processes.items()
            ],
            [saved_generation(1, 0, 1, is_draining=True), saved_generation(2, 2, 3, revision=7)],
            2,
            settings_for,
        )

    def come_back(self, stage: Stage, slot: int, *, is_draining: bool = False) -> None:
        """A worker that has been taken over introduces itself."""
        worker = stage.worker(slot)
        hello = Hello(slot, worker.generation.number, worker.process.pid, f"secret of s{slot}")
        stage.say(hello, slot)
        stage.say(Ready("native", is_draining), slot)


def test_adopted_workers_go_on_and_none_is_started(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        for slot in (2, 3):
            left.come_back(stage, slot)
        assert stage.serving() == [2, 3]
        assert stage.processes == []
        assert stage.supervisor.active is stage.supervisor.generations[2]
        assert stage.supervisor.active.revision == 7
        assert (stage.listeners.active, stage.listeners.live) == ([2, 3], [2, 3])
        assert all(process.signals == [] for process in left.processes.values())

    run(scenario, begin=left.begin)


def test_the_active_generations_missing_worker_is_started(run: Run) -> None:
    left = Left(2)

    async def scenario(stage: Stage) -> None:
        (started,) = stage.processes
        assert started.settings is not None
        assert (started.settings.slot, started.settings.generation) == (3, 2)
        assert started.settings.read == (1,), "it has the place that it had"

    run(scenario, begin=left.begin)


def test_a_draining_generations_missing_worker_is_not_started(run: Run) -> None:
    left = Left(0, 2, 3)

    async def scenario(stage: Stage) -> None:
        assert stage.processes == []
        assert sorted(stage.supervisor.workers) == [0, 2, 3]

    run(scenario, begin=left.begin)


def test_a_generation_of_which_nothing_is_left_is_retired(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        assert list(stage.supervisor.generations) == [2]

    run(scenario, begin=left.begin)


def test_the_next_generation_after_an_adoption_has_the_next_number(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        assert stage.start(0, 1).number == 3

    run(scenario, begin=left.begin)


def test_what_drained_before_the_adoption_stays_draining(run: Run) -> None:
    left = Left(0, 1, 2, 3)

    async def scenario(stage: Stage) -> None:
        for slot in (2, 3):
            left.come_back(stage, slot)
        left.come_back(stage, 0, is_draining=True)
        assert stage.worker(0).state is WorkerState.DRAINING
        assert stage.sent(Drain) == [], "it would begin its time anew"
        assert stage.listeners.active == [2, 3]
        left.processes[0].end(0)
        await until(lambda: 0 not in stage.supervisor.workers)
        await settle()
        assert stage.processes == []
        assert stage.supervisor.deaths == 0

    run(scenario, begin=left.begin)


def test_a_worker_that_was_not_told_to_drain_before_the_adoption_is_told_after_it(
    run: Run,
) -> None:
    left = Left(0, 2, 3)

    async def scenario(stage: Stage) -> None:
        left.come_back(stage, 0)
        assert stage.sent(Drain) == [(stage.peer(0), Drain(0.0))]
        assert stage.worker(0).state is WorkerState.DRAINING

    run(scenario, begin=left.begin)


def test_a_worker_of_the_active_generation_that_drained_alone_stays_draining(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        left.come_back(stage, 2)
        left.come_back(stage, 3, is_draining=True)
        assert stage.listeners.active == [2]
        left.processes[3].end(0)
        await stage.pass_time(5.0)
        assert stage.processes == [], "what drained alone is not replaced"

    run(scenario, begin=left.begin)


def test_an_adopted_worker_that_dies_is_replaced(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        for slot in (2, 3):
            left.come_back(stage, slot)
        left.processes[2].end(-9)
        await stage.pass_time(1.0)
        (started,) = stage.processes
        assert started.settings is not None
        assert started.settings.slot == 2
        assert stage.supervisor.deaths == 1

    run(scenario, begin=left.begin)


def test_an_adopted_worker_that_never_speaks_is_ended_and_replaced(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        left.come_back(stage, 2)
        await stage.pass_time(16.0)
        assert left.processes[3].signals == [signal.SIGKILL]
        assert left.processes[2].signals == []
        assert [p.settings.slot for p in stage.processes if p.settings] == [3]

    run(scenario, begin=left.begin)


def test_only_the_saved_secret_speaks_for_an_adopted_worker(run: Run) -> None:
    left = Left(2, 3)

    async def scenario(stage: Stage) -> None:
        stage.server.hear(b"stranger", Hello(2, 2, left.processes[2].pid, "secret of s3"))
        assert stage.worker(2).state is WorkerState.SPAWNED

    run(scenario, begin=left.begin)


def test_what_is_saved_is_what_can_be_adopted(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        first = stage.supervisor.generations[1]
        stage.serve(3, 2, revision=4)
        stage.supervisor.drain_generation(first, 0.0)
        assert stage.supervisor.saved_generations() == (
            SavedGeneration(1, 1, (0, 1), True, 1000.0),
            SavedGeneration(2, 4, (3, 2), False, 1000.0),
        )
        saved = {worker.slot: worker for worker in stage.supervisor.saved_workers()}
        assert {slot: (w.generation, w.place) for slot, w in saved.items()} == {
            0: (1, 0),
            1: (1, 1),
            3: (2, 0),
            2: (2, 1),
        }
        for slot, worker in saved.items():
            process = stage.process(slot)
            assert (worker.pid, worker.started) == (process.pid, process.started)
            assert worker.secret == stage.worker(slot).secret

    run(scenario, serve=(0, 1))


def test_a_worker_that_has_ended_is_not_saved(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.process(0).end(-9)
        assert [worker.slot for worker in stage.supervisor.saved_workers()] == [1]

    run(scenario, serve=(0, 1))


def test_every_change_of_workers_is_there_for_a_next_control_plane(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        async def expect_change() -> None:
            await stage.pass_time(1.0)
            assert stage.changes, "nobody was told"
            stage.changes = 0

        first = stage.supervisor.generations[1]
        await expect_change()
        generation = stage.start(1)
        await expect_change()
        stage.process(0).end(-9)  # and another one takes its place
        await expect_change()
        stage.bring_up(0, 1)
        stage.changes = 0
        stage.supervisor.activate(generation)
        await expect_change()
        stage.supervisor.drain_generation(first, 0.0)
        stage.process(0).end(0)
        await expect_change()

    run(scenario)


def test_a_saved_worker_that_is_gone_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_workers, "adopt", lambda _pid, _started: None)
    known = SavedWorker(0, 1, 0, pid=1, started=2, since=0.0, secret="s")
    assert find_saved_worker(known, "/nowhere") is None


def test_a_saved_worker_that_does_not_answer_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        process = FakeProcess(is_child=False)
        monkeypatch.setattr(found_workers, "adopt", lambda _pid, _started: process)
        known = SavedWorker(0, 1, 0, pid=1, started=2, since=0.0, secret="s")
        assert find_saved_worker(known, str(tmp_path)) is None
        assert process.signals == [signal.SIGKILL]

    asyncio.run(scenario())


# what is open


def listing(stage: Stage) -> asyncio.Task[list[tuple[int, LiveTunnel]]]:
    async def ask() -> list[tuple[int, LiveTunnel]]:
        return [(w.slot, tunnel) for w, tunnel in (await stage.supervisor.lists.tunnels()).found]

    return asyncio.create_task(ask())


def test_live_tunnels_are_collected_page_by_page_from_every_worker(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        found = listing(stage)
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        (number,) = {asked.request for _, asked in stage.sent(ListTunnels)}
        stage.say(TunnelPage(number, (live_tunnel(1), live_tunnel(2)), False), 0)
        stage.say(TunnelPage(number, (live_tunnel(9),), True), 1)
        await settle()
        assert not found.done()
        stage.say(TunnelPage(number, (live_tunnel(3),), True), 0)
        assert sorted((slot, tunnel.connection) for slot, tunnel in await found) == [
            (0, 1),
            (0, 2),
            (0, 3),
            (1, 9),
        ]

    run(scenario, serve=(0, 1))


def test_workers_that_drain_are_asked_for_their_tunnels_too(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.supervisor.drain_worker(stage.worker(0), 0.0)
        stage.start(2)  # it does not serve yet, so it has none
        listing(stage)
        await until(lambda: stage.sent(ListTunnels))
        assert {peer for peer, _ in stage.sent(ListTunnels)} == {stage.peer(0), stage.peer(1)}

    run(scenario, serve=(0, 1))


def test_a_worker_that_dies_meanwhile_is_left_out_of_the_list(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = listing(stage)
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        number = stage.sent(ListTunnels)[0][1].request
        stage.say(TunnelPage(number, (live_tunnel(1),), True), 0)
        stage.process(1).end(-9)
        assert [slot for slot, _ in await found] == [0]
        assert loop.time() == began, "nobody waited for it"

    run(scenario, serve=(0, 1))


def test_a_worker_that_does_not_answer_in_time_is_left_out_of_the_list(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        found = listing(stage)
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        number = stage.sent(ListTunnels)[0][1].request
        stage.say(TunnelPage(number, (live_tunnel(1),), True), 0)
        await stage.pass_time(6.0)
        assert [slot for slot, _ in await found] == [0]
        stage.say(TunnelPage(number, (live_tunnel(7),), True), 1)  # too late: nobody listens

    run(scenario, serve=(0, 1))


def test_a_page_that_nobody_asked_for_is_ignored(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(TunnelPage(99, (live_tunnel(1),), True))
        found = listing(stage)
        await until(lambda: stage.sent(ListTunnels))
        number = stage.sent(ListTunnels)[0][1].request
        stage.say(TunnelPage(number + 1, (live_tunnel(1),), True))
        stage.say(TunnelPage(number, (), True))
        stage.say(TunnelPage(number, (live_tunnel(2),), True))  # after its last page
        assert await found == []

    run(scenario)


def test_lists_beside_each_other_are_not_mixed_up(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        one, other = listing(stage), listing(stage)
        await until(lambda: len(stage.sent(ListTunnels)) == 2)
        numbers = [asked.request for _, asked in stage.sent(ListTunnels)]
        for number in reversed(numbers):
            stage.say(TunnelPage(number, (live_tunnel(number),), True))
        assert [[t.connection for _, t in await found] for found in (one, other)] == [
            [numbers[0]],
            [numbers[1]],
        ]

    run(scenario)


def test_credentials_are_asked_for_only_where_they_are_needed(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        for is_needed in (False, True):
            asking = asyncio.create_task(
                stage.supervisor.lists.tunnels(with_authorization=is_needed)
            )
            await until(lambda: stage.sent(ListTunnels))
            asked = stage.sent(ListTunnels)[0][1]
            assert asked.with_authorization is is_needed
            stage.say(TunnelPage(asked.request, (), True))
            await asking
            stage.server.sent.clear()

    run(scenario)


def test_without_a_worker_there_is_nothing_to_list(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        assert await stage.supervisor.lists.tunnels() == Listed([])
        assert await stage.supervisor.lists.connections() == Listed([])

    run(scenario, serve=())


def test_live_connections_are_collected(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        asking = asyncio.create_task(stage.supervisor.lists.connections())
        await until(lambda: stage.sent(ListConnections))
        number = stage.sent(ListConnections)[0][1].request
        open_one = LiveConnection(1, "192.0.2.1:9", "h3", 2, 0.0, 0.01)
        stage.say(ConnectionPage(number, (open_one,), True))
        assert [(worker.slot, found) for worker, found in (await asking).found] == [(0, open_one)]

    run(scenario)


def test_a_live_tunnel_is_ended_where_it_is(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        denial = Denial(403, "connection_terminated", "kicked")
        stage.supervisor.close_tunnels(stage.worker(1), [live_tunnel(4, 2)], denial)
        assert stage.sent(CloseTunnels) == [(stage.peer(1), CloseTunnels(((4, 2),), denial))]

    run(scenario, serve=(0, 1))


def test_owners_say_which_generation_each_live_worker_is_of(run: Run) -> None:
    async def scenario(stage: Stage) -> None:
        stage.serve(1)
        stage.server.sent.clear()
        stage.process(0).end(-9)
        await until(lambda: stage.sent(Owners))
        assert stage.sent(Owners)[-1] == (stage.peer(1), Owners((1,), {1: 2}))

    run(scenario)
