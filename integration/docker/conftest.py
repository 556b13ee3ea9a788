"""One engine, one image and one set of services for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.cgroup import CannotStartError
from integration.docker.engine import Engine, running_engine
from integration.docker.image import BASE_IMAGE, IMAGE, make_base_image, make_context


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine; where there can be none, its tests are skipped."""
    try:
        with running_engine() as running:
            yield running
    except CannotStartError as error:
        pytest.skip(f"no Docker engine can be started here: {error}")


@pytest.fixture(scope="session")
def context(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with wheels in it, and the image built from it."""
    directory = tmp_path_factory.mktemp("context")
    try:
        make_base_image(engine)
        make_context(directory)
    except CannotStartError as error:
        pytest.skip(f"no image can be built here: {error}")
    engine.docker(
        *("build", "--quiet", "--file", "docker/Dockerfile", "--tag", IMAGE),
        *("--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "."),
        cwd=directory,
    )
    return directory


@pytest.fixture(scope="session")
def services(engine: Engine, context: Path) -> Iterator[Path]:
    """What ``make compose-up`` starts; the directory it was started from."""
    environ = {"BASE_IMAGE": BASE_IMAGE}
    started = engine.run_on_host("make", "compose-up", cwd=context, environ=environ)
    assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]
    yield context
    ended = engine.run_on_host("make", "compose-down", cwd=context, environ=environ)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not engine.docker("ps", "--all", "--quiet")
    assert not (context / ".dev" / "compose").exists()
