"""The gateway's own services are no targets, by whatever name or address they are asked for."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import pytest

from tests.control.test_admission import FakeResolver, rule
from toppy.config.policy import PolicyRule
from toppy.control.admission import own_services
from toppy.control.authorization import Authorization, Authorizer, OwnService
from toppy.model.identity import Identity
from toppy.model.target import Protocol, Target
from toppy.net.resolver import Resolver
from toppy.policy.ruleset import Ruleset

ALICE = Identity("alice", "jwt")
EVERYTHING = rule(name="all", cidr=["127.0.0.0/8", "::1", "0.0.0.0/0", "::/0", "::ffff:0:0/96"])


def authorize(
    target: Target,
    *services: OwnService,
    rules: tuple[PolicyRule, ...] = (EVERYTHING,),
    names: dict[str, tuple[str, ...]] | None = None,
) -> Authorization:
    resolver = cast(Resolver, FakeResolver(names or {}))
    which = Authorizer(Ruleset(rules), resolver, lambda: 0.0, services)
    return asyncio.run(which.authorize(ALICE, target))


@pytest.mark.parametrize(
    ("bound", "host", "is_own"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "127.9.9.9", True),
        ("::", "127.0.0.1", True),
        ("::", "::1", True),
        ("::", "192.0.2.1", False),
        ("::1", "127.0.0.1", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::1", "::", True),
        ("192.0.2.1", "0.0.0.0", False),
        ("::1", "0.0.0.0", False),
    ],
)
def test_a_service_is_found_at_every_address_that_reaches_it(
    bound: str, host: str, is_own: bool
) -> None:
    allow = rule(cidr=[host])
    found = authorize(Target(host, 4433), OwnService("udp", bound, 4433), rules=(allow,))
    assert found.decision.is_allowed is not is_own
    if is_own:
        assert (found.decision.rule, found.decision.category) == ("default", "the gateway itself")
        assert "is not allowed" in found.decision.reason
    assert found.is_loop is is_own


@pytest.mark.parametrize(("port", "protocol"), [(4434, "udp"), (4433, "tcp"), (8080, "udp")])
def test_other_ports_and_protocols_are_the_rules_to_decide(port: int, protocol: Protocol) -> None:
    services = OwnService("udp", "0.0.0.0", 4433), OwnService("tcp", "0.0.0.0", 8080)
    assert authorize(Target("127.0.0.1", port, protocol), *services).decision.is_allowed


def test_the_health_port_is_no_target_for_tcp() -> None:
    service = OwnService("tcp", "127.0.0.1", 8080)
    assert not authorize(Target("127.0.0.1", 8080, "tcp"), service).decision.is_allowed


def test_of_a_names_addresses_the_others_are_left() -> None:
    service = OwnService("udp", "127.0.0.1", 4433)
    names = {"both.example": ("127.0.0.1", "127.0.0.2"), "only.example": ("127.0.0.1",)}
    both = authorize(Target("both.example", 4433), service, names=names)
    assert both.decision.addresses == ("127.0.0.2",)
    assert not authorize(Target("only.example", 4433), service, names=names).decision.is_allowed


def test_a_rule_that_denies_is_named_first() -> None:
    deny = rule(name="no", action="deny", ports=[4433])
    service = OwnService("udp", "127.0.0.1", 4433)
    found = authorize(Target("127.0.0.1", 4433), service, rules=(EVERYTHING, deny))
    assert found.decision.rule == "no"
    assert not found.is_loop  # who may not go there learns nothing about what is there


def test_services_are_where_the_gateway_listens() -> None:
    with socket.socket() as health:
        health.bind(("127.0.0.1", 0))
        port = health.getsockname()[1]
        assert own_services([("::", 4433)], health) == (
            OwnService("udp", "::", 4433),
            OwnService("tcp", "127.0.0.1", port),
        )
    assert own_services([], None) == ()
