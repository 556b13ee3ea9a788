"""The client's own policy, before any socket opens."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import jwt
import pytest

from toppy.client import policy as policy_module
from toppy.client.lookup import NameLookupError
from toppy.client.policy import (
    check_policy,
    decide_here,
    own_denial,
    parse_target,
    policy_warnings,
)
from toppy.config.client import ClientConfig, parse_client_config
from toppy.config.gateway import parse_gateway_config
from toppy.errors import ConfigError, DeniedError
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.ruleset import Ruleset
from toppy.quic.engine import Address

CIDR = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53, "8000-8999"]\n'
OIDC = '[auth]\nmode = "oidc_device_code"\nissuer = "https://login.example"\nclient_id = "toppy"\n'
HOST = '[[policy.allow]]\nhost = "*.lan.example"\nports = [53]\n'


def config(policy: str) -> ClientConfig:
    return parse_client_config(f'gateway = "gw.example"\n{policy}', "config.toml", {})


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to here; the others do not."""
    known: dict[str, list[str]] = {}

    def look_up_now(host: str, port: int) -> list[Address]:
        if host not in known:
            raise NameLookupError("no such name")
        return [(address, port) for address in known[host]]

    monkeypatch.setattr(policy_module, "look_up_now", look_up_now)
    return known


@pytest.mark.parametrize("target", [Target("10.1.2.3", 53), Target("10.1.2.3", 8500)])
def test_a_listed_network_and_port_is_allowed(target: Target) -> None:
    check_policy(config(CIDR), target)


@pytest.mark.parametrize(
    "target", [Target("10.1.2.3", 54), Target("11.1.2.3", 53), Target("2001:db8::1", 53)]
)
def test_what_is_not_listed_is_denied_with_the_target_in_the_reason(target: Target) -> None:
    with pytest.raises(DeniedError) as denied:
        check_policy(config(CIDR), target)
    assert f"target {target} is not allowed" in str(denied.value)


@pytest.mark.parametrize("policy", ["", "[policy]\n"])
def test_without_rules_everything_is_denied(policy: str) -> None:
    with pytest.raises(DeniedError, match=r"10\.0\.0\.1:53 is not allowed"):
        check_policy(config(policy), Target("10.0.0.1", 53))


def test_private_and_loopback_targets_need_nothing_special_on_a_client() -> None:
    # what is special here is not at the gateway, which guards its own
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254"):
        check_policy(
            config('[[policy.allow]]\ncidr = "0.0.0.0/0"\nports = [53]\n'), Target(address, 53)
        )


def test_a_name_that_a_host_rule_allows_is_not_resolved(names: dict[str, list[str]]) -> None:
    check_policy(config(HOST), Target("db.lan.example", 53))


def test_a_name_that_no_rule_could_allow_is_not_resolved(names: dict[str, list[str]]) -> None:
    with pytest.raises(DeniedError, match="no rule allows it"):
        check_policy(config(HOST), Target("db.example", 53))


def test_a_name_is_allowed_when_every_address_is(names: dict[str, list[str]]) -> None:
    names["db.example"] = ["10.0.0.1", "10.0.0.2"]
    check_policy(config(CIDR), Target("db.example", 53))


@pytest.mark.parametrize("addresses", [["192.0.2.1"], ["10.0.0.1", "192.0.2.1"]])
def test_a_name_with_an_address_that_is_not_allowed_is_denied(
    names: dict[str, list[str]], addresses: list[str]
) -> None:
    names["db.example"] = addresses
    with pytest.raises(DeniedError, match=r"target db\.example:53 is not allowed"):
        check_policy(config(CIDR), Target("db.example", 53))


def test_a_name_that_does_not_resolve_here_is_denied_with_advice(
    names: dict[str, list[str]],
) -> None:
    with pytest.raises(DeniedError) as denied:
        check_policy(config(CIDR), Target("db.example", 53))
    assert "no such name" in str(denied.value)
    assert 'host = "db.example"' in str(denied.value)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("10.0.0.1:53", Target("10.0.0.1", 53)),
        ("[2001:DB8::1]:53", Target("2001:db8::1", 53)),
        ("DB.Example.:65535", Target("db.example", 65535)),
    ],
)
def test_a_target_is_read_in_its_canonical_form(text: str, target: Target) -> None:
    assert parse_target("--target", text) == target


@pytest.mark.parametrize(
    "text",
    ["", ":53", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "127.1:53", "::1:53", "a b:53", "é:1"],
)
def test_a_bad_target_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--target"):
        parse_target("--target", text)


# who asks

PEOPLE = """
[[policy.allow]]
name = "alice's"
host = "db.example"
ports = [53]
subjects = ["alice"]
[[policy.allow]]
name = "ops'"
host = "ops.example"
ports = [53]
claims = { team = "ops" }
[[policy.allow]]
name = "dba's"
host = "dba.example"
ports = [53]
roles = ["dba"]
[[policy.roles]]
role = "dba"
groups = ["databases"]
"""
DB, OPS, DBA = (Target(f"{name}.example", 53) for name in ("db", "ops", "dba"))


def token(**claims: object) -> str:
    return f'auth_token = "{jwt.encode(claims, "nobody here knows the issuer" * 2, "HS256")}"\n'


def with_token(line: str, policy: str = PEOPLE) -> ClientConfig:
    return parse_client_config(f'gateway = "gw.example"\n{line}{policy}', "config.toml", {})


def is_allowed(config: ClientConfig, target: Target, who: Identity | None = None) -> bool:
    try:
        check_policy(config, target, who)
    except DeniedError:
        return False
    return True


@pytest.mark.parametrize(
    ("claims", "allowed"),
    [
        ({"sub": "alice"}, [DB]),
        ({"sub": "bob"}, []),
        ({"sub": "bob", "team": "ops"}, [OPS]),
        ({"sub": "bob", "groups": ["databases"]}, [DBA]),
        ({"sub": "alice", "team": "ops", "groups": "databases"}, [DB, OPS, DBA]),
        ({"sub": "bob", "roles": ["dba"], "role": "dba"}, []),
    ],
)
def test_rules_for_people_are_compared_with_what_the_token_says(
    claims: dict[str, object], allowed: list[Target]
) -> None:
    config = with_token(token(**claims))
    assert [each for each in (DB, OPS, DBA) if is_allowed(config, each)] == allowed


def test_a_login_says_who_it_is() -> None:
    config = with_token("")
    assert is_allowed(config, DB, Identity("alice", "oidc"))
    assert not is_allowed(config, OPS, Identity("alice", "oidc"))


@pytest.mark.parametrize("line", ["", 'auth_token = "no-jwt-at-all"\n'])
def test_without_a_token_that_says_who_it_is_rules_for_people_match_nobody(line: str) -> None:
    config = with_token(line)
    assert not any(is_allowed(config, each) for each in (DB, OPS, DBA))


def test_nobody_is_told_to_log_in() -> None:
    with pytest.raises(DeniedError, match="nobody is logged in: run toppy login"):
        check_policy(with_token(""), DB)


def test_a_token_that_is_no_jwt_is_called_as_at_the_gateway() -> None:
    rule = '[[policy.allow]]\nhost = "*"\nports = [53]\nsubjects = ["token"]\n'
    assert is_allowed(with_token('auth_token = "no-jwt-at-all"\n', rule), DB)
    assert not is_allowed(with_token(token(sub="alice"), rule), DB)


@pytest.mark.parametrize(
    ("line", "policy", "part"),
    [
        ("", 'subjects = ["alice"]', "there is neither a token nor [auth]"),
        ('auth_token = "no-jwt-at-all"\n', 'claims = { team = "ops" }', "the token is no JWT"),
        ('auth_token = "no-jwt-at-all"\n', 'groups = ["ops"]', "the token is no JWT"),
        ('auth_token = "no-jwt-at-all"\n', 'roles = ["ops"]', "no [[policy.roles]]"),
        (OIDC, 'roles = ["ops"]', "no [[policy.roles]]"),
    ],
)
def test_a_rule_that_can_match_nobody_is_told_at_load(line: str, policy: str, part: str) -> None:
    rule = f'[[policy.allow]]\nname = "mine"\nhost = "*"\nports = [53]\n{policy}\n'
    text = rule + line if line == OIDC else line + rule
    (warning,) = policy_warnings(with_token("", text))
    assert "'mine'" in warning
    assert part in warning
    assert "it matches nobody" in warning


def test_rules_that_can_match_are_not_warned_about() -> None:
    assert policy_warnings(with_token(token(sub="alice"))) == ()
    assert policy_warnings(with_token("", PEOPLE + OIDC)) == ()
    assert policy_warnings(config("")) == ()


# deny, and times


def test_a_deny_wins_on_the_client_too(names: dict[str, list[str]]) -> None:
    names["db.lan.example"] = ["10.0.0.1"]
    names["ns.lan.example"] = ["10.0.0.2"]
    deny = (
        '[[policy.deny]]\ncidr = "10.0.0.2"\n'
        '[[policy.deny]]\nname = "bad"\nhost = "bad.lan.example"\n'
    )
    both = config(HOST + deny)
    assert is_allowed(both, Target("db.lan.example", 53))
    with pytest.raises(DeniedError, match="'deny 1'") as denied:
        check_policy(both, Target("ns.lan.example", 53))
    assert denied.value.rule == "deny 1"
    with pytest.raises(DeniedError, match="'bad'"):
        check_policy(both, Target("bad.lan.example", 53))


def test_a_name_is_denied_when_one_of_its_addresses_is(names: dict[str, list[str]]) -> None:
    names["db.lan.example"] = ["10.0.0.1", "10.0.0.2"]
    with pytest.raises(DeniedError, match="not allowed") as denied:
        check_policy(
            config(HOST + '[[policy.deny]]\nname = "no"\ncidr = "10.0.0.2"\n'),
            Target("db.lan.example", 53),
        )
    assert denied.value.rule == "no"


def test_the_time_of_a_rule_counts() -> None:
    rule = '[[policy.allow]]\nhost = "*"\nports = [53]\nwhen = { hours = "08:00-18:00" }\n'
    morning = datetime(2026, 3, 2, 9, tzinfo=UTC).timestamp()
    for moment, allowed in ((morning, True), (morning + 12 * 3600, False)):
        found = decide_here(config(rule), DB, Identity("", "none"), moment)
        assert found.decision.is_allowed is allowed


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ('[[policy.deny]]\naction = "allow"\n', "only deny"),
        (
            '[[policy.allow]]\nname = "a"\nhost = "*"\nports = 1\n[[policy.deny]]\nname = "a"\n',
            r"the name 'a' is used twice, by \[\[policy.allow\]\] 1 and \[\[policy.deny\]\] 1",
        ),
    ],
)
def test_a_policy_that_is_unclear_is_refused(policy: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        config(policy)


def test_both_ends_decide_the_same_by_the_same_rules() -> None:
    # what differs is what is special: only a gateway knows its own networks
    gateway = parse_gateway_config(
        '[auth]\ntoken = "long-enough"\n'
        '[[policy.rules]]\nname = "a"\naction = "allow"\ncidr = "8.0.0.0/8"\nports = [53]\n'
        '[[policy.rules]]\nname = "d"\naction = "deny"\ncidr = "8.8.4.4"\n',
        "gateway.toml",
        {},
    ).config.policy
    client = config(
        '[[policy.allow]]\nname = "a"\ncidr = "8.0.0.0/8"\nports = [53]\n'
        '[[policy.deny]]\nname = "d"\ncidr = "8.8.4.4"\n'
    )
    for target in (Target("8.8.8.8", 53), Target("8.8.4.4", 53), Target("9.9.9.9", 53)):
        here = decide_here(client, target, Identity("token", "static"), 0.0).decision
        there = Ruleset(gateway.rules).decide(
            Identity("token", "static"), target, (target.host,), now=0.0
        )
        assert (here.is_allowed, here.rule) == (there.is_allowed, there.rule)


def test_a_denial_names_the_file_and_what_to_write_there() -> None:
    file = Path("/c.toml")
    nothing = own_denial(DeniedError("no rule allows it", rule="default"), file)
    assert nothing == (
        "no rule allows it (this client's policy, /c.toml; add a [[policy.allow]] there)"
    )
    assert "see its rule there" in own_denial(DeniedError("denied by 'x'", rule="x"), file)
