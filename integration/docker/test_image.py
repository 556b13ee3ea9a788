"""The image by itself, as somebody without Compose runs it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.docker.engine import Engine
from integration.docker.image import IMAGE
from integration.processes import wait_until
from toppy.quic.choose import has_native_engine

pytestmark = [pytest.mark.xdist_group("docker"), pytest.mark.timeout(300)]

CONFINED = (
    *("--read-only", "--tmpfs", "/run/toppy-gw", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges"),
)


@pytest.fixture(scope="module")
def configuration(engine: Engine, context: Path) -> Iterator[str]:
    """A volume that ``toppy-gw init`` has filled."""
    volume = engine.docker("volume", "create")
    engine.docker(
        *("run", "--rm", *CONFINED, "--volume", f"{volume}:/etc/toppy", IMAGE),
        *("init", "/etc/toppy", "--listen", "0.0.0.0:4433", "--name", "gw.example.com"),
    )
    yield volume
    engine.docker("volume", "rm", volume)


@contextlib.contextmanager
def running(engine: Engine, volume: str, *options: str) -> Iterator[str]:
    """A confined gateway's container, healthy."""
    container = engine.docker(
        *("run", "--detach", *CONFINED, "--volume", f"{volume}:/etc/toppy:ro"),
        *("--health-interval", "1s", *options, IMAGE),
    )
    try:
        wait_until("the gateway's health", lambda: engine.health(container) == "healthy", 30.0)
        yield container
    finally:
        engine.docker("rm", "--force", "--volumes", container)


@pytest.mark.parametrize("first", ["the gateway", "an init"])
def test_sigterm_ends_a_confined_gateway_with_0(
    engine: Engine, configuration: str, first: str
) -> None:
    options = ["--init"] if first == "an init" else []
    with running(engine, configuration, *options) as container:
        begun = time.monotonic()
        engine.docker("stop", "--time", "20", container)
        assert time.monotonic() - begun < 15  # not killed
        assert engine.inspect(container)["State"]["ExitCode"] == 0
        assert "gateway stops" in engine.run_on_host("docker", "logs", container).stderr


def test_image_has_the_engine_that_this_host_has(engine: Engine, configuration: str) -> None:
    expected = "native" if has_native_engine() else "aioquic"
    with running(engine, configuration) as container:
        assert f"engine {expected}" in engine.docker("exec", container, "toppy-gw", "status")


def test_health_check_follows_the_health_address(engine: Engine, configuration: str) -> None:
    with running(engine, configuration, "--env", "TOPPY_GW_LISTEN=127.0.0.1:9090") as container:
        check = ["exec", container, "python3", "/opt/toppy/healthcheck.py"]
        engine.docker(*check)
        failed = engine.run_on_host(
            "docker", *check[:1], "--env", "TOPPY_GW_LISTEN=127.0.0.1:8080", *check[1:]
        )
        assert failed.returncode == 1
        assert "refused" in failed.stderr


def test_it_writes_an_audit_log_without_being_told(engine: Engine, configuration: str) -> None:
    with running(engine, configuration) as container:
        said = engine.docker("exec", container, "toppy-gw", "audit", "tail")
        assert "gateway.started" in said
        there = engine.docker("exec", container, "stat", "--format=%a %u", "/var/lib/toppy-gw")
        assert there == "700 10001"


def test_image_names_its_signal_ports_user_and_health_check(engine: Engine, context: Path) -> None:
    config = engine.inspect(IMAGE)["Config"]
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"4433/udp", "8080/tcp"}
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Interval"] == 5_000_000_000
    assert config["Entrypoint"] == ["toppy-gw"]
    assert set(config["Volumes"]) == {"/var/lib/toppy-gw"}


def test_a_missing_configuration_is_said_and_ends_with_1(engine: Engine, context: Path) -> None:
    done = engine.run_on_host("docker", "run", "--rm", *CONFINED, IMAGE)
    assert done.returncode == 1
    assert "no authentication is configured" in done.stderr


def test_client_is_in_the_image(engine: Engine, context: Path) -> None:
    said = engine.docker("run", "--rm", *CONFINED, "--entrypoint", "toppy", IMAGE, "--version")
    assert said.startswith("toppy ")
