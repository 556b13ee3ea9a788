"""One machine, one installation for every test of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.cgroup import CannotStartError
from integration.docker.image import make_context
from integration.systemd.machine import Machine, running_machine
from integration.systemd.service import (
    CONFIG,
    IN_MACHINE,
    LISTEN,
    PROJECT,
    UNIT,
    Service,
    install,
    running_echo,
)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with wheels of it and of what it needs for the machine's Python."""
    directory = tmp_path_factory.mktemp("shared") / Path(IN_MACHINE).name
    try:
        make_context(directory)
    except CannotStartError as error:
        pytest.skip(f"toppy cannot be packed here: {error}")
    shutil.copytree(PROJECT / "systemd", directory / "systemd")
    return directory


@pytest.fixture(scope="session")
def machine(sources: Path) -> Iterator[Machine]:
    """A machine that has booted; where there can be none, its tests are skipped."""
    try:
        with running_machine(sources.parent) as running:
            yield running
    except CannotStartError as error:
        pytest.skip(f"no systemd can be booted here: {error}")


@pytest.fixture(scope="session")
def installed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """After ``make install``; ``make uninstall`` in the end."""
    said = install(machine)
    assert "toppy-gw init /etc/toppy" in said
    service = Service(machine, tmp_path_factory.mktemp("clients"))
    yield service
    etc = sorted(path.name for path in service.path("etc/toppy").iterdir())
    machine.do("make", "--directory", IN_MACHINE, "uninstall")
    assert machine.property("LoadState") == "not-found"
    assert machine.processes() == {}
    assert machine.do("find", "/usr/local", "/run", "-name", "*toppy*") == ""
    assert sorted(path.name for path in service.path("etc/toppy").iterdir()) == etc


@pytest.fixture(scope="session")
def first_start(installed: Service) -> str:
    """What the service says when nothing was configured yet."""
    done = installed.machine.run("systemctl", "start", UNIT)
    installed.stop()
    assert done.returncode != 0
    return installed.machine.journal()


@pytest.fixture(scope="session")
def configured(installed: Service, first_start: str) -> Iterator[Service]:
    """After ``toppy-gw init``, with something to reach."""
    machine = installed.machine
    machine.do("toppy-gw", "init", "/etc/toppy", "--listen", LISTEN)
    config = installed.path(CONFIG)
    config.write_text(config.read_text().replace('workers = "auto"', "workers = 2"))
    with running_echo(machine, installed.directory):
        yield installed


@pytest.fixture
def service(configured: Service) -> Iterator[Service]:
    """It serves, one generation, with nothing left of the test before."""
    if configured.state != "active":
        configured.start()
    yield configured
    configured.machine.run("systemctl", "reset-failed", UNIT)
