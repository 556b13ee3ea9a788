"""kill -9, while datagrams pass. How long the gap was is printed (``-s``) and written beside the
gateway's files as ``gaps.json``; nothing is asserted about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.load import RunningLoad
from integration.masque_client import ask, connected, connected_engine, open_tunnel, run
from integration.operation import (
    SLOW_RATE,
    change_config,
    echo_on_new_connection,
    gateway_log,
    generations,
    is_gone,
    loads_the_machine,
    operate,
    operate_meanwhile,
    try_operation,
    under_load,
    wait_for_generations,
    worker_pids,
)
from integration.processes import (
    BIN,
    Gateway,
    Running,
    free_udp_port,
    running_gateway,
    start,
    wait_until,
)
from toppy.control.saved_state import read_state
from toppy.ipc.takeover_channel import take_over
from toppy.ipc.worker_sockets import takeover_path


def record(directory: Path, what: str, **figures: Any) -> None:
    print(what, figures)
    path = directory / "gaps.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {what: figures}, indent=2) + "\n")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until("its end", lambda: is_gone(pid))


def wait_for_echoes(load: RunningLoad, more: int) -> float:
    """Until ``more`` new ones have come back; the longest gap meanwhile, in milliseconds."""
    begin = load.report()
    gaps = [begin.gap_ms]

    def are_back() -> bool:
        report = load.report()
        gaps.append(report.gap_ms)
        return report.received >= begin.received + more

    wait_until("echoes", are_back)
    return max(gaps)


def kill_control_plane(gateway: Gateway) -> None:
    gateway.running.process.kill()
    gateway.running.process.wait()


Adopt = Callable[[Gateway], None]


@pytest.fixture
def adopt() -> Iterator[Adopt]:
    """Another ``toppy-gw run`` in the place of a killed one, as a service manager starts it."""
    started: list[Running] = []

    def start_next(gateway: Gateway) -> None:
        again = start(
            [BIN / "toppy-gw", "run", "--config", gateway.directory / "gateway.toml"],
            gateway.directory / f"again-{len(started)}.log",
        )
        started.append(again)
        again.wait_for_output("gateway serves")
        gateway.running = again

    yield start_next
    for running in started:
        running.stop()


def log_of_all(gateway: Gateway) -> list[dict[str, Any]]:
    """Of this control plane and those before it."""
    lines: list[dict[str, Any]] = []
    for path in (gateway.directory / "gateway.log", *gateway.directory.glob("again-*.log")):
        lines += gateway_log(replace(gateway, running=replace(gateway.running, log=path)))
    return lines


def workers_that_run(gateway: Gateway) -> set[int]:
    """Of all that were ever started."""
    started = {line["pid"] for line in log_of_all(gateway) if line["event"] == "worker started"}
    return {pid for pid in started if not is_gone(pid)}


# workers


@loads_the_machine
@pytest.mark.parametrize("engine", ENGINES)
def test_the_client_relays_again_soon_after_its_worker_was_killed(
    directory: Path, echo: Peer, engine: str
) -> None:
    with (
        running_gateway(directory, workers=2, engine=engine) as gateway,
        under_load(gateway, echo, engine=engine) as loaded,
    ):
        for deaths in (1, 2):
            (tunnel,) = gateway.ask("GET", "/tunnels")["tunnels"]
            name = tunnel["name"].partition("g")[0]
            before = worker_pids(gateway)
            loaded.load.report()
            kill(before[name])
            gap_ms = wait_for_echoes(loaded.load, 1000)
            wait_until("another worker", lambda: len(worker_pids(gateway)) == 2)
            after = worker_pids(gateway)
            assert [slot for slot in after if after[slot] != before[slot]] == [name]
            assert gateway.status()["worker_deaths"] == deaths
            events = {
                line["event"]: datetime.fromisoformat(line["time"])
                for line in gateway_log(gateway)
                if line.get("slot") == int(name[1:])
            }
            noticed, respawned = events["worker died"], events["worker started"]
            record(
                directory,
                f"kill -9 of a worker, {engine}, {deaths}",
                gap_ms=gap_ms,
                respawned_after_ms=(respawned - noticed).total_seconds() * 1000,
            )
        report = loaded.load.stop()
        record(directory, f"load around them, {engine}", sent=report.sent, lost=report.lost)
        # what was under way when the worker died is lost; what came back came once and in order
        assert report.duplicated == report.reordered == 0
        assert 0 < report.received < report.sent


def test_a_worker_that_keeps_dying_does_not_harm_the_others(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, workers=2) as gateway:

        async def scenario() -> None:
            async with contextlib.AsyncExitStack() as stack:
                tunnels = []
                for _ in range(12):  # some on each worker
                    client = await stack.enter_async_context(connected(gateway, "stranger"))
                    tunnels.append(await open_tunnel(client, echo.host, echo.port))
                staying = {
                    each["source"]
                    for each in gateway.ask("GET", "/tunnels")["tunnels"]
                    if each["name"].startswith("s1")
                }
                assert 0 < len(staying) < 12
                for deaths in (1, 2, 3, 4):
                    await asyncio.to_thread(
                        wait_until, "a worker to kill", lambda: "s0" in worker_pids(gateway)
                    )
                    await asyncio.to_thread(kill, worker_pids(gateway)["s0"])
                    await asyncio.to_thread(
                        wait_until,
                        "its count",
                        lambda: gateway.status()["worker_deaths"] == deaths,  # noqa: B023
                    )
                    answered = 0
                    for tunnel in tunnels:
                        source = tunnel.client._transport.get_extra_info("sockname")  # type: ignore[attr-defined]
                        if f"{source[0]}:{source[1]}" in staying:
                            await tunnel.echo(b"still here")
                            answered += 1
                    assert answered == len(staying)
            for _ in range(4):
                await echo_on_new_connection(gateway, echo)

        run(scenario())
        assert gateway.healthz().status_code == 200


# the control plane

ORPHANS = "[reload]\norphan_timeout_s = 40\n"
"""A test that fails leaves nothing running for long."""


@loads_the_machine
def test_nothing_is_lost_when_the_control_plane_is_killed_and_another_adopts_its_workers(
    directory: Path, echo: Peer, adopt: Adopt
) -> None:
    with (
        running_gateway(directory, workers=2, extra=ORPHANS) as gateway,
        under_load(gateway, echo) as loaded,
    ):
        workers, since = worker_pids(gateway), gateway.status()["since"]

        async def scenario() -> None:
            async with connected_engine(gateway) as client, connected(gateway, "stranger") as other:
                tunnels = [
                    await open_tunnel(each, echo.host, echo.port) for each in (client, other)
                ]
                kill_control_plane(gateway)
                # what is open goes on, and what is asked for waits
                for tunnel in tunnels:
                    await tunnel.echo(b"without a control plane")
                waiting = [ask(each, echo.host, echo.port) for each in (client, other)]
                async with connected_engine(gateway) as newcomer:
                    waiting.append(ask(newcomer, echo.host, echo.port))
                    await asyncio.to_thread(wait_for_echoes, loaded.load, 1000)
                    asked = await asyncio.to_thread(try_operation, gateway, "status")
                    assert asked.returncode == 1
                    assert "no gateway answers" in asked.stderr
                    answers = [asyncio.ensure_future(each.answer()) for each in waiting]
                    await asyncio.sleep(0)
                    assert not any(answer.done() for answer in answers)
                    await asyncio.to_thread(adopt, gateway)
                    for answer in answers:
                        assert (await answer).status == 200
                    for tunnel in (*tunnels, *waiting):
                        await tunnel.echo(b"with another control plane")

        run(scenario())
        status = gateway.status()
        assert worker_pids(gateway) == workers
        assert status["pid"] == gateway.running.pid
        assert status["since"] == since
        assert status["worker_deaths"] == 0
        # it can do everything that the first could
        assert operate(gateway, "reload")["generation"] == 2
        assert run(echo_on_new_connection(gateway, echo)) == 2
        wait_for_generations(gateway, {2: "active"})
        report = loaded.assert_whole()
        record(directory, "kill -9 of the control plane", gap_ms=report.gap_ms)
        wait_for_metric(gateway, report.sent, "datagrams_total", direction="to_target")
        assert workers_that_run(gateway) == set(worker_pids(gateway).values())
        gateway.running.stop()
        assert workers_that_run(gateway) == set()


def test_a_generation_that_drains_is_adopted_too(directory: Path, echo: Peer, adopt: Adopt) -> None:
    with running_gateway(directory, extra=ORPHANS) as gateway:

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await operate_meanwhile(gateway, "reload")
                before = worker_pids(gateway)
                assert generations(gateway) == {1: "draining", 2: "active"}
                kill_control_plane(gateway)
                await tunnel.echo(b"without a control plane")
                await asyncio.to_thread(adopt, gateway)
                assert worker_pids(gateway) == before
                assert generations(gateway) == {1: "draining", 2: "active"}
                await tunnel.echo(b"with another control plane")
                assert await echo_on_new_connection(gateway, echo) == 2
            await asyncio.to_thread(wait_for_generations, gateway, {2: "active"})

        run(scenario())
        assert gateway.status()["worker_deaths"] == 0


@loads_the_machine
def test_a_worker_that_dies_without_a_control_plane_is_replaced_by_the_next_one(
    directory: Path, echo: Peer, adopt: Adopt
) -> None:
    with (
        running_gateway(directory, workers=2, extra=ORPHANS) as gateway,
        under_load(gateway, echo, rate=SLOW_RATE) as loaded,
    ):
        before = worker_pids(gateway)
        (tunnel,) = gateway.ask("GET", "/tunnels")["tunnels"]
        name = tunnel["name"].partition("g")[0]
        kill_control_plane(gateway)
        loaded.load.report()
        kill(before[name])
        adopt(gateway)
        gap_ms = wait_for_echoes(loaded.load, 1000)
        record(directory, "kill -9 of the control plane, then of a worker", gap_ms=gap_ms)
        wait_until("two workers", lambda: len(worker_pids(gateway)) == 2)
        after = worker_pids(gateway)
        assert [slot for slot in after if after[slot] != before[slot]] == [name]
        report = loaded.load.stop()
        assert report.duplicated == report.reordered == 0
        assert workers_that_run(gateway) == set(worker_pids(gateway).values())


@loads_the_machine
@pytest.mark.parametrize("event", ["worker started", "worker serves", "generation serves"])
def test_a_control_plane_that_is_killed_during_a_reload_leaves_no_stray_worker(
    directory: Path, echo: Peer, adopt: Adopt, event: str
) -> None:
    with (
        running_gateway(directory, workers=2, extra=ORPHANS) as gateway,
        under_load(gateway, echo) as loaded,
    ):
        reloading = subprocess.Popen(
            [BIN / "toppy-gw", "reload", "--config", directory / "gateway.toml"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(
            event,
            lambda: any(
                line["event"] == event and line["generation"] == 2 for line in gateway_log(gateway)
            ),
        )
        kill_control_plane(gateway)
        assert reloading.wait(20) in {0, 1}
        adopt(gateway)
        active = gateway.status()["generation"]
        assert active in {1, 2}
        wait_for_generations(gateway, {active: "active"})
        assert run(echo_on_new_connection(gateway, echo)) == active
        assert operate(gateway, "reload")["generation"] > active
        newest = gateway.status()["generation"]
        wait_for_generations(gateway, {newest: "active"})
        loaded.assert_whole()
        assert workers_that_run(gateway) == set(worker_pids(gateway).values())


def test_a_control_plane_that_is_killed_while_its_sockets_become_more_is_followed_by_another(
    directory: Path, echo: Peer, adopt: Adopt
) -> None:
    with running_gateway(directory, workers=2, extra=ORPHANS) as gateway:
        before = worker_pids(gateway)

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                change_config(gateway, "workers = 2", "workers = 4")
                os.kill(gateway.running.pid, signal.SIGHUP)
                await asyncio.to_thread(
                    wait_until,
                    "a worker of the next generation",
                    lambda: any(
                        line["event"] == "worker started" and line["generation"] == 2
                        for line in gateway_log(gateway)
                    ),
                )
                kill_control_plane(gateway)
                await tunnel.echo(b"without a control plane")
                await asyncio.to_thread(adopt, gateway)
                await tunnel.echo(b"with another control plane")

        run(scenario())
        # what it was told in vain is what the next one reads
        wait_until("a reload", lambda: gateway.status()["last_reload"] is not None)
        active = gateway.status()["generation"]
        assert up_workers(gateway, active) == 4
        assert run(echo_on_new_connection(gateway, echo)) == active > 1
        wait_for_generations(gateway, {active: "active"})
        assert workers_that_run(gateway) == set(worker_pids(gateway).values())
        assert not set(before.values()) & workers_that_run(gateway)


def up_workers(gateway: Gateway, generation: int) -> int:
    workers = gateway.status()["workers"]
    return sum(w["generation"] == generation and w["state"] == "serving" for w in workers)


def test_what_changed_meanwhile_is_applied_to_the_workers_that_are_taken_over(
    directory: Path, echo: Peer, adopt: Adopt
) -> None:
    with running_gateway(directory, workers=1, extra=ORPHANS) as gateway:

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                kill_control_plane(gateway)
                change_config(gateway, "workers = 1", "workers = 2")
                change_config(gateway, f"127.0.0.1:{gateway.port}", f"127.0.0.1:{free_udp_port()}")
                await asyncio.to_thread(adopt, gateway)
                await asyncio.to_thread(
                    wait_until, "a reload", lambda: gateway.status()["last_reload"] is not None
                )
                await tunnel.echo(b"still there")
                assert generations(gateway) == {1: "draining", 2: "active"}
                assert await echo_on_new_connection(gateway, echo) == 2

        run(scenario())
        status = gateway.status()
        assert status["last_reload"]["ok"]
        assert up_workers(gateway, 2) == 2
        # the running workers cannot listen elsewhere: that takes a restart
        assert status["listen"] == [f"127.0.0.1:{gateway.port}"]
        warned = "listen.quic changed: applies at the next restart"
        assert any(line.get("warning") == warned for line in gateway_log(gateway))
        assert warned in operate(gateway, "reload")["warnings"]


def test_starts_that_fail_do_not_keep_workers_that_nobody_follows(directory: Path) -> None:
    extra = "[reload]\norphan_timeout_s = 3\n"
    with running_gateway(directory, extra=extra) as gateway:
        state = read_state(directory / "run")
        assert state is not None
        (worker,) = state.workers
        kill_control_plane(gateway)
        end = time.monotonic() + 8

        def is_left_alone() -> bool:
            assert time.monotonic() < end
            with contextlib.suppress(OSError):
                path = takeover_path(str(directory / "run"), worker.slot)
                line, descriptors = take_over(path, worker.secret)
                line.close()
                for descriptor in descriptors:
                    os.close(descriptor)
            time.sleep(0.3)
            return is_gone(worker.pid)

        wait_until("the worker's end", is_left_alone)


@loads_the_machine
def test_a_control_plane_that_stands_still_stops_no_datagram(directory: Path, echo: Peer) -> None:
    with (
        running_gateway(directory, workers=2) as gateway,
        under_load(gateway, echo) as loaded,
    ):

        async def scenario() -> None:
            os.kill(gateway.running.pid, signal.SIGSTOP)
            try:
                async with connected_engine(gateway) as client:
                    waiting = ask(client, echo.host, echo.port)
                    await asyncio.to_thread(wait_for_echoes, loaded.load, 5000)
                    os.kill(gateway.running.pid, signal.SIGCONT)
                    assert (await waiting.answer()).status == 200
            finally:
                os.kill(gateway.running.pid, signal.SIGCONT)

        run(scenario())
        loaded.assert_whole()
        assert gateway.status()["worker_deaths"] == 0


def test_workers_of_a_control_plane_whose_state_is_damaged_are_ended_by_the_next_one(
    directory: Path, echo: Peer, adopt: Adopt
) -> None:
    with running_gateway(directory, workers=2, extra=ORPHANS) as gateway:
        workers = set(worker_pids(gateway).values())

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                kill_control_plane(gateway)
                state = directory / "run" / "state"
                state.write_bytes(state.read_bytes()[:100])
                await asyncio.to_thread(adopt, gateway)
                # its client is told, and need not find out by itself
                async with asyncio.timeout(5):
                    await tunnel.has_ended.wait()

        run(scenario())
        assert all(map(is_gone, workers))
        ended = {
            line["pid"]
            for line in log_of_all(gateway)
            if line["event"] == "a worker that nobody could take over was ended"
        }
        assert ended == workers
        assert run(echo_on_new_connection(gateway, echo)) == 1
        assert operate(gateway, "reload")["generation"] == 2
        gateway.running.stop()
        assert workers_that_run(gateway) == set()


def test_workers_that_no_control_plane_can_find_end(directory: Path) -> None:
    with running_gateway(directory, workers=2, extra=ORPHANS) as gateway:
        workers = set(worker_pids(gateway).values())
        kill_control_plane(gateway)
        shutil.rmtree(directory / "run")
        wait_until("the workers' end", lambda: all(map(is_gone, workers)))
