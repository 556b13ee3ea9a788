"""The gateway as processes: started, killed, stopped, watched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.masque_client import (
    DEADLINE_S,
    ClosedError,
    ask,
    connected_engine,
    open_tunnel,
    run,
)
from integration.processes import (
    BIN,
    Gateway,
    free_udp_port,
    run_command,
    running_gateway,
    start,
    wait_until,
)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short: unix socket paths are limited to 107 bytes."""
    return tmp_path_factory.mktemp("gw")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two workers that no test harms; its secrets come by environment."""
    environ = {"TOPPY_GW_JWT_SECRET": "a JWT secret in the environment"}
    with running_gateway(tmp_path_factory.mktemp("gw"), workers=2, environ=environ) as gateway:
        yield gateway


def worker_pids(gateway: Gateway) -> list[int]:
    return [worker["pid"] for worker in gateway.status()["workers"]]


def are_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


async def echo_on_new_connection(gateway: Gateway, echo: Peer) -> None:
    async with connected_engine(gateway) as client:
        tunnel = await open_tunnel(client, echo.host, echo.port)
        await tunnel.echo(b"served")


# death


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_worker_is_replaced_and_its_clients_can_return(
    directory: Path, engine: str, echo: Peer
) -> None:
    with running_gateway(directory, engine=engine) as gateway:

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"before")
                (old,) = worker_pids(gateway)
                os.kill(old, signal.SIGKILL)
                # a stateless reset, as soon as the client says something to the new worker
                async with asyncio.timeout(DEADLINE_S):
                    while not client.closed.done():
                        tunnel.send(b"are you there?")
                        await asyncio.sleep(0.1)
                assert "reset" in client.closed.result()
                assert worker_pids(gateway) != [old]
            await echo_on_new_connection(gateway, echo)

        run(scenario())
        assert gateway.status()["worker_deaths"] == 1
        assert gateway.metric("toppy_gw_worker_deaths_total") == 1
        assert gateway.healthz().status_code == 200


def test_counters_survive_the_worker_that_counted(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        run(echo_on_new_connection(gateway, echo))
        wait_for_metric(gateway, 1, "datagrams_total", direction="to_target")
        os.kill(worker_pids(gateway)[0], signal.SIGKILL)
        wait_for_metric(gateway, 1, "worker_deaths_total")
        assert gateway.metric("toppy_gw_datagrams_total", direction="to_target") == 1
        wait_until("a new worker", lambda: gateway.metric("toppy_gw_worker_up") == 1)
        run(echo_on_new_connection(gateway, echo))
        wait_for_metric(gateway, 2, "datagrams_total", direction="to_target")


def test_packets_that_arrive_while_a_worker_is_dead_wait_for_the_next_one(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:

        async def scenario() -> None:
            os.kill(worker_pids(gateway)[0], signal.SIGKILL)
            await echo_on_new_connection(gateway, echo)

        run(scenario())


def test_one_workers_death_leaves_the_others_connections_alone(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, workers=2) as gateway:

        async def scenario() -> None:
            async with asyncio.TaskGroup() as group:
                started = asyncio.Barrier(13)
                ended = [group.create_task(survives(started)) for _ in range(12)]
                await started.wait()
                wait_until("reports", lambda: gateway.status()["tunnels"] == 12)
                victim, other = gateway.status()["workers"]
                os.kill(victim["pid"], signal.SIGKILL)
            survivors = sum(task.result() for task in ended)
            assert survivors == other["tunnels"]

        async def survives(started: asyncio.Barrier) -> bool:
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await started.wait()
                await asyncio.sleep(1.0)
                try:
                    await tunnel.echo(b"still served")
                except ClosedError:
                    return False
                return True

        run(scenario())


def test_sigterm_stops_everything_within_five_seconds(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, workers=2) as gateway:
        workers = worker_pids(gateway)

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"before")
                code = await asyncio.to_thread(gateway.running.stop, signal.SIGTERM, 5.0)
                assert code == 0
                async with asyncio.timeout(DEADLINE_S):
                    assert "stopping" in await client.closed

        run(scenario())
        assert are_gone(workers)
        assert [path.name for path in (directory / "run").iterdir()] == ["lock"]


def test_sigterm_during_the_start_stops_everything_too(directory: Path) -> None:
    with running_gateway(directory) as gateway:
        gateway.running.stop()
        again = start(
            [BIN / "toppy-gw", "run", "--config", directory / "gateway.toml"],
            directory / "again.log",
        )
        again.wait_for_output("worker started")
        children = psutil.Process(again.pid).children(recursive=True)
        assert again.stop(signal.SIGTERM, 5.0) == 0
        assert are_gone([child.pid for child in children])


def test_workers_without_a_control_plane_leave_in_the_end_and_the_port_is_free_again(
    directory: Path, echo: Peer
) -> None:
    patience = "\n[reload]\norphan_timeout_s = 0.5\n"
    with running_gateway(directory, workers=2, extra=patience) as gateway:
        workers = worker_pids(gateway)
        gateway.running.stop(signal.SIGKILL)
        wait_until("the workers' end", lambda: are_gone(workers))
        again = start(
            [BIN / "toppy-gw", "run", "--config", directory / "gateway.toml"],
            directory / "again.log",
        )
        try:
            again.wait_for_output("gateway serves")
            run(echo_on_new_connection(gateway, echo))
        finally:
            again.stop()


# what others see


def test_processes_are_named_after_what_they_do(pair: Gateway) -> None:
    titles = {" ".join(psutil.Process(pid).cmdline()).strip() for pid in worker_pids(pair)}
    assert titles == {"toppy-gw: worker 0 gen 1", "toppy-gw: worker 1 gen 1"}
    assert " ".join(psutil.Process(pair.running.pid).cmdline()).strip() == "toppy-gw: control"


def test_no_secret_is_in_a_workers_arguments_or_environment(pair: Gateway) -> None:
    key = (pair.directory / "server-key.pem").read_text().splitlines()[1]
    for pid in worker_pids(pair):
        for name in ("cmdline", "environ"):
            seen = Path(f"/proc/{pid}/{name}").read_bytes()
            for secret in (pair.token, "a JWT secret in the environment", key):
                assert secret.encode() not in seen
            assert b"TOPPY_GW_" not in seen


def test_no_secret_is_in_the_log(pair: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with connected_engine(pair) as client:
            await ask(client, echo.host, echo.port, token="a token that is wrong").answer()

    run(scenario())
    log = pair.running.output()
    for secret in (pair.token, "a token that is wrong", "a JWT secret in the environment"):
        assert secret not in log


def test_the_runtime_directory_is_for_its_user_alone(pair: Gateway) -> None:
    assert (pair.directory / "run").stat().st_mode & 0o077 == 0


def test_a_second_gateway_with_the_same_runtime_directory_is_refused(pair: Gateway) -> None:
    other = pair.directory / "other.toml"
    text = (pair.directory / "gateway.toml").read_text()
    other.write_text(text.replace(str(pair.port), "0").replace(str(pair.health_port), "0"))
    refused = run_command("toppy-gw", "run", "--config", str(other))
    assert refused.returncode == 1
    assert "another toppy-gw runs in" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert pair.healthz().status_code == 200


@pytest.mark.parametrize("taken", ["quic", "health"])
def test_a_port_that_is_taken_is_refused_with_a_clear_text(pair: Gateway, taken: str) -> None:
    other = pair.directory / "other.toml"
    text = (pair.directory / "gateway.toml").read_text()
    text = text.replace('runtime_dir = "run"', 'runtime_dir = "run2"')
    free = pair.health_port if taken == "quic" else pair.port
    other.write_text(text.replace(str(free), "0"))
    refused = run_command("toppy-gw", "run", "--config", str(other))
    assert refused.returncode == 1
    assert f"listen.{taken}" in refused.stderr
    assert "in use" in refused.stderr
    assert "Traceback" not in refused.stderr


# health, metrics, status


def test_healthz_is_what_a_load_balancer_expects(pair: Gateway) -> None:
    answer = pair.healthz()
    assert answer.status_code == 200
    assert answer.text.replace(" ", "") == '{"status":"ok"}'
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


def test_status_says_what_runs(pair: Gateway) -> None:
    config = str(pair.directory / "gateway.toml")
    facts = json.loads(run_command("toppy-gw", "status", "--json", "--config", config).stdout)
    assert facts["pid"] == pair.running.pid
    assert facts["listen"] == [f"127.0.0.1:{pair.port}"]
    assert [worker["state"] for worker in facts["workers"]] == ["serving", "serving"]
    text = run_command("toppy-gw", "status", "--config", config)
    assert text.returncode == 0
    assert "toppy-gw" in text.stdout
    assert ["s1", "g1", "serving"] in [line.split()[:3] for line in text.stdout.splitlines()]


def test_status_without_a_gateway_says_so(directory: Path) -> None:
    made = run_command("toppy-gw", "init", str(directory))
    assert made.returncode == 0
    asked = run_command("toppy-gw", "status", "--config", str(directory / "gateway.toml"))
    assert asked.returncode == 1
    assert "no gateway answers" in asked.stderr


# the service manager


def test_the_service_manager_hears_ready_status_watchdog_and_stopping(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(DEADLINE_S)
        heard: list[str] = []

        def listen_for(text: str) -> None:
            while not any(text in said for said in heard):
                heard.append(manager.recv(4096).decode())

        environ = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "1000000"}
        with running_gateway(directory, environ=environ):
            listen_for("READY=1")
            listen_for("STATUS=1/1 workers, 0 connections, 0 tunnels")
            listen_for("WATCHDOG=1")
        listen_for("STOPPING=1")


def test_a_worker_that_hangs_is_replaced(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        (pid,) = worker_pids(gateway)
        os.kill(pid, signal.SIGSTOP)
        wait_until("another worker", lambda: worker_pids(gateway) != [pid], 40.0)
        assert are_gone([pid])
        wait_until("its service", lambda: gateway.metric("toppy_gw_worker_up") == 1)
        run(echo_on_new_connection(gateway, echo))
        assert gateway.status()["worker_deaths"] == 1


def test_a_hangup_reloads_the_gateway_and_does_nothing_to_a_worker(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:
        workers = worker_pids(gateway)
        for pid in workers:
            os.kill(pid, signal.SIGHUP)
        run(echo_on_new_connection(gateway, echo))
        assert worker_pids(gateway) == workers
        os.kill(gateway.running.pid, signal.SIGHUP)
        gateway.running.wait_for_output("reloaded")
        wait_until("the next generation alone", lambda: are_gone(workers))
        run(echo_on_new_connection(gateway, echo))


def test_every_listen_address_of_one_family_answers(directory: Path, echo: Peer) -> None:
    port = free_udp_port("127.0.0.2")
    environ = {"TOPPY_GW_QUIC_LISTEN": f"127.0.0.1:{port},127.0.0.2:{port},127.0.0.3:{port}"}
    with running_gateway(directory, environ=environ) as gateway:
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            run(echo_on_new_connection(replace(gateway, host=host, port=port), echo))
