"""Admission: authentication, then policy, then names, then policy on every address."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import jwt
import pytest
from msgspec.structs import replace as replace_struct

from tests.control.stage import live_tunnel
from toppy.auth.authenticator import Authenticated, Authenticator
from toppy.auth.bearer import StaticToken
from toppy.auth.client_certificate import CertificateTrust
from toppy.auth.jwt import JwtVerifier
from toppy.config.policy import PolicyRole, PolicyRule
from toppy.control.admission import Admission
from toppy.control.authorization import OwnService
from toppy.errors import TargetError
from toppy.model.client_certificate import ClientCertificate
from toppy.model.grant import Denial, Grant
from toppy.model.identity import Identity
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
    *rules: PolicyRule,
    resolver: FakeResolver | None = None,
    is_open: bool = False,
    own_services: Collection[OwnService] = (),
) -> Admission:
    return Admission(
        Authenticator(static_token=None if is_open else StaticToken(TOKEN), is_open=is_open),
        Ruleset(rules, revision=7),
        cast(Resolver, resolver or FakeResolver()),
        lambda: 1000.0,
        own_services=own_services,
    )


def decide(
    which: Admission,
    host: str,
    port: int = 53,
    *,
    authorization: str | None = f"Bearer {TOKEN}",
    is_echo: bool = False,
    protocol: str = "udp",
) -> Grant | Denial:
    request = AdmissionRequest(
        request=1,
        authorization=authorization,
        host=host,
        port=port,
        protocol=protocol,
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


# times: NOW is Thursday 1970-01-01 00:16:40 UTC

EARLY = {"hours": "00:00-00:20"}
UNTIL = 1200.0


def test_a_grant_ends_with_the_time_of_its_rule() -> None:
    grant = granted(decide(admission(rule(cidr=["8.8.8.8"], when=EARLY)), "8.8.8.8"))
    assert (grant.expires_at, grant.ends_with_rule) == (UNTIL, True)


@pytest.mark.parametrize(
    ("token_ends", "ends", "with_rule"), [(1100.0, 1100.0, False), (1300.0, UNTIL, True)]
)
def test_a_grant_ends_with_the_credential_or_the_rule_whichever_is_first(
    token_ends: float, ends: float, with_rule: bool
) -> None:
    class Expiring(Authenticator):
        def authenticate(self, *_: Any, **__: Any) -> Authenticated:
            return Authenticated(Identity("alice", "jwt"), token_ends)

    which = Admission(
        Expiring(),
        Ruleset([rule(cidr=["8.8.8.8"], when=EARLY)]),
        cast(Resolver, FakeResolver()),
        lambda: 1000.0,
    )
    grant = granted(decide(which, "8.8.8.8"))
    assert (grant.expires_at, grant.ends_with_rule) == (ends, with_rule)


def test_outside_the_time_of_its_rule_a_name_is_not_resolved() -> None:
    resolver = FakeResolver()
    which = admission(rule(host=["a.example"], when={"hours": "12:00-13:00"}), resolver=resolver)
    assert denied(decide(which, "a.example")).rule == "default"
    assert not resolver.asked


def test_a_live_tunnel_is_denied_by_a_deny_whose_time_has_come() -> None:
    moment = [1000.0]
    night = rule(name="night", action="deny", when={"hours": "00:20-01:00"})
    which = Admission(
        Authenticator(static_token=StaticToken(TOKEN)),
        Ruleset([rule(name="dns", cidr=["8.8.8.8"]), night]),
        cast(Resolver, FakeResolver()),
        lambda: moment[0],
    )
    tunnel = replace_struct(
        live_tunnel(1), address="8.8.8.8", host="8.8.8.8", authorization=f"Bearer {TOKEN}"
    )
    assert granted(decide(which, "8.8.8.8")).expires_at == UNTIL
    assert which.recheck(tunnel) is None
    assert which.open_windows() == (False,)
    moment[0] = UNTIL
    assert which.open_windows() == (True,)
    denial = which.recheck(tunnel)
    assert denial is not None
    assert (denial.status, denial.rule) == (403, "night")


def test_a_live_tunnel_belongs_to_the_rule_that_would_allow_it_now() -> None:
    which = admission(rule(name="renamed", cidr=["8.8.8.8"]))
    tunnel = replace_struct(
        live_tunnel(1), address="8.8.8.8", host="8.8.8.8", authorization=f"Bearer {TOKEN}"
    )
    assert (tunnel.rule, which.rule_of(tunnel)) == ("dns", "renamed")
    # what is to be cut, or cannot be told, keeps what it has
    for other in (
        replace_struct(tunnel, address="9.9.9.9"),
        replace_struct(tunnel, address=""),
        replace_struct(tunnel, authorization="Bearer wrong"),
    ):
        assert which.rule_of(other) == "dns"


# claims that a client brings


def unverified(**claims: Any) -> str:
    """A token that somebody has written and signed by himself."""
    return jwt.encode(
        {"sub": "mallory", "exp": 2000, **claims}, "a secret of mallory's own choice", "HS256"
    )


def test_what_a_client_says_of_itself_gives_it_nothing() -> None:
    which = Admission(
        Authenticator(
            static_token=StaticToken(TOKEN),
            jwt=JwtVerifier(secret="the secret of the issuer, which is long", leeway_s=0),
        ),
        Ruleset(
            [rule(name="ops", cidr=["8.8.8.8"], roles="ops")],
            roles=[PolicyRole.model_validate({"role": "ops", "groups": ["admins"]})],
        ),
        cast(Resolver, FakeResolver()),
        lambda: 1000.0,
    )
    boasts = {"roles": ["ops"], "role": "ops", "groups": ["admins"], "admin": True}
    assert denied(decide(which, "8.8.8.8", authorization=unverified(**boasts))).status == 401
    issued = {"sub": "alice", "exp": 2000, "roles": ["ops"], "role": "ops", "admin": True}
    key = "the secret of the issuer, which is long"
    # the issuer says it, and no rule takes its word for that
    refused = denied(decide(which, "8.8.8.8", authorization=jwt.encode(issued, key, "HS256")))
    assert (refused.status, refused.rule, refused.subject) == (403, "default", "alice")
    trusted = jwt.encode({**issued, "groups": ["admins"]}, key, "HS256")
    assert granted(decide(which, "8.8.8.8", authorization=trusted)).rule == "ops"
    assert denied(decide(which, "8.8.8.8")).rule == "default"  # the static token has no groups


class TestClientCertificates:
    """What a worker has verified is a credential, as long as it counts."""

    ALICE = ClientCertificate("", ("alice.example",), "ab" * 32, "ca" * 32, not_after=1500.0)
    RULE = rule(name="alice", cidr=["192.0.2.0/24"], subjects=["cert:alice.example"])

    def admission(self, *authorities: str) -> Admission:
        return Admission(
            Authenticator(trust=CertificateTrust(frozenset(authorities)), certificate_name="san"),
            Ruleset([self.RULE], revision=7),
            cast(Resolver, FakeResolver()),
            lambda: 1000.0,
        )

    def test_it_names_the_subject_and_ends_the_grant(self) -> None:
        request = AdmissionRequest(
            request=1,
            authorization=None,
            host="192.0.2.1",
            port=53,
            protocol="udp",
            is_echo=False,
            source="198.51.100.1",
            certificate=self.ALICE,
        )
        grant = asyncio.run(self.admission("ca" * 32).decide(request))
        assert isinstance(grant, Grant)
        assert (grant.subject, grant.rule) == ("cert:alice.example", "alice")
        assert grant.expires_at == 1500.0
        denial = asyncio.run(self.admission("cc" * 32).decide(request))
        assert isinstance(denial, Denial)
        assert denial.status == 401

    def test_a_ping_shows_it_as_well(self) -> None:
        assert self.admission("ca" * 32).is_valid(None, self.ALICE)
        assert not self.admission("cc" * 32).is_valid(None, self.ALICE)
        assert not self.admission("ca" * 32).is_valid(None, None)

    def test_a_live_tunnel_ends_with_the_trust_in_its_ca(self) -> None:
        tunnel = replace_struct(
            live_tunnel(1), authorization=None, certificate=self.ALICE, address="192.0.2.1"
        )
        assert self.admission("ca" * 32).recheck(tunnel) is None
        denial = self.admission("cc" * 32).recheck(tunnel)
        assert denial is not None
        assert denial.status == 401


def test_the_gateway_itself_is_a_loop_for_whom_the_rules_allow_it() -> None:
    allow = rule(name="all", cidr=["127.0.0.0/8"])
    service = OwnService("tcp", "127.0.0.1", 8080)
    which = admission(allow, own_services=(service,))
    denial = denied(decide(which, "127.0.0.1", 8080, protocol="tcp"))
    assert (denial.status, denial.proxy_status) == (508, "proxy_loop_detected")
    assert denial.subject == "token"
    strict = admission(rule(cidr=["127.0.0.0/8"], ports=[1]), own_services=(service,))
    assert denied(decide(strict, "127.0.0.1", 8080, protocol="tcp")).status == 403


@pytest.mark.parametrize(
    ("protocol", "setting", "is_told"),
    [("tcp", "v2", True), ("udp", "v2", False), ("tcp", None, False)],
)
def test_a_rule_may_have_tcp_targets_told_whose_connection_it_is(
    protocol: str, setting: str | None, is_told: bool
) -> None:
    which = admission(rule(name="web", cidr=["198.41.0.0/24"], proxy_protocol=setting))
    assert granted(decide(which, "198.41.0.4", 80, protocol=protocol)).proxy_protocol is is_told


def test_a_tunnel_that_is_being_opened_is_denied_when_one_of_its_addresses_is() -> None:
    deny = rule(name="not there", action="deny", cidr=["198.41.0.5"])
    which = admission(rule(cidr=["198.41.0.0/24"]), deny)
    waiting = replace_struct(
        live_tunnel(1),
        address="198.41.0.4",
        authorization=f"Bearer {TOKEN}",
        candidates=("198.41.0.4", "198.41.0.5"),
    )
    denial = which.recheck(waiting)
    assert denial is not None
    assert denial.rule == "not there"
    assert which.recheck(replace_struct(waiting, candidates=())) is None
