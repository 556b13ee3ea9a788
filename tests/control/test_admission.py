"""Admission: authentication, then policy, then names, then policy on every address."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from toppy.auth.authenticator import Authenticator
from toppy.auth.bearer import StaticToken
from toppy.config.policy import PolicyRule
from toppy.control.admission import Admission
from toppy.errors import TargetError
from toppy.model.grant import Denial, Grant
from toppy.net.resolver import Resolver
from toppy.policy.ruleset import Ruleset
from toppy.wire.ipc_message import AdmissionRequest

TOKEN = "the-right-token"


@dataclass
class FakeResolver:
    """Knows ``names``; remembers what it was asked."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    error: TargetError | None = None
    asked: list[str] = field(default_factory=list)

    async def resolve(self, name: str) -> tuple[str, ...]:
        self.asked.append(name)
        if self.error is not None:
            raise self.error
        return self.names[name]


def rule(**criteria: Any) -> PolicyRule:
    return PolicyRule.model_validate({"action": "allow", **criteria})


def admission(
    *rules: PolicyRule, resolver: FakeResolver | None = None, is_open: bool = False
) -> Admission:
    return Admission(
        Authenticator(static_token=None if is_open else StaticToken(TOKEN), is_open=is_open),
        Ruleset(rules, revision=7),
        cast(Resolver, resolver or FakeResolver()),
        lambda: 1000.0,
    )


def decide(
    which: Admission,
    host: str,
    port: int = 53,
    *,
    authorization: str | None = f"Bearer {TOKEN}",
    is_echo: bool = False,
) -> Grant | Denial:
    request = AdmissionRequest(
        request=1,
        authorization=authorization,
        host=host,
        port=port,
        protocol="udp",
        is_echo=is_echo,
        source="198.51.100.7",
    )
    return asyncio.run(which.decide(request))


def granted(decision: Grant | Denial) -> Grant:
    assert isinstance(decision, Grant), decision
    return decision


def denied(decision: Grant | Denial) -> Denial:
    assert isinstance(decision, Denial), decision
    return decision


def test_an_allowed_address_is_granted_with_rule_subject_and_revision() -> None:
    which = admission(rule(name="dns", cidr=["198.41.0.0/24"], ports=[53]))
    assert granted(decide(which, "198.41.0.4")) == Grant(
        addresses=("198.41.0.4",), port=53, subject="token", rule="dns", revision=7
    )


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic abc", ""])
def test_without_the_token_nothing_is_decided_or_resolved(authorization: str | None) -> None:
    resolver = FakeResolver()
    which = admission(rule(cidr=["0.0.0.0/0"]), resolver=resolver)
    assert denied(decide(which, "a.example", authorization=authorization)).status == 401
    assert denied(decide(which, "a.example", authorization=authorization, is_echo=True)).status == (
        401
    )
    assert not resolver.asked


def test_a_name_that_no_rule_could_allow_is_not_resolved() -> None:
    resolver = FakeResolver()
    which = admission(rule(cidr=["0.0.0.0/0"], ports=[443]), resolver=resolver)
    denial = denied(decide(which, "a.example", 53))
    assert (denial.status, denial.rule) == (403, "default")
    assert not resolver.asked


def test_only_the_allowed_addresses_of_a_name_are_granted_in_order() -> None:
    addresses = ("8.8.4.4", "10.0.0.1", "8.8.8.8", "127.0.0.1")
    which = admission(rule(cidr=["0.0.0.0/0"]), resolver=FakeResolver({"mixed.example": addresses}))
    assert granted(decide(which, "mixed.example")).addresses == ("8.8.4.4", "8.8.8.8")


def test_a_name_whose_addresses_are_all_forbidden_is_denied_with_what_they_are() -> None:
    resolver = FakeResolver({"rebound.example": ("169.254.169.254", "10.0.0.1")})
    which = admission(rule(cidr=["0.0.0.0/0"]), resolver=resolver)
    denial = denied(decide(which, "rebound.example"))
    assert (denial.status, denial.proxy_status) == (403, "destination_ip_prohibited")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TargetError("no such name", status=502, proxy_status="dns_error"), 502),
        (TargetError("no answer", status=504, proxy_status="dns_timeout"), 504),
    ],
)
def test_a_resolution_that_fails_is_answered_with_its_error(
    error: TargetError, status: int
) -> None:
    which = admission(rule(cidr=["0.0.0.0/0"]), resolver=FakeResolver(error=error))
    denial = denied(decide(which, "a.example"))
    assert (denial.status, denial.proxy_status, denial.details) == (
        status,
        error.proxy_status,
        str(error),
    )


def test_an_address_is_never_resolved() -> None:
    resolver = FakeResolver()
    which = admission(rule(cidr=["0.0.0.0/0", "::/0"]), resolver=resolver)
    granted(decide(which, "8.8.8.8"))
    granted(decide(which, "2606:4700::1111"))
    assert not resolver.asked


def test_the_echo_asks_for_no_policy() -> None:
    grant = granted(decide(admission(), "localhost", 9, is_echo=True))
    assert grant.is_echo
    assert grant.addresses == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_gateways_own_addresses_need_a_rule_that_names_them(host: str) -> None:
    wide = admission(rule(cidr=["0.0.0.0/0", "::/0"]))
    assert denied(decide(wide, host)).status == 403
    named = admission(rule(cidr=[host]))
    assert granted(decide(named, host)).addresses == (host,)


@pytest.mark.parametrize(
    ("host", "category"),
    [
        ("224.0.0.251", "multicast"),
        ("ff02::fb", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("255.255.255.255", "broadcast"),
    ],
)
def test_addresses_that_anybody_may_bind_are_not_taken_for_the_gateways(
    host: str, category: str
) -> None:
    denial = denied(decide(admission(rule(cidr=["0.0.0.0/0", "::/0"])), host))
    assert category in denial.details


def test_an_open_gateway_asks_nobody_who_they_are() -> None:
    which = admission(rule(cidr=["8.8.8.8/32"]), is_open=True)
    assert granted(decide(which, "8.8.8.8", authorization=None)).subject == "anonymous"


@pytest.mark.parametrize(
    ("authorization", "is_valid"),
    [(f"Bearer {TOKEN}", True), (TOKEN, True), ("Bearer wrong", False), (None, False)],
)
def test_a_credential_can_be_checked_by_itself(authorization: str | None, is_valid: bool) -> None:
    assert admission().is_valid(authorization) is is_valid


def test_many_decisions_run_beside_each_other() -> None:
    all_have_asked = asyncio.Barrier(50)

    class Slow(FakeResolver):
        async def resolve(self, name: str) -> tuple[str, ...]:
            await all_have_asked.wait()
            return ("8.8.8.8",)

    which = admission(rule(cidr=["8.8.8.8/32"]), resolver=Slow())

    async def all_at_once() -> list[Grant | Denial]:
        requests = [
            AdmissionRequest(n, f"Bearer {TOKEN}", f"n{n}.example", 53, "udp", False, "")
            for n in range(50)
        ]
        return await asyncio.gather(*(which.decide(request) for request in requests))

    for decision in asyncio.run(all_at_once()):
        granted(decision)
