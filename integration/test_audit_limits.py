"""The audit log under pressure: a full disk, strangers without end, a collector that is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.audit import (
    AUDIT,
    HttpCollector,
    entries_of,
    events,
    kick_nobody,
    log_of,
    verify,
    wait_for,
)
from integration.conftest import Peer
from integration.masque_client import DEADLINE_S, ask, connected_engine, open_tunnel, run
from integration.processes import Gateway, running_gateway, wait_until
from toppy.observe.audit_reader import log_files

DISK_BYTES = 256 << 10
KICKS = 130
"""More than wait in the queue and fit the last page of the disk."""


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 256 KiB where the gateway's audit log is."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small disk")
    place = directory / "audit"
    place.mkdir(mode=0o700)
    options = f"size={DISK_BYTES},mode=0700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "toppy-test", place],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """Something else takes all the room."""
    file = disk / "somebody-elses"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))
    return file


@pytest.mark.parametrize("when_full", ["refuse", "drop"])
def test_a_full_disk_is_told_and_nothing_is_lost_that_was_promised(
    directory: Path, echo: Peer, small_disk: Path, when_full: str
) -> None:
    extra = AUDIT + f'queue_events = 100\nwhen_full = "{when_full}"\n'
    with running_gateway(directory, extra=extra) as gateway:
        wait_for(gateway, "gateway.started")
        filler = fill(small_disk)
        for _ in range(KICKS):
            kick_nobody(gateway)
        facts = gateway.status()["audit"]
        assert "No space left" in facts["problem"]
        assert (facts["waiting"], facts["lost"] > 0) == (100, True)
        metrics = gateway.metrics()
        assert metrics["toppy_gw_audit_writable"] == 0
        assert metrics["toppy_gw_audit_waiting"] == 100
        assert metrics["toppy_gw_audit_write_failures_total"] >= 1
        gateway.running.wait_for_output("the audit log cannot be written")

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                answer = await ask(client, echo.host, echo.port).answer()
                if when_full == "refuse":
                    assert (answer.status, answer.proxy_status.error) == (
                        503,
                        "proxy_internal_error",
                    )
                    assert "audit log" in answer.proxy_status.details
                else:
                    assert answer.status == 200
                filler.unlink()
                async with asyncio.timeout(DEADLINE_S):
                    while gateway.status()["audit"]["waiting"]:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
                await open_tunnel(client, echo.host, echo.port)

        run(scenario())
        # every event is there, or in the count of those that are not
        kicks = len(events(gateway, "admin.kick"))
        lost = sum(int(entry.facts["count"]) for entry in events(gateway, "audit.lost"))
        assert lost == gateway.metrics()["toppy_gw_audit_lost_total"]
        assert kicks >= 100
        assert kicks + lost >= KICKS
        assert gateway.metrics()["toppy_gw_audit_writable"] == 1
        assert verify(gateway)["ok"]


def test_strangers_cannot_grow_the_log_without_end(directory: Path) -> None:
    guesses = 5 * 10  # fewer than limits.max_failed_auth_per_source_per_min

    async def scenario(gateway: Gateway) -> None:
        for _ in range(5):
            async with connected_engine(gateway) as guesser:
                for number in range(10):
                    ask(guesser, "localhost", 9, token=f"guess-number-{number}")
                async with asyncio.timeout(20):
                    assert "authentication" in await guesser.closed

    with running_gateway(directory, extra=AUDIT) as gateway:
        run(scenario(gateway))
        wait_until(
            "every refusal",
            lambda: gateway.metric("toppy_gw_admissions_total", outcome="401") >= guesses,
        )
        assert len(events(gateway, "auth.failed")) == 1
    # the rest is written when the gateway ends, if not before
    first, repeated = events(gateway, "auth.failed")
    assert (first.actor, first.target) == ("127.0.0.1", "localhost:9")
    assert (repeated.actor, repeated.reason) == (first.actor, first.reason)
    assert 1 + int(repeated.facts["count"]) == guesses


def test_requests_that_are_refused_unread_are_recorded_with_their_count(
    directory: Path, echo: Peer
) -> None:
    async def scenario(gateway: Gateway) -> None:
        async with connected_engine(gateway) as client:
            for _ in range(5):
                assert (await ask(client, "localhost", 0).answer()).status == 400
            await open_tunnel(client, echo.host, echo.port)
            for _ in range(3):
                assert (await ask(client, echo.host, echo.port).answer()).status == 429

    limits = "[limits]\nmax_tunnels_per_connection = 1\n"
    with running_gateway(directory, extra=AUDIT + "repeat_interval_s = 1\n" + limits) as gateway:
        run(scenario(gateway))

        def counted(status: str) -> int:
            return sum(
                int(entry.facts.get("count", 1))
                for entry in events(gateway, "tunnel.denied")
                if entry.facts["status"] == status
            )

        wait_until("both counts", lambda: (counted("400"), counted("429")) == (5, 3))
        (full, *_) = (e for e in events(gateway, "tunnel.denied") if e.facts["status"] == "429")
        assert (full.actor, full.allowed) == ("127.0.0.1", False)
        assert full.target == f"{echo.host}:{echo.port}"
        assert verify(gateway)["ok"]


def test_old_files_are_deleted_once_they_are_shipped(directory: Path) -> None:
    collector = HttpCollector(is_up=False)
    with collector.serving():
        extra = (
            AUDIT
            + "rotate_bytes = 4000\nkeep_files = 1\nship_retries = 0\nship_timeout_s = 5\n"
            + f'ship_url = "{collector.url}/entries"\n'
        )
        with running_gateway(directory, extra=extra) as gateway:
            wait_for(gateway, "gateway.started")
            for _ in range(40):
                kick_nobody(gateway)
            wait_until("every entry", lambda: len(events(gateway, "admin.kick")) == 40)
            kept = log_files(log_of(gateway))
            assert len(kept) > 3  # the collector has nothing of it
            metrics = gateway.metrics()
            assert metrics["toppy_gw_audit_ship_backlog_entries"] == 41
            assert metrics["toppy_gw_audit_ship_failures_total"] >= 1
            collector.is_up = True
            wait_until("shipping", lambda: gateway.status()["audit"]["shipped"] == 41, 30.0)

            def are_few() -> bool:
                kick_nobody(gateway)  # the next rotation looks for what need not be kept
                return len(log_files(log_of(gateway))) <= 2

            wait_until("deletion", are_few, 30.0)
            assert not kept[0].exists()
            assert events(gateway, "audit.retired")
            found = verify(gateway)
            assert found["ok"]
            assert "a checkpoint tells how they ended" in found["notes"][0]
            last = entries_of(log_of(gateway))[-1]
            assert last
        sequence = [entry["seq"] for entry in collector.entries]
        assert sequence == list(range(1, len(sequence) + 1))  # none is missing


def test_what_a_full_channel_does_not_take_is_refused_and_recorded_later(
    directory: Path, echo: Peer
) -> None:
    asked, waiting = 12, 4

    async def scenario(gateway: Gateway) -> list[int]:
        async with connected_engine(gateway) as client:
            await open_tunnel(client, echo.host, echo.port)  # all is well
            os.kill(gateway.running.pid, signal.SIGSTOP)  # nobody reads what workers say
            try:
                tunnels = [ask(client, echo.host, echo.port) for _ in range(asked)]
                refused = [await tunnel.answer() for tunnel in tunnels[waiting:]]
            finally:
                os.kill(gateway.running.pid, signal.SIGCONT)
            granted = [await tunnel.answer() for tunnel in tunnels[:waiting]]
            return [answer.status for answer in (*granted, *refused)]

    extra = AUDIT + f"repeat_interval_s = 1\n[limits]\nmax_pending_admissions = {waiting}\n"
    with running_gateway(directory, extra=extra) as gateway:
        assert run(scenario(gateway)) == [200] * waiting + [429] * (asked - waiting)
        assert len(wait_for(gateway, "tunnel.closed", 1 + waiting)) == 1 + waiting
        assert len(events(gateway, "tunnel.opened")) == 1 + waiting

        def denied() -> int:
            return sum(int(e.facts.get("count", 1)) for e in events(gateway, "tunnel.denied"))

        wait_until("every refusal", lambda: denied() == asked - waiting)
        assert gateway.status()["audit"]["lost"] == 0
        assert verify(gateway)["ok"]
