"""Reloads, while real datagrams pass."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import threading
from pathlib import Path

import psutil
import pytest

from integration.conftest import ENGINES, Peer
from integration.load import running_load
from integration.masque_client import connected, connected_engine, open_tunnel, run
from integration.operation import (
    BEST_ENGINE,
    SLOW_RATE,
    change_config,
    echo_on_new_connection,
    gateway_log,
    generation_of,
    generations,
    loads_the_machine,
    operate,
    operate_meanwhile,
    runtime_files,
    try_operation,
    under_load,
    wait_for_generations,
    worker_pids,
)
from integration.peers import start_peer
from integration.processes import (
    Gateway,
    free_udp_port,
    running_gateway,
    running_udp_client,
    wait_until,
)

MANY_GENERATIONS = "[reload]\ngenerations = 8\n"


@loads_the_machine
@pytest.mark.parametrize("engine", ENGINES)
def test_five_reloads_back_to_back_lose_duplicate_and_reorder_nothing(
    directory: Path, echo: Peer, engine: str
) -> None:
    with (
        running_gateway(directory, workers=2, engine=engine, extra=MANY_GENERATIONS) as gateway,
        under_load(gateway, echo, engine=engine) as loaded,
    ):
        for generation in range(2, 7):
            assert operate(gateway, "reload")["generation"] == generation
            assert run(echo_on_new_connection(gateway, echo)) == generation
        # the loaded client has moved along, and nothing of the old generations is left
        wait_for_generations(gateway, {6: "active"})
        (tunnel,) = operate(gateway, "tunnels")["tunnels"]
        assert "g6c" in tunnel["name"]
        loaded.assert_whole()
        assert gateway.status()["drops"] == {}
        assert gateway.status()["worker_deaths"] == 0


@loads_the_machine
def test_a_reload_may_change_engine_and_number_of_workers_under_load(
    directory: Path, echo: Peer
) -> None:
    engines = (BEST_ENGINE, ENGINES[-1], BEST_ENGINE)
    with (
        running_gateway(directory, workers=1, engine=BEST_ENGINE) as gateway,
        under_load(gateway, echo, rate=SLOW_RATE) as loaded,
    ):
        for before, (generation, workers) in zip(engines, ((2, 3), (3, 2)), strict=False):
            engine = engines[generation - 1]
            now = gateway.status()["generations"][-1]["workers"]
            change_config(gateway, f"workers = {len(now)}", f"workers = {workers}")
            change_config(gateway, f'engine = "{before}"', f'engine = "{engine}"')
            assert operate(gateway, "reload")["warnings"] == []
            newest = [w for w in gateway.status()["workers"] if w["generation"] == generation]
            assert [w["engine"] for w in newest] == [engine] * workers
        wait_for_generations(gateway, {3: "active"})
        loaded.assert_whole()


@loads_the_machine
def test_a_broken_configuration_changes_nothing(directory: Path, echo: Peer) -> None:
    with (
        running_gateway(directory, workers=2) as gateway,
        under_load(gateway, echo) as loaded,
    ):
        before, workers = gateway.status(), worker_pids(gateway)
        good = (directory / "gateway.toml").read_text()
        for old, new, reason in (
            ("workers = 2", "wrokers = 2", "did you mean workers"),
            ("workers = 2", "workers = 2 2", "not valid TOML"),
            ('certificate = "server.pem"', 'certificate = "ca.pem"', "tls.certificate"),
            ('token_file = "token"', 'token_file = "no-token"', "auth.token_file"),
        ):
            change_config(gateway, old, new)
            refused = try_operation(gateway, "reload")
            assert refused.returncode == 1
            assert reason in refused.stderr
            assert "Traceback" not in refused.stderr
            assert reason in gateway.status()["last_reload"]["message"]
            (directory / "gateway.toml").write_text(good)
        change_config(gateway, "workers = 2", "wrokers = 2")
        refused = try_operation(gateway, "reload", "--policy-only")
        assert (refused.returncode, "did you mean workers" in refused.stderr) == (1, True)
        failed_at = gateway.status()["last_reload"]["at"]
        os.kill(gateway.running.pid, signal.SIGHUP)
        wait_until("the refusal", lambda: gateway.status()["last_reload"]["at"] > failed_at)
        after = gateway.status()
        assert not after["last_reload"]["ok"]
        assert worker_pids(gateway) == workers
        for unchanged in ("pid", "generation", "revision", "generations", "worker_deaths"):
            assert after[unchanged] == before[unchanged]
        assert gateway.healthz().status_code == 200
        loaded.assert_whole()
        # and it can be mended
        (directory / "gateway.toml").write_text(good)
        assert operate(gateway, "reload")["generation"] == 2
        assert gateway.status()["last_reload"]["ok"]


def test_a_setting_that_takes_a_restart_stays_as_it_is_and_every_reload_says_so(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:
        before = gateway.status()
        good = (directory / "gateway.toml").read_text()
        change_config(gateway, 'runtime_dir = "run"', 'runtime_dir = "elsewhere"')
        change_config(gateway, f'health = "127.0.0.1:{gateway.health_port}"', 'health = ""')
        change_config(gateway, "workers = 1", "workers = 2")
        for generation in (2, 3):
            facts = gateway.ask("POST", "/reload")
            assert facts["generation"] == generation
            for key in ("runtime_dir", "listen.health"):
                assert f"{key} changed: applies at the next restart" in facts["warnings"]
            assert gateway.status()["health"] == before["health"]
            # the rest of the file applies
            assert run(echo_on_new_connection(gateway, echo)) == generation
            assert sum(w["generation"] == generation for w in gateway.status()["workers"]) == 2
        assert not (directory / "elsewhere").exists()
        (directory / "gateway.toml").write_text(good)
        assert gateway.ask("POST", "/reload")["warnings"] == []


@loads_the_machine
def test_a_new_policy_ends_the_tunnels_that_it_denies_and_says_why(
    directory: Path, echo: Peer, tmp_path: Path
) -> None:
    other_port = free_udp_port()
    other = start_peer("echo", other_port, tmp_path)
    try:
        with (
            running_gateway(directory, workers=2) as gateway,
            running_udp_client(gateway, f"127.0.0.1:{other_port}", name="denied") as (way, denied),
            under_load(gateway, echo) as loaded,
            running_load(way, 200) as denied_load,
        ):
            workers = worker_pids(gateway)

            async def scenario() -> None:
                async with connected_engine(gateway) as client:
                    allowed = await open_tunnel(client, echo.host, echo.port)
                    cut = await open_tunnel(client, "127.0.0.1", other_port)
                    await cut.echo(b"before")
                    deny = f'name = "no more"\naction = "deny"\nports = [{other_port}]'
                    change_config(
                        gateway,
                        "[[policy.rules]]",
                        f'[[policy.rules]]\n{deny}\ncidr = ["0.0.0.0/0"]\n\n[[policy.rules]]',
                    )
                    facts = await operate_meanwhile(gateway, "reload", "--policy-only")
                    assert facts == facts | {"generation": 1, "revision": 2, "warnings": []}
                    async with asyncio.timeout(15):
                        await cut.has_ended.wait()
                    await allowed.echo(b"after")
                    assert not client.closed.done()

            run(scenario())
            denied.wait_for_output("no more")
            assert "no way to the target" in denied.output()
            assert worker_pids(gateway) == workers
            (tunnel,) = operate(gateway, "tunnels")["tunnels"]
            assert tunnel["target"] == f"{echo.host}:{echo.port}"
            assert gateway.status()["revision"] == 2
            wait_until(
                "the count of cut tunnels",
                lambda: gateway.metric("toppy_gw_tunnels_cut_total") == 2,
            )
            assert not denied_load.report().is_whole
            loaded.assert_whole()
    finally:
        other.stop()


def test_the_log_level_is_hot(directory: Path) -> None:
    with running_gateway(directory, workers=3) as gateway:

        def drained() -> set[int]:
            log = gateway_log(gateway)
            return {line["slot"] for line in log if line["event"] == "worker drains"}

        workers = worker_pids(gateway)
        (directory / "gateway.toml").write_text(
            (directory / "gateway.toml").read_text() + '\n[log]\nlevel = "error"\n'
        )
        assert operate(gateway, "reload", "--policy-only")["warnings"] == []
        operate(gateway, "drain", "s0")
        wait_until("the worker's end", lambda: "s0" not in worker_pids(gateway))
        change_config(gateway, 'level = "error"', 'level = "info"')
        operate(gateway, "reload", "--policy-only")
        operate(gateway, "drain", "s1")
        wait_until("the worker's end", lambda: "s1" not in worker_pids(gateway))
        assert drained() == {1}
        assert worker_pids(gateway) == {"s2": workers["s2"]}


def test_what_needs_a_restart_is_said(directory: Path) -> None:
    with running_gateway(directory) as gateway:
        change_config(gateway, f"127.0.0.1:{gateway.port}", f"127.0.0.1:{free_udp_port()}")
        done = try_operation(gateway, "reload")
        assert done.returncode == 0
        assert "warning: listen.quic changed: applies at the next restart\n" in done.stdout
        wait_until("the old worker's end", lambda: len(worker_pids(gateway)) == 1)
        workers = worker_pids(gateway)
        change_config(gateway, "workers = 1", "workers = 2")
        done = try_operation(gateway, "reload", "--policy-only")
        assert "warning: workers changed: applies at the next reload\n" in done.stdout
        assert gateway.status()["listen"] == [f"127.0.0.1:{gateway.port}"]
        assert worker_pids(gateway) == workers


@pytest.mark.parametrize("when_full", ["fail", "wait"])
def test_a_reload_without_a_free_slot_fails_or_waits(
    directory: Path, echo: Peer, when_full: str
) -> None:
    extra = f'[reload]\ngenerations = 2\nwhen_full = "{when_full}"\n'
    with running_gateway(directory, extra=extra) as gateway:

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await operate_meanwhile(gateway, "reload")
                next_one = asyncio.create_task(
                    asyncio.to_thread(try_operation, gateway, "reload", "--json")
                )
                if when_full == "fail":
                    refused = await next_one
                    assert refused.returncode == 1
                    assert "1 slots are needed and 0 are free" in refused.stderr
                    assert "toppy-gw drain g1" in refused.stderr
                else:
                    await asyncio.to_thread(
                        gateway.running.wait_for_output, "reload waits for slots"
                    )
                    assert not next_one.done()
                await tunnel.echo(b"still served by the first generation")
            if when_full == "fail":
                await asyncio.to_thread(wait_for_generations, gateway, {2: "active"})
                assert (await operate_meanwhile(gateway, "reload"))["generation"] == 3
            else:
                assert (await next_one).returncode == 0
                assert gateway.status()["generation"] == 3

        run(scenario())


def test_reloads_that_are_asked_for_at_once_are_joined(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        threads = [threading.Thread(target=operate, args=(gateway, "reload")) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        newest = gateway.status()["generation"]
        assert 2 <= newest <= 7
        wait_for_generations(gateway, {newest: "active"})
        assert run(echo_on_new_connection(gateway, echo)) == newest


@pytest.mark.parametrize("engine", ENGINES)
def test_a_connection_stays_with_its_generation_and_new_ones_go_to_the_next(
    directory: Path, echo: Peer, engine: str
) -> None:
    with running_gateway(directory, workers=2, engine=engine) as gateway:

        async def scenario() -> None:
            async with connected_engine(gateway, engine) as old:
                tunnel = await open_tunnel(old, echo.host, echo.port)
                await operate_meanwhile(gateway, "reload")
                for _ in range(6):
                    assert await echo_on_new_connection(gateway, echo) == 2
                assert await generation_of(gateway, old) == 1
                for number in range(20):
                    await tunnel.echo(b"%d" % number)
                assert generations(gateway) == {1: "draining", 2: "active"}
            await asyncio.to_thread(wait_for_generations, gateway, {2: "active"})

        run(scenario())


# what reloads leave behind


def _left_behind(gateway: Gateway) -> dict[str, object]:
    control = psutil.Process(gateway.running.pid)
    sockets = [
        line.rpartition(" ")[2]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if str(gateway.directory) in line
    ]
    kinds = []
    for entry in Path(f"/proc/{control.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kinds.append(str(entry.readlink()))
    return {
        "descriptors": sorted(kind.partition(":")[0] for kind in kinds),
        "children": len(control.children(recursive=True)),
        "threads": control.num_threads(),
        "files": [_without_number(name) for name in runtime_files(gateway)],
        "unix sockets": sorted(_without_number(path) for path in sockets),
        "configuration directory": sorted(path.name for path in gateway.directory.iterdir()),
    }


def _without_number(name: str) -> str:
    """Which slot it is differs from generation to generation."""
    return re.sub(r"[0-9]+(?=\.sock)", "N", name)


def test_fifty_reloads_leave_nothing_behind(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        control = psutil.Process(gateway.running.pid)

        def reload_to(generation: int) -> None:
            while gateway.status()["generation"] < generation:
                gateway.ask("POST", "/reload")
            wait_for_generations(gateway, {generation: "active"})

        reload_to(11)
        run(echo_on_new_connection(gateway, echo))
        before, rss = _left_behind(gateway), control.memory_info().rss
        reload_to(51)
        run(echo_on_new_connection(gateway, echo))
        with contextlib.suppress(TimeoutError):
            wait_until("the last one's end", lambda: _left_behind(gateway) == before)
        assert _left_behind(gateway) == before
        # 40 generations: what each may leave is less than any of its parts
        assert control.memory_info().rss - rss < 40 * (100 << 10)
