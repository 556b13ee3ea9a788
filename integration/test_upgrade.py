"""``toppy-gw upgrade``: new code in the running gateway's place, while datagrams pass."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import toppy
from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.masque_client import connected, open_tunnel, run
from integration.operation import (
    echo_on_new_connection,
    loads_the_machine,
    operate,
    operate_meanwhile,
    try_operation,
    under_load,
    wait_for_generations,
    worker_pids,
)
from integration.processes import Gateway, running_gateway


def trials() -> set[Path]:
    """Directories of trial gateways."""
    return set(Path(tempfile.gettempdir()).glob("toppy-gw-trial-*"))


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
    left_before = trials()
    with (
        running_gateway(directory, workers=2, engine=engine) as gateway,
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
    assert trials() <= left_before


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
    left_before = trials()
    with (
        running_gateway(directory, workers=2, program=program) as gateway,
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
    assert trials() <= left_before
