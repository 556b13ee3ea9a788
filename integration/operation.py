"""What an operator does to a running gateway, and sees of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.conftest import ENGINES, Peer
from integration.load import LoadReport, RunningLoad, running_load
from integration.masque_client import EngineClient, connected_engine, open_tunnel
from integration.processes import (
    Gateway,
    Running,
    run_command,
    running_udp_client,
    wait_until,
)

BEST_ENGINE = ENGINES[0]
SLOW_RATE = 1_500.0
LOAD_RATES = {"native": 20_000.0, "aioquic": SLOW_RATE}
"""Datagrams per second that an engine echoes on two cores, whatever else happens."""

loads_the_machine = pytest.mark.xdist_group("load")
"""Of tests that need both cores: one after the other."""


def try_operation(gateway: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of ``toppy-gw`` to this gateway, whatever comes of it."""
    return run_command("toppy-gw", *arguments, "--config", str(gateway.directory / "gateway.toml"))


def operate(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """A command that must succeed; its facts."""
    done = try_operation(gateway, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def change_config(gateway: Gateway, old: str, new: str) -> None:
    """Replace a part of its configuration file."""
    path = gateway.directory / "gateway.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def worker_pids(gateway: Gateway) -> dict[str, int]:
    """By name."""
    return {worker["name"]: worker["pid"] for worker in gateway.status()["workers"]}


def generations(gateway: Gateway) -> dict[int, str]:
    """Number and state of each."""
    return {each["generation"]: each["state"] for each in gateway.status()["generations"]}


def wait_for_generations(gateway: Gateway, expected: dict[int, str]) -> None:
    wait_until(f"generations {expected}", lambda: generations(gateway) == expected)


def gateway_log(gateway: Gateway) -> list[dict[str, Any]]:
    """What it has logged so far."""
    lines = gateway.running.output().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def operate_meanwhile(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """``operate`` while the test's clients go on."""
    return await asyncio.to_thread(operate, gateway, *arguments)


async def generation_of(gateway: Gateway, client: EngineClient) -> int:
    """Which generation has this client's connection."""
    source = f"127.0.0.1:{client.socket.local_address[1]}"
    facts = await asyncio.to_thread(gateway.ask, "GET", "/connections")
    for connection in facts["connections"]:
        if connection["source"] == source:
            generation: int = connection["generation"]
            return generation
    raise AssertionError(f"no connection from {source}")


async def echo_on_new_connection(gateway: Gateway, echo: Peer) -> int:
    """A client that comes now is served; by which generation."""
    async with connected_engine(gateway) as client:
        tunnel = await open_tunnel(client, echo.host, echo.port)
        await tunnel.echo(b"served")
        return await generation_of(gateway, client)


def runtime_files(gateway: Gateway) -> list[str]:
    """What is in its runtime directory."""
    return sorted(path.name for path in Path(gateway.directory / "run").iterdir())


@dataclass(frozen=True)
class Loaded:
    """A gateway under load: ``toppy udp`` relays numbered datagrams through it and back."""

    gateway: Gateway
    client: Running
    load: RunningLoad

    def assert_whole(self) -> LoadReport:
        """End the load: everything came back, once and in order; otherwise who knows what of it."""
        report = self.load.stop()
        if not report.is_whole:
            self.client.stop()
            raise AssertionError(
                f"{report}\ngateway: {self.gateway.status()['drops']}, socket overflow "
                f"{self.gateway.metric('toppy_gw_socket_overflow_total')}\n"
                f"client: {self.client.output()[-1000:]}"
            )
        print(report)
        return report


@contextlib.contextmanager
def under_load(
    gateway: Gateway, echo: Peer, *, rate: float = 0.0, engine: str = BEST_ENGINE
) -> Iterator[Loaded]:
    """``rate`` datagrams/s, or what the engine is good for."""
    with (
        running_udp_client(gateway, f"{echo.host}:{echo.port}", engine=engine) as (port, client),
        running_load(port, rate or LOAD_RATES[engine]) as load,
    ):
        yield Loaded(gateway, client, load)
