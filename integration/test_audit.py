"""The audit log of real gateways and clients: what it tells, and that nothing is missing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.audit import (
    AUDIT,
    HttpCollector,
    client_environment,
    echo_through,
    echoes,
    entries_of,
    events,
    gateway_command,
    kick_nobody,
    log_of,
    send,
    verify,
    wait_for,
)
from integration.conftest import Peer
from integration.processes import (
    BIN,
    Gateway,
    run_command,
    running_gateway,
    running_udp_client,
    start,
    wait_until,
    write_client_config,
)


def test_a_tunnel_is_recorded_from_its_opening_to_its_end(directory: Path, echo: Peer) -> None:
    target = f"127.0.0.1:{echo.port}"
    with running_gateway(directory, extra=AUDIT) as gateway:
        environ = client_environment(gateway)
        with running_udp_client(gateway, target, environ=environ) as (port, _):
            echo_through(port)
            (opened,) = wait_for(gateway, "tunnel.opened")
            assert not events(gateway, "tunnel.closed")
        (closed,) = wait_for(gateway, "tunnel.closed")
        assert verify(gateway)["ok"]
    assert (opened.target, opened.actor, opened.allowed) == (target, "127.0.0.1", True)
    assert (opened.subject, opened.facts["rule"]) == ("token", "loopback")
    assert closed.facts["tunnel"] == opened.facts["tunnel"]
    assert closed.facts["datagrams_to_target"] == closed.facts["datagrams_to_client"] == "3"
    assert closed.facts["bytes_to_target"] == closed.facts["bytes_to_client"] == "15"
    assert closed.facts["drops"] == "0"
    assert closed.reason
    actions = [entry.action for entry in entries_of(log_of(gateway))]
    assert actions == ["gateway.started", "tunnel.opened", "tunnel.closed", "gateway.stopped"]
    assert verify(gateway)["entries"] == 4


def test_the_client_records_its_side(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        environ = client_environment(gateway)
        target = f"127.0.0.1:{echo.port}"
        with running_udp_client(gateway, target, environ=environ) as (port, _):
            echo_through(port)
        path = Path(environ["TOPPY_AUDIT_LOG"])
        udp, closed = entries_of(path)
        assert (udp.action, udp.target, udp.actor, udp.allowed) == ("udp", target, "alice", True)
        assert (closed.action, closed.facts["datagrams_out"]) == ("udp.closed", "3")
        config = str(write_client_config(gateway, gateway.directory / "none.toml", extra=""))
        text = Path(config).read_text().partition("[policy]")[0]
        Path(config).write_text(text)
        denied = run_command(
            *("toppy", "udp", "--config", config, "--listen", "127.0.0.1:0", "--target", target),
            env={**os.environ, **environ},
        )
        assert denied.returncode == 2
        last = entries_of(path)[-1]
        assert (last.action, last.allowed) == ("udp", False)
        assert "not allowed" in last.reason
        run_command("toppy", "doctor", "--config", config, env={**os.environ, **environ})
        assert entries_of(path)[-1].action == "doctor"
        done = run_command("toppy", "audit", "verify", env={**os.environ, **environ})
        assert (done.returncode, done.stdout) == (0, f"audit ok: {path}\n")
        assert entries_of(path)[-1].action == "audit.verify"


def test_denials_and_failed_authentications_are_recorded(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:
        with running_udp_client(gateway, "192.0.2.1:53") as (port, _):
            send(port)
            denied = wait_for(gateway, "tunnel.denied")[0]
        assert (denied.target, denied.allowed, denied.subject) == ("192.0.2.1:53", False, "token")
        assert (denied.facts["status"], denied.facts["rule"]) == ("403", "default")
        (gateway.directory / "token").write_text("another token\n")
        gateway_command(gateway, "reload", "--policy-only")
        with running_udp_client(gateway, f"127.0.0.1:{echo.port}", name="late") as (port, _):
            send(port)
            failed = wait_for(gateway, "auth.failed")[0]
        assert (failed.allowed, failed.subject, failed.facts["status"]) == (False, None, "401")
        (reload,) = events(gateway, "reload")
        assert reload.allowed
        assert verify(gateway)["ok"]


def test_revocation_and_operators_are_recorded(directory: Path, echo: Peer) -> None:
    target = f"127.0.0.1:{echo.port}"
    with running_gateway(directory, extra=AUDIT) as gateway:
        with running_udp_client(gateway, target) as (port, _):
            echo_through(port)
            gateway_command(gateway, "kick", "token")
            (kicked,) = wait_for(gateway, "tunnel.closed")
            assert "operator" in kicked.reason
            (asked,) = events(gateway, "admin.kick")
            assert (asked.actor, asked.target) == ("operator", "token")
            with contextlib.suppress(TimeoutError):
                wait_until("echo", lambda: echoes(port))
            text = (gateway.directory / "gateway.toml").read_text()
            (gateway.directory / "gateway.toml").write_text(
                text.replace('name = "loopback"\naction = "allow"', 'name = "no"\naction = "deny"')
            )
            gateway_command(gateway, "reload", "--policy-only")
            revoked = wait_for(gateway, "tunnel.revoked")[0]
            assert (revoked.target, revoked.facts["rule"]) == (target, "no")
            closed = wait_for(gateway, "tunnel.closed", 2)[1]
            assert closed.facts["tunnel"] == revoked.facts["tunnel"]
        assert verify(gateway)["ok"]


def test_a_worker_that_dies_closes_its_tunnels_in_the_log(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:
        with running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, _):
            echo_through(port)
            (opened,) = wait_for(gateway, "tunnel.opened")
            os.kill(gateway.status()["workers"][0]["pid"], signal.SIGKILL)
            (died,) = wait_for(gateway, "worker.died")
            closed = wait_for(gateway, "tunnel.closed")[0]
        assert (died.facts["exit_code"], died.facts["tunnels"]) == ("-9", "1")
        assert (closed.reason, closed.facts["tunnel"]) == (
            "its worker died",
            opened.facts["tunnel"],
        )


def test_the_chain_goes_on_after_a_crash_of_the_control_plane(directory: Path, echo: Peer) -> None:
    with (
        running_gateway(directory, extra=AUDIT) as gateway,
        running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, client),
    ):
        echo_through(port)
        wait_for(gateway, "tunnel.opened")
        os.kill(gateway.running.pid, signal.SIGKILL)
        gateway.running.process.wait()
        # an entry that was never finished
        with log_of(gateway).open("ab") as file:
            file.write(b'{"version":1,"seq":')
        client.stop()  # the tunnel ends while nobody listens to its worker
        with _restarted(gateway):
            assert len(wait_for(gateway, "gateway.started", 2)) == 2
            (closed,) = wait_for(gateway, "tunnel.closed")
            assert closed.facts["datagrams_to_target"] == "3"
            assert len(events(gateway, "audit.recovered")) == 1
            assert verify(gateway)["ok"]


@contextlib.contextmanager
def _restarted(gateway: Gateway) -> Iterator[None]:
    running = start(
        [BIN / "toppy-gw", "run", "--config", gateway.directory / "gateway.toml"],
        gateway.directory / "second.log",
    )
    try:
        running.wait_for_output("gateway serves")
        yield
    finally:
        running.stop()


def test_the_chain_goes_on_across_an_upgrade_and_a_reload(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:
        with running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, _):
            echo_through(port)
            gateway_command(gateway, "reload")
            gateway_command(gateway, "upgrade")
            assert echoes(port)
            actions = {entry.action for entry in entries_of(log_of(gateway))}
            assert {"reload", "admin.upgrade", "gateway.started", "tunnel.opened"} <= actions
            assert verify(gateway)["ok"]

        def all_closed() -> bool:
            opened = {e.facts["tunnel"] for e in events(gateway, "tunnel.opened")}
            return opened == {e.facts["tunnel"] for e in events(gateway, "tunnel.closed")}

        wait_until("every tunnel's end", all_closed)
        assert verify(gateway)["ok"]


def test_two_gateways_do_not_write_one_log(directory: Path, tmp_path: Path) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:
        extra = AUDIT.replace("audit/audit.jsonl", str(log_of(gateway)))
        with (
            pytest.raises(AssertionError, match="another process writes"),
            running_gateway(tmp_path / "g2", extra=extra),
        ):
            pass


def test_a_log_that_was_cut_keeps_a_gateway_from_starting(directory: Path) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:
        wait_for(gateway, "gateway.started")
    log = log_of(gateway)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    config = str(directory / "gateway.toml")
    done = run_command("toppy-gw", "audit", "verify", "--config", config)
    assert done.returncode == 1
    assert done.stdout.startswith(f"audit invalid: {log}: truncated: ")
    started = run_command("toppy-gw", "run", "--config", config)
    assert started.returncode == 1
    assert "was cut or replaced" in started.stderr


def test_without_room_for_the_log_no_tunnel_opens(directory: Path, echo: Peer) -> None:
    with running_gateway(directory, extra=AUDIT + "queue_events = 100\n") as gateway:
        wait_for(gateway, "gateway.started")
        log = log_of(gateway)
        away = log.with_name("away.jsonl")
        log.rename(away)
        log.mkdir()  # nobody can open it as a file
        for _ in range(110):  # fills the queue: an operator asks for what is not there
            kick_nobody(gateway)
        facts = gateway.status()["audit"]
        assert facts["waiting"] == 100
        assert facts["lost"] == 10
        assert facts["problem"]
        with running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, client):
            send(port)
            client.wait_for_output("cannot write its audit log")
            log.rmdir()
            away.rename(log)
            wait_until("echo", lambda: echoes(port))
        assert int(wait_for(gateway, "audit.lost")[0].facts["count"]) >= 11
        assert verify(gateway)["ok"]


def test_a_collector_gets_everything_even_after_an_outage(directory: Path, echo: Peer) -> None:
    collector = HttpCollector(is_up=False)
    with collector.serving():
        shipping = (
            AUDIT
            + f'ship_url = "{collector.url}/entries"\nship_token = "collector-token"\n'
            + "ship_retries = 0\nship_batch_size = 4\n"
        )
        with running_gateway(directory, extra=shipping) as gateway:
            with running_udp_client(gateway, f"127.0.0.1:{echo.port}") as (port, _):
                echo_through(port)
            wait_for(gateway, "tunnel.closed")
            assert not collector.bodies
            gateway.running.wait_for_output("audit entries are not shipped")
            collector.is_up = True
            wait_until("shipping", lambda: len(collector.entries) >= 3)
        config = str(directory / "gateway.toml")
        shipped = run_command("toppy-gw", "audit", "ship", "--config", config)
        assert shipped.returncode == 0, shipped.stderr
        lines = log_of(gateway).read_bytes().splitlines()
        assert collector.entries == [json.loads(line) for line in lines]
        assert collector.tokens == {"Bearer collector-token"}
        remote = run_command(
            *("toppy-gw", "audit", "remote-verify", "--config", config),
            *("--url", f"{collector.url}/verify"),
        )
        assert (remote.returncode, remote.stdout) == (
            0,
            f"audit remote ok: {log_of(gateway)}: compared\n",
        )
        collector.bodies[0][0]["hash"] = "another"
        remote = run_command(
            *("toppy-gw", "audit", "remote-verify", "--config", config),
            *("--url", f"{collector.url}/verify"),
        )
        assert remote.returncode == 1
        assert remote.stdout.startswith("audit remote invalid")
