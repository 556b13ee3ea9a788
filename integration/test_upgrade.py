"""``toppy-gw upgrade``: new code in the running gateway's place, while datagrams pass."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
import pytest

import toppy
from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.masque_client import connected, open_tunnel, run
from integration.operation import (
    change_config,
    echo_on_new_connection,
    is_gone,
    loads_the_machine,
    operate,
    operate_meanwhile,
    try_operation,
    under_load,
    wait_for_generations,
    worker_pids,
)
from integration.processes import Gateway, running_gateway, start, wait_until


def own_tmp(directory: Path) -> dict[str, str]:
    """The environment of a gateway whose trials are seen by nobody else."""
    (directory / "tmp").mkdir()
    return {"TMPDIR": str(directory / "tmp")}


def trials(directory: Path) -> list[Path]:
    """Directories of trial gateways."""
    return list((directory / "tmp").glob("toppy-gw-trial-*"))


def assert_upgraded(gateway: Gateway, before: dict[str, int], generation: int) -> None:
    facts = operate(gateway, "upgrade")
    assert facts["pid"] == gateway.running.pid
    assert (facts["from"], facts["to"]) == (toppy.__version__, toppy.__version__)
    assert facts["generation"] == generation
    assert not set(before.values()) & {
        worker["pid"]
        for worker in gateway.status()["workers"]
        if worker["generation"] == generation
    }


@loads_the_machine
@pytest.mark.parametrize("engine", ENGINES)
def test_an_upgrade_loses_duplicates_and_reorders_nothing(
    directory: Path, echo: Peer, engine: str
) -> None:
    with (
        running_gateway(directory, workers=2, engine=engine, environ=own_tmp(directory)) as gateway,
        under_load(gateway, echo, engine=engine) as loaded,
    ):
        before = gateway.status()
        for generation in (2, 3):
            assert_upgraded(gateway, worker_pids(gateway), generation)
            assert run(echo_on_new_connection(gateway, echo)) == generation
        wait_for_generations(gateway, {3: "active"})
        report = loaded.assert_whole()
        after = gateway.status()
        assert after["since"] == before["since"]
        assert after["worker_deaths"] == 0
        assert after["drops"] == {}
        # counters go on: everything was counted, once
        wait_for_metric(gateway, report.sent, "datagrams_total", direction="to_target")
        assert gateway.metric("toppy_gw_datagrams_total", direction="to_target") <= report.sent + 9
        assert gateway.healthz().status_code == 200
    assert trials(directory) == []


def test_a_tunnel_that_does_not_move_goes_on_through_an_upgrade(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"before")
                for _ in range(2):
                    await operate_meanwhile(gateway, "upgrade")
                    await tunnel.echo(b"after")
                await asyncio.to_thread(wait_for_generations, gateway, {1: "draining", 3: "active"})

        run(scenario())
        wait_for_generations(gateway, {3: "active"})


@pytest.fixture
def own_code(tmp_path: Path) -> Iterator[Path]:
    """A virtual environment with a copy of toppy that a test may break: (its directory)."""
    environment = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60
    )
    source = Path(toppy.__file__).parent
    code = tmp_path / "code"
    shutil.copytree(
        source, code / "toppy", ignore=shutil.ignore_patterns("native", "__pycache__", "*.so")
    )
    for library in (source / "quic").glob("*.so"):
        (code / "toppy" / "quic" / library.name).symlink_to(library)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    (packages / "own.pth").write_text(f"{code}\n{sysconfig.get_path('purelib')}\n")
    program = environment / "bin" / "toppy-gw"
    program.write_text(
        f"#!{environment}/bin/python\nfrom toppy.cli.toppy_gw import main\n\nmain()\n"
    )
    program.chmod(0o755)
    yield tmp_path


BREAKS = {
    "a module that cannot be imported": ("worker/router.py", "import no_such_module\n"),
    "a control plane that cannot be imported": ("control/main.py", "this is no Python\n"),
    "workers that end at once": ("worker/__main__.py", "raise SystemExit(7)\n"),
}


@loads_the_machine
@pytest.mark.parametrize("broken", BREAKS)
def test_an_upgrade_to_broken_code_fails_and_changes_nothing(
    directory: Path, own_code: Path, echo: Peer, broken: str
) -> None:
    program = own_code / "venv" / "bin" / "toppy-gw"
    with (
        running_gateway(
            directory, workers=2, program=program, environ=own_tmp(directory)
        ) as gateway,
        under_load(gateway, echo) as loaded,
    ):
        before, workers = gateway.status(), worker_pids(gateway)
        name, said = BREAKS[broken]
        module = own_code / "code" / "toppy" / name
        text = module.read_text()
        module.write_text(said + text)
        refused = try_operation(gateway, "upgrade")
        assert refused.returncode == 1, refused.stdout
        assert "the new code does not come up; nothing has changed" in refused.stderr
        after = gateway.status()
        assert worker_pids(gateway) == workers
        for unchanged in ("pid", "generation", "revision", "generations", "worker_deaths"):
            assert after[unchanged] == before[unchanged]
        assert run(echo_on_new_connection(gateway, echo)) == 1
        # mended, it succeeds
        module.write_text(text)
        assert_upgraded(gateway, workers, 2)
        loaded.assert_whole()
    assert trials(directory) == []


def assert_unchanged(gateway: Gateway, before: dict[str, Any]) -> None:
    """The same workers serve with the same configuration, and all is well."""
    after = gateway.status()
    for unchanged in ("pid", "generation", "revision", "generations", "worker_deaths"):
        assert after[unchanged] == before[unchanged]
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


def test_code_that_cannot_take_the_workers_over_is_refused_and_by_a_restart_it_ends_them(
    directory: Path, own_code: Path, echo: Peer
) -> None:
    program = own_code / "venv" / "bin" / "toppy-gw"
    with running_gateway(directory, workers=2, program=program) as gateway:
        before = gateway.status()
        module = own_code / "code" / "toppy" / "control" / "saved_state.py"
        text = module.read_text()
        module.write_text(text.replace("FORMAT = 1\n", "FORMAT = 2\n"))
        assert module.read_text() != text
        refused = try_operation(gateway, "upgrade")
        assert refused.returncode == 1, refused.stdout
        assert "it cannot take over the running workers" in refused.stderr
        assert "restart" in refused.stderr
        assert_unchanged(gateway, before)
        assert run(echo_on_new_connection(gateway, echo)) == 1
        # as after a crash between installation and restart
        workers = set(worker_pids(gateway).values())
        gateway.running.process.kill()
        gateway.running.process.wait()
        again = start(
            [program, "run", "--config", directory / "gateway.toml"], directory / "again.log"
        )
        try:
            again.wait_for_output("gateway serves")
            assert all(map(is_gone, workers))
            assert "the earlier workers cannot be taken over" in again.output()
            assert run(echo_on_new_connection(gateway, echo)) == 1
        finally:
            again.stop()


def test_an_upgrade_is_refused_while_a_setting_that_takes_a_restart_has_changed(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:
        before = gateway.status()
        good = (directory / "gateway.toml").read_text()
        for old, new, key in (
            (f":{gateway.port}", ":1", "listen.quic"),
            ('runtime_dir = "run"', 'runtime_dir = "elsewhere"', "runtime_dir"),
        ):
            change_config(gateway, old, new)
            answer = gateway.ask("POST", "/upgrade")
            assert answer["error"].startswith(f"{key} changed in the configuration")
            (directory / "gateway.toml").write_text(good)
        change_config(gateway, "workers = 1", "wrokers = 1")
        assert "did you mean workers" in gateway.ask("POST", "/upgrade")["error"]
        (directory / "gateway.toml").write_text(good)
        assert not (directory / "elsewhere").exists()
        assert_unchanged(gateway, before)
        assert_upgraded(gateway, worker_pids(gateway), 2)
        assert run(echo_on_new_connection(gateway, echo)) == 2


@pytest.mark.parametrize("after_s", [0.0, 0.12, 0.4])
@pytest.mark.parametrize("how", ["signal", "stop"])
def test_a_stop_just_after_the_answer_of_an_upgrade_is_a_stop(
    directory: Path, how: str, after_s: float
) -> None:
    with running_gateway(directory, workers=2) as gateway:
        workers = set(worker_pids(gateway).values())
        answer = gateway.ask("POST", "/upgrade")
        assert "error" not in answer
        time.sleep(after_s)
        if how == "signal":
            gateway.running.process.send_signal(signal.SIGTERM)
        else:
            stopped = try_operation(gateway, "stop")
            if stopped.returncode:
                # it was not there to be asked
                gateway.running.process.send_signal(signal.SIGTERM)
        assert gateway.running.process.wait(10) == 0
        assert all(map(is_gone, workers))
        assert [path.name for path in (directory / "run").iterdir()] == ["lock"]


def test_a_stop_during_the_trial_ends_the_trial_too(directory: Path) -> None:
    with (
        running_gateway(directory, environ=own_tmp(directory)) as gateway,
        ThreadPoolExecutor() as pool,
    ):
        asking = pool.submit(gateway.ask, "POST", "/upgrade")
        wait_until("the trial", lambda: bool(trials(directory)))
        children = psutil.Process(gateway.running.pid).children(recursive=True)
        gateway.running.process.send_signal(signal.SIGTERM)
        assert gateway.running.process.wait(10) == 0
        assert asking.exception(10) is not None
        wait_until("the end of all", lambda: all(is_gone(child.pid) for child in children))
    assert trials(directory) == []


def test_signals_to_reload_during_an_upgrade_are_obeyed_and_end_nothing(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:
        answer = gateway.ask("POST", "/upgrade")
        assert "error" not in answer
        for _ in range(150):  # while it ends, starts and serves
            os.kill(gateway.running.pid, signal.SIGHUP)
            time.sleep(0.01)

        def is_quiet() -> bool:
            status = gateway.status()
            return status["rollout"] == "idle" and status["last_reload"] is not None

        wait_until("the end of the reloads", is_quiet)
        status = gateway.status()
        assert status["pid"] == gateway.running.pid
        assert status["worker_deaths"] == 0
        assert status["last_reload"]["ok"]
        assert run(echo_on_new_connection(gateway, echo)) >= 2


def test_while_an_upgrade_is_under_way_there_is_no_other_and_no_reload(directory: Path) -> None:
    with running_gateway(directory) as gateway:
        with ThreadPoolExecutor() as pool:
            answers = as_completed(
                [pool.submit(gateway.ask, "POST", "/upgrade") for _ in range(2)], timeout=30
            )
            assert "an upgrade is under way already" in next(answers).result()["error"]
            assert "an upgrade is under way" in gateway.ask("POST", "/reload")["error"]
            assert next(answers).result()["pid"] == gateway.running.pid
        gateway.running.wait_for_output("reloaded")
        assert gateway.status()["generation"] == 2
