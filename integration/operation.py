"""What an operator does to a running gateway, and sees of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import psutil

from integration.conftest import Peer
from integration.masque_client import EngineClient, connected_engine, open_tunnel
from integration.processes import Gateway, run_command, wait_until

LOAD_RATES = {"native": 20_000.0, "aioquic": 1_500.0}
"""Datagrams per second that an engine echoes on two cores, whatever else happens."""


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
