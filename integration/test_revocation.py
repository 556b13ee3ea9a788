"""What is denied ends, whatever its worker does meanwhile; and what was asked for in haste."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from integration.conftest import Peer
from integration.masque_client import connected, open_tunnel, run
from integration.operation import (
    change_config,
    gateway_log,
    operate,
    operate_meanwhile,
    worker_pids,
)
from integration.processes import running_gateway, wait_until

DENY = """[[policy.rules]]
name = "no more"
action = "deny"
ports = ["1-65535"]
cidr = ["0.0.0.0/0"]

[[policy.rules]]
name = "loopback\""""


def test_a_worker_that_stands_still_is_reported_and_cuts_what_is_denied_when_it_goes_on(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory) as gateway:

        async def scenario() -> None:
            async with connected(gateway, "stranger") as client:
                tunnel = await open_tunnel(client, echo.host, echo.port)
                await tunnel.echo(b"allowed")
                worker = worker_pids(gateway)["s0"]
                change_config(gateway, '[[policy.rules]]\nname = "loopback"', DENY)
                os.kill(worker, signal.SIGSTOP)
                try:
                    facts = await operate_meanwhile(gateway, "reload", "--policy-only")
                finally:
                    os.kill(worker, signal.SIGCONT)
                (warning,) = facts["warnings"]
                assert warning.startswith("s0 did not answer: ")
                async with asyncio.timeout(10):
                    await tunnel.has_ended.wait()

        run(scenario())
        wait_until("the list", lambda: operate(gateway, "tunnels")["tunnels"] == [])
        events = [line["event"] for line in gateway_log(gateway)]
        assert "worker has not confirmed the policy, it is asked on" in events
        assert "tunnel cut: the policy denies it now" in events


def test_many_signals_at_once_are_a_reload_or_two(directory: Path) -> None:
    with running_gateway(directory) as gateway:
        for _ in range(200):
            os.kill(gateway.running.pid, signal.SIGHUP)

        def reloads() -> int:
            return [line["event"] for line in gateway_log(gateway)].count("reloaded")

        wait_until("a reload", lambda: reloads() > 0)
        wait_until("quiet", lambda: gateway.status()["rollout"] == "idle")
        newest = gateway.status()["generation"]
        wait_until(
            "the earlier ones' end",
            lambda: [g["generation"] for g in gateway.status()["generations"]] == [newest],
        )
        assert reloads() == newest - 1 <= 3
