"""The client's own policy, before any socket opens."""

from __future__ import annotations

import pytest

from toppy.client import policy as policy_module
from toppy.client.lookup import NameLookupError
from toppy.client.policy import check_policy, parse_target
from toppy.config.client import ClientConfig, parse_client_config
from toppy.errors import ConfigError, DeniedError
from toppy.model.target import Target
from toppy.quic.engine import Address

CIDR = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53, "8000-8999"]\n'
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
    "text", ["", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "127.1:53", "::1:53", "a b:53", "é:1"]
)
def test_a_bad_target_names_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--target"):
        parse_target("--target", text)
