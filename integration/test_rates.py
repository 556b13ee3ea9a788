"""Limits of a real gateway: what is over them is dropped and counted, also once they change."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.audit import AUDIT, wait_for
from integration.masque_client import (
    Client,
    Tunnel,
    ask,
    connected_engine,
    open_tunnel,
    run,
)
from integration.operation import change_config, gateway_log, operate_meanwhile
from integration.processes import Gateway, free_udp_port, running_gateway, wait_until

pytestmark = pytest.mark.xdist_group("rates")

RATE, BURST = 100_000, 2_000_000
PAYLOAD = b"x" * 1000
BATCH = 20


class Target:
    """A UDP socket of this test; what arrives is counted when somebody looks."""

    def __init__(self) -> None:
        self.port = free_udp_port()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind(("127.0.0.1", self.port))
        self._socket.setblocking(False)
        self.datagrams = 0

    def take(self) -> int:
        """How many have arrived so far."""
        while True:
            try:
                self._socket.recv(2048)
            except BlockingIOError:
                return self.datagrams
            self.datagrams += 1

    def close(self) -> None:
        self._socket.close()


def rule(name: str, port: int, limits: str) -> str:
    return f"""
[[policy.rules]]
name = "{name}"
action = "allow"
cidr = ["127.0.0.0/8"]
ports = [{port}]
limits = {limits}
"""


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    made = {name: Target() for name in ("free", "few", "quota", "shared")}
    yield made
    for target in made.values():
        target.close()


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, targets: dict[str, Target]
) -> Iterator[Gateway]:
    rules = (
        rule("free", targets["free"].port, "{}")
        + rule("few", targets["few"].port, "{ tunnels = 1 }")
        + rule("quota", targets["quota"].port, "{ quota_bytes = 1_048_576 }")
        + AUDIT
    )
    environ = {
        "TOPPY_GW_UDP_BYTES_PER_SEC": str(RATE),
        "TOPPY_GW_UDP_BURST_BYTES": str(BURST),
    }
    with running_gateway(tmp_path_factory.mktemp("gw"), rules=rules, environ=environ) as running:
        yield running


async def send_for(tunnels: list[Tunnel], duration_s: float, targets: list[Target]) -> int:
    """Datagrams through each tunnel, at a pace that nothing but a limit minds; how many in all."""
    sent = 0
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        for tunnel in tunnels:
            tunnel.send_many([PAYLOAD] * BATCH)
            sent += BATCH
        await asyncio.sleep(0.01)
        for target in targets:
            target.take()
    return sent


def counted(gateway: Gateway) -> tuple[float, float]:
    """Datagrams that went to targets, and those that were over a rate."""
    return (
        gateway.metric("toppy_gw_datagrams_total", direction="to_target"),
        gateway.metric("toppy_gw_datagrams_dropped_total", reason="rate_limited"),
    )


async def meanwhile(what: str, condition: Any) -> None:
    """Wait for ``condition`` while the test's clients go on."""
    await asyncio.to_thread(wait_until, what, condition)


def test_what_is_over_the_rate_is_dropped_and_every_datagram_is_accounted_for(
    gateway: Gateway, targets: dict[str, Target]
) -> None:
    target = targets["free"]

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, "127.0.0.1", target.port)
            before = counted(gateway)
            began = time.monotonic()
            sent = await send_for([tunnel], 2.0, [target])

            def is_counted() -> bool:
                now = counted(gateway)
                return now[0] + now[1] - sum(before) >= sent

            await meanwhile("every datagram", is_counted)
            passed, dropped = (b - a for a, b in zip(before, counted(gateway), strict=True))
            assert passed + dropped == sent
            assert dropped > 0
            assert len(PAYLOAD) * passed <= BURST + RATE * (time.monotonic() - began)
            await meanwhile("their arrival", lambda: target.take() == passed)

    run(scenario())


def test_a_rule_with_enough_tunnels_answers_when_to_ask_again(
    gateway: Gateway, targets: dict[str, Target]
) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            first = await open_tunnel(client, "127.0.0.1", targets["few"].port)
            answer = await ask(client, "127.0.0.1", targets["few"].port).answer()
            assert answer.status == 429
            assert answer.fields["retry-after"] == "1"
            assert answer.proxy_status.rule == "few"
            first.end()
            await first_grant(client, targets["few"].port)

    run(scenario())


async def first_grant(client: Client, port: int) -> None:
    """Ask until there is room."""
    for _ in range(100):
        if (await ask(client, "127.0.0.1", port).answer()).status == 200:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("there was no room")


def test_a_quota_that_is_used_up_ends_the_tunnel_and_is_recorded(
    gateway: Gateway, targets: dict[str, Target]
) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, "127.0.0.1", targets["quota"].port)
            sending = asyncio.create_task(send_for([tunnel], 5.0, [targets["quota"]]))
            async with asyncio.timeout(10):
                await tunnel.has_ended.wait()
            sending.cancel()
            assert targets["quota"].take() * len(PAYLOAD) <= 1_048_576
            answer = await ask(client, "127.0.0.1", targets["quota"].port).answer()
            assert answer.status == 429
            assert answer.proxy_status.rule == "quota"
            assert int(answer.fields["retry-after"]) > 0

    run(scenario())
    (entry,) = wait_for(gateway, "tunnel.revoked")
    assert entry.reason.startswith("the quota of 1048576 bytes is used up")
    assert entry.facts["rule"] == "quota"


def test_who_guesses_credentials_is_told_to_wait_and_who_showed_a_good_one_goes_on(
    gateway: Gateway, targets: dict[str, Target]
) -> None:
    async def scenario() -> None:
        port = targets["free"].port
        statuses: list[int] = []
        async with connected_engine(gateway) as neighbour:
            await open_tunnel(neighbour, "127.0.0.1", port)
            while 429 not in statuses:
                async with connected_engine(gateway) as guesser:
                    for number in range(9):  # it is closed after ten
                        guess = ask(guesser, "127.0.0.1", port, token=f"no {number}")
                        statuses.append((await guess.answer()).status)
            await open_tunnel(neighbour, "127.0.0.1", port)
        assert statuses[:60] == [401] * 60

    run(scenario())


def test_other_rates_hold_for_live_tunnels_without_a_pause(
    gateway: Gateway, targets: dict[str, Target]
) -> None:
    """The last test of this gateway: it changes its rules."""
    target = targets["free"]

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, "127.0.0.1", target.port)
            rates = "{ bytes_per_sec = 1_000, burst_bytes = 2_000 }"
            change_config(gateway, "limits = {}", f"limits = {rates}")
            await operate_meanwhile(gateway, "reload", "--policy-only")
            before = target.take()
            began = time.monotonic()
            await send_for([tunnel], 0.5, [target])
            passed = target.take() - before
            assert 0 < passed * len(PAYLOAD) <= 2_000 + 1_000 * (time.monotonic() - began)
            assert not tunnel.has_ended.is_set()
            change_config(gateway, f"limits = {rates}", "limits = {}")
            await operate_meanwhile(gateway, "reload", "--policy-only")
            before = target.take()
            tunnel.send_many([PAYLOAD] * BATCH)
            await meanwhile("all of them", lambda: target.take() - before == BATCH)

    run(scenario())
    assert not [line for line in gateway_log(gateway) if line["level"] == "error"]


def are_shared(gateway: Gateway) -> bool:
    return all(worker["connections"] for worker in gateway.status()["workers"])


def test_two_workers_share_the_rate_of_a_rule(directory: Path, targets: dict[str, Target]) -> None:
    target = targets["shared"]
    rate, burst = 200_000, 65_536
    limits = f"{{ bytes_per_sec = {rate}, burst_bytes = {burst} }}"
    with running_gateway(
        directory, workers=2, rules=rule("shared", target.port, limits)
    ) as gateway:

        async def scenario() -> None:
            async with asyncio.timeout(30):
                clients = [connected_engine(gateway) for _ in range(12)]
                tunnels = [
                    await open_tunnel(await client.__aenter__(), "127.0.0.1", target.port)
                    for client in clients
                ]
                await meanwhile("connections at both", lambda: are_shared(gateway))
                began = time.monotonic()
                await send_for(tunnels, 2.0, [target])
                passed = target.take() * len(PAYLOAD)
                # until the parts are told, the first worker has more than its own
                elapsed_s = time.monotonic() - began + 1.0
                for client in clients:
                    await client.__aexit__(None, None, None)
            assert 0 < passed <= 2 * burst + rate * elapsed_s

        run(scenario())
