"""What is denied ends, whatever its worker does meanwhile; and what was asked for in haste."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import jwt

from integration.audit import AUDIT, events, wait_for
from integration.conftest import Peer
from integration.masque_client import (
    Tunnel,
    ask,
    connected,
    connected_engine,
    open_tunnel,
    run,
)
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


SECRET = "a secret that only the issuer knows"
PEOPLE = """
[[policy.roles]]
role = "ops"
groups = ["operations"]
[[policy.rules]]
name = "by role"
action = "allow"
cidr = ["127.0.0.1/32"]
roles = ["ops"]
[[policy.rules]]
name = "by subject"
action = "allow"
cidr = ["127.0.0.1/32"]
subjects = ["alice", "erin"]
[[policy.rules]]
name = "removed"
action = "allow"
cidr = ["127.0.0.1/32"]
subjects = ["carol"]
[[policy.rules]]
name = "turned"
action = "allow"
cidr = ["127.0.0.1/32"]
subjects = ["dave"]
[[policy.rules]]
name = "static"
action = "allow"
cidr = ["127.0.0.1/32"]
subjects = ["token"]
"""


TIMED = """[[policy.rules]]
name = "for now"
action = "allow"
cidr = ["127.0.0.1/32"]
ports = [{port}]
when = {{ not_after = {moment} }}
[[policy.rules]]
name = "closing time"
action = "deny"
ports = [64998]
when = {{ not_before = {moment} }}
[[policy.rules]]
ports = [64998, 64999]
name = "loopback\""""


def token(subject: str, *groups: str) -> str:
    claims = {"sub": subject, "exp": time.time() + 300, "groups": list(groups)}
    return jwt.encode(claims, SECRET, "HS256")


async def ended(*tunnels: Tunnel) -> None:
    async with asyncio.timeout(15):
        for tunnel in tunnels:
            await tunnel.has_ended.wait()


def test_whoever_loses_role_subject_rule_or_token_is_cut_and_the_log_says_why(
    directory: Path, echo: Peer
) -> None:
    extra = f'[auth.jwt]\nsecret = "{SECRET}"\n{AUDIT}'
    with running_gateway(directory, rules=PEOPLE, extra=extra) as gateway:
        credentials = {
            "bob": token("bob", "operations"),
            **{name: token(name) for name in ("alice", "carol", "dave", "erin")},
            "token": gateway.token,
        }

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                open_: dict[str, Tunnel] = {}
                for subject, credential in credentials.items():
                    client.token = credential
                    open_[subject] = await open_tunnel(client, echo.host, echo.port)
                    await open_[subject].echo(subject.encode())
                change_config(gateway, '"operations"', '"others"')
                change_config(gateway, '["alice", "erin"]', '["erin"]')
                change_config(gateway, 'subjects = ["carol"]', 'subjects = ["nobody"]')
                change_config(
                    gateway, 'name = "turned"\naction = "allow"', 'name = "turned"\naction = "deny"'
                )
                facts = await operate_meanwhile(gateway, "reload", "--policy-only")
                assert not any("did not answer" in warning for warning in facts["warnings"])
                await ended(*(open_[name] for name in ("bob", "alice", "carol", "dave")))
                await open_["token"].echo(b"not meant")
                (directory / "token").write_text("another token of the gateway's")
                await operate_meanwhile(gateway, "reload", "--policy-only")
                await ended(open_["token"])
                await open_["erin"].echo(b"still allowed")
                assert (await operate_meanwhile(gateway, "kick", "erin"))["closed"] == 1
                await ended(open_["erin"])
                # that was no ban
                client.token = credentials["erin"]
                await open_tunnel(client, echo.host, echo.port)

        run(scenario())
        revoked = {entry.subject: entry for entry in wait_for(gateway, "tunnel.revoked", 5)}
        rules = {subject: entry.facts.get("rule", "") for subject, entry in revoked.items()}
        assert rules == {
            "bob": "default",
            "alice": "default",
            "carol": "default",
            "dave": "turned",
            "token": "",
        }
        assert "denied by 'turned'" in revoked["dave"].reason
        assert "no rule allows it" in revoked["carol"].reason
        assert "token" in revoked["token"].reason
        closed = wait_for(gateway, "tunnel.closed", 6)
        whose = {entry.facts["tunnel"]: entry for entry in closed}
        for entry in revoked.values():
            assert whose[entry.facts["tunnel"]].reason == entry.reason
        assert any("operator" in entry.reason for entry in closed if entry.subject == "erin")
        assert events(gateway, "admin.kick")[0].target == "erin"


def test_tunnels_end_when_the_time_of_their_rule_ends_or_that_of_a_deny_begins(
    directory: Path, echo: Peer
) -> None:
    with running_gateway(directory, extra=AUDIT) as gateway:

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                # its worker knows of no end when it is opened
                denied = await open_tunnel(client, echo.host, 64998)
                moment = datetime.fromtimestamp(time.time() + 4, UTC)
                timed = TIMED.format(port=echo.port, moment=moment.isoformat())
                change_config(gateway, '[[policy.rules]]\nname = "loopback"', timed)
                await operate_meanwhile(gateway, "reload", "--policy-only")
                ending = await open_tunnel(client, echo.host, echo.port)
                lasting = await open_tunnel(client, echo.host, 64999)
                await ended(ending, denied)
                assert time.time() >= moment.timestamp()
                assert not lasting.has_ended.is_set()
                for port, rule in ((echo.port, "default"), (64998, "closing time")):
                    answer = await ask(client, echo.host, port).answer()
                    assert (answer.status, answer.proxy_status.rule) == (403, rule)

        run(scenario())
        closed = {entry.target: entry for entry in wait_for(gateway, "tunnel.closed", 3)}
        assert "not allowed" in closed[f"{echo.host}:{echo.port}"].reason
        assert closed[f"{echo.host}:{echo.port}"].facts["rule"] == "for now"
        revoked = {entry.target: entry for entry in events(gateway, "tunnel.revoked")}
        assert revoked[f"{echo.host}:64998"].facts["rule"] == "closing time"
