"""The policy of a running gateway: which rule decides, and names that DNS plays tricks with."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner

from integration.audit import AUDIT, Entry, events
from integration.conftest import Peer, name_server
from integration.masque_client import Answer, ask, connected_engine, open_tunnel, run
from integration.operation import operate_meanwhile
from integration.processes import Gateway, free_udp_port, running_gateway, wait_until
from tests.net.dns_server import DnsServer
from toppy.cli import toppy_gw

pytestmark = pytest.mark.xdist_group("policy")

SECRET = "a secret that only the issuer knows"
RULES = """
[[policy.roles]]
role = "ops"
groups = ["operations"]
[[policy.rules]]
name = "alice's echo"
action = "allow"
cidr = ["127.0.0.1/32", "127.0.0.2/32"]
subjects = ["alice"]
[[policy.rules]]
name = "echo for ops"
action = "allow"
cidr = ["127.0.0.1/32"]
roles = ["ops"]
[[policy.rules]]
name = "the internet"
action = "allow"
cidr = ["0.0.0.0/0", "::/0"]
ports = ["1024-65535"]
[[policy.rules]]
name = "not the second address"
action = "deny"
cidr = ["127.0.0.2/32"]
[[policy.rules]]
name = "never by this name"
action = "deny"
host = "*.never.example.test"
"""


@dataclass
class TurningDns(DnsServer):
    """``turns``: what a name's A record is at each question, the last one for good."""

    turns: dict[str, list[list[str]]] = field(default_factory=dict)

    def answer(self, wire: bytes, *, over_tcp: bool) -> bytes | None:
        for name, turns in self.turns.items():
            asked = self.asked[name, "A"]
            self.records[name, "A"] = turns[min(asked, len(turns) - 1)]
        return super().answer(wire, over_tcp=over_tcp)


@pytest.fixture(scope="module")
def names() -> Iterator[TurningDns]:
    # a TTL of 0: every tunnel asks anew
    with name_server(TurningDns(ttl_s=0)) as server:
        assert isinstance(server, TurningDns)
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, names: TurningDns) -> Iterator[Gateway]:
    extra = f"""
[resolver]
nameservers = ["{names.address}"]
[auth.jwt]
secret = "{SECRET}"
{AUDIT}
"""
    with running_gateway(tmp_path_factory.mktemp("gw"), rules=RULES, extra=extra) as running:
        yield running


def token(subject: str, **claims: Any) -> str:
    whole = {"sub": subject, "exp": time.time() + 300, **claims}
    return jwt.encode(whole, SECRET, "HS256")


def answer_for(gateway: Gateway, host: str, port: int, credential: str) -> Answer:
    async def scenario() -> Answer:
        async with connected_engine(gateway) as client:
            return await ask(client, host, port, token=credential).answer()

    return run(scenario())


def checked(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """What ``toppy-gw policy check`` says."""
    config = str(gateway.directory / "gateway.toml")
    done = CliRunner().invoke(
        toppy_gw.app,
        ["policy", "check", "--config", config, "--json", "--protocol", "udp", *arguments],
    )
    assert done.exit_code in (0, 2), done.output
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["allowed"] is (done.exit_code == 0)
    return facts


def recorded(gateway: Gateway, action: str, target: str, count: int = 1) -> list[Entry]:
    """The audit log's entries about one target, once there are so many."""

    def found() -> list[Entry]:
        return [entry for entry in events(gateway, action) if entry.target == target]

    wait_until(f"{count} x {action} of {target}", lambda: len(found()) >= count)
    return found()


@pytest.mark.parametrize(
    ("subject", "group", "host", "rule", "is_allowed"),
    [
        ("alice", "", "127.0.0.1", "alice's echo", True),
        ("bob", "operations", "127.0.0.1", "echo for ops", True),
        ("bob", "sales", "127.0.0.1", "default", False),
        ("alice", "", "127.0.0.2", "not the second address", False),
        ("alice", "", "two.example.test", "alice's echo", True),
        ("alice", "", "a.never.example.test", "never by this name", False),
        ("bob", "", "private.example.test", "default", False),
    ],
)
def test_the_answer_the_audit_log_and_the_check_name_the_same_rule(
    gateway: Gateway,
    names: TurningDns,
    *,
    subject: str,
    group: str,
    host: str,
    rule: str,
    is_allowed: bool,
) -> None:
    names.records["two.example.test", "A"] = ["127.0.0.2", "127.0.0.1"]
    names.records["private.example.test", "A"] = ["10.1.2.3"]
    port = free_udp_port()
    answer = answer_for(gateway, host, port, token(subject, groups=[group] if group else []))
    assert answer.status == (200 if is_allowed else 403)
    action = "tunnel.opened" if is_allowed else "tunnel.denied"
    (entry,) = recorded(gateway, action, f"{host}:{port}")
    groups = ("--group", group) if group else ()
    facts = checked(gateway, "--subject", subject, *groups, "--target", f"{host}:{port}")
    assert facts["allowed"] is is_allowed
    assert entry.facts["rule"] == facts["rule"] == rule
    assert entry.subject == subject
    if not is_allowed:
        word = answer.proxy_status
        assert word.rule == rule
        assert word.details == facts["reason"] == entry.reason


def test_what_a_token_says_of_roles_gives_none(gateway: Gateway) -> None:
    boasts = {"roles": ["ops"], "role": "ops", "admin": True, "group": "operations"}
    port = free_udp_port()
    answer = answer_for(gateway, "127.0.0.1", port, token("bob", **boasts))
    assert (answer.status, answer.proxy_status.rule) == (403, "default")
    forged = jwt.encode(
        {"sub": "bob", "exp": time.time() + 300, "groups": ["operations"]},
        "a secret of the client's own choice",
        "HS256",
    )
    assert answer_for(gateway, "127.0.0.1", port, forged).status == 401


def test_a_name_with_an_allowed_and_a_denied_address_leads_to_the_allowed_one(
    gateway: Gateway, names: TurningDns, echo: Peer
) -> None:
    names.records["mixed.example.test", "A"] = ["127.0.0.2", "10.1.2.3", echo.host]

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            client.token = token("alice")
            tunnel = await open_tunnel(client, "mixed.example.test", echo.port)
            await tunnel.echo(b"to the allowed one")

    run(scenario())
    (opened,) = recorded(gateway, "tunnel.opened", f"mixed.example.test:{echo.port}")
    assert opened.facts["addresses"] == echo.host


def test_a_name_that_changes_after_the_check_moves_no_tunnel(
    gateway: Gateway, names: TurningDns, echo: Peer
) -> None:
    name = "rebinding.example.test"
    names.turns[name] = [[echo.host], ["127.0.0.2"]]

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            client.token = token("alice")
            tunnel = await open_tunnel(client, name, echo.port)
            assert names.asked[name, "A"] == 1
            await tunnel.echo(b"where it was checked")
            later = await ask(client, name, echo.port).answer()
            assert (later.status, later.proxy_status.rule) == (403, "not the second address")
            asked = names.asked[name, "A"]
            await operate_meanwhile(gateway, "reload", "--policy-only")
            await tunnel.echo(b"and where it stays")
            assert names.asked[name, "A"] == asked == 2

    run(scenario())


def test_a_name_that_changes_all_the_time_opens_tunnels_to_the_allowed_address_only(
    gateway: Gateway, names: TurningDns, echo: Peer
) -> None:
    name = "turning.example.test"
    names.turns[name] = [[("127.0.0.2", echo.host)[n % 2]] for n in range(20)]

    async def scenario() -> list[int]:
        async with connected_engine(gateway) as client:
            client.token = token("alice")
            statuses = []
            for _ in range(20):
                tunnel = ask(client, name, echo.port)
                statuses.append((await tunnel.answer()).status)
                if statuses[-1] == 200:
                    await tunnel.echo(b"whose echo")
            return statuses

    assert run(scenario()) == [403, 200] * 10
    opened = recorded(gateway, "tunnel.opened", f"{name}:{echo.port}", 10)
    assert [entry.facts["addresses"] for entry in opened] == [echo.host] * 10


def test_a_name_that_points_at_the_gateway_leads_nowhere(
    gateway: Gateway, names: TurningDns
) -> None:
    names.records["self.example.test", "A"] = ["127.0.0.1"]
    # a rule names that address, and still the gateway is no target of its own
    for host in ("self.example.test", "127.0.0.1"):
        answer = answer_for(gateway, host, gateway.port, token("alice"))
        assert answer.status == 508
        word = answer.proxy_status
        assert (word.error, word.rule) == ("proxy_loop_detected", "")
        assert "127.0.0.1 is the gateway itself" in word.details
        facts = checked(
            gateway, "--subject", "alice", "--target", f"{host}:{gateway.port}", "--explain"
        )
        assert (facts["rule"], facts["reason"]) == ("default", word.details)
    health = f"self.example.test:{gateway.health_port}"
    said = checked(gateway, "--subject", "alice", "--protocol", "tcp", "--target", health)
    assert (said["allowed"], said["rule"]) == (False, "default")
    # whoever has no rule for loopback reaches nothing of the gateway's host
    for host in ("self.example.test", "127.0.0.1", "127.0.0.3", "0.0.0.0", "::1"):
        answer = answer_for(gateway, host, free_udp_port(), gateway.token)
        assert answer.proxy_status.error == "destination_ip_prohibited"


def test_an_address_of_the_gateways_host_is_no_part_of_the_internet(
    gateway: Gateway, names: TurningDns
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this host has no address but loopback")
        own = probe.getsockname()[0]
    names.records["host.example.test", "A"] = [own]
    answer = answer_for(gateway, "host.example.test", free_udp_port(), gateway.token)
    assert answer.status == 403
    assert answer.proxy_status.error == "destination_ip_prohibited"
