"""What a policy rule may say, and what it means."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toppy.config.client import parse_client_config
from toppy.config.gateway import parse_gateway_config
from toppy.config.policy import PolicyRule, name_rules
from toppy.errors import ConfigError

PORTS = st.integers(1, 65535)
NETWORKS = st.ip_addresses().flatmap(
    lambda address: st.integers(0, address.max_prefixlen).map(
        lambda length: ipaddress.ip_network((address, length), strict=False)
    )
)


def rule(**criteria: Any) -> PolicyRule:
    return PolicyRule.model_validate({"action": "allow", **criteria})


def test_one_value_is_as_good_as_a_list() -> None:
    one = rule(cidr="10.0.0.0/8", host="a.example", ports=53, protocol="udp", subjects="a*")
    many = rule(
        cidr=["10.0.0.0/8"], host=["a.example"], ports=[53], protocol=["udp"], subjects=["a*"]
    )
    assert one == many
    assert one.ports == ((53, 53),)
    assert one.cidr == (ipaddress.ip_network("10.0.0.0/8"),)


def test_what_is_left_out_is_empty() -> None:
    plain = rule()
    assert (plain.cidr, plain.host, plain.ports, plain.protocol) == ((), (), (), ())
    assert (plain.subjects, plain.claims, plain.name) == ((), {}, "")


def test_hosts_are_lower_case_without_the_trailing_dot() -> None:
    assert rule(host=["DB.Example.", "*.Example", "*"]).host == ("db.example", "*.example", "*")


def test_an_address_is_the_network_of_itself() -> None:
    found = rule(cidr=["192.0.2.7", "2001:db8::1"]).cidr
    assert [str(network) for network in found] == ["192.0.2.7/32", "2001:db8::1/128"]


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("10.0.0.53/8", "write 10.0.0.0/8 or 10.0.0.53/32"),
        ("10.0.0.53/255.0.0.0", "write 10.0.0.0/8 or 10.0.0.53/32"),
        ("2001:db8::1/32", "write 2001:db8::/32 or 2001:db8::1/128"),
    ],
)
def test_an_address_with_the_length_of_its_network_opens_nothing(written: str, advice: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(advice)):
        rule(cidr=["192.0.2.0/24", written])


@given(PORTS, PORTS)
def test_a_port_range_is_inclusive_and_ordered(first: int, last: int) -> None:
    if first <= last:
        assert rule(ports=[f"{first}-{last}"]).ports == ((first, last),)
    else:
        with pytest.raises(ValidationError):
            rule(ports=[f"{first}-{last}"])


@given(st.lists(NETWORKS, min_size=1, max_size=4))
def test_networks_are_read_as_they_are_written(networks: list[PolicyRule]) -> None:
    assert list(rule(cidr=[str(network) for network in networks]).cidr) == networks


@pytest.mark.parametrize(
    "criteria",
    [
        {"cidr": 5},
        {"cidr": [167772160]},
        {"cidr": 5.5},
        {"cidr": True},
        {"cidr": ""},
        {"cidr": "10.0.0.0/33"},
        {"cidr": {"a": 1}},
        {"host": ""},
        {"host": "*.*.example"},
        {"host": "a*.example"},
        {"host": "https://a"},
        {"host": "192.0.2.1"},
        {"host": ["a.example", "192.0.2.1."]},
        {"host": 5},
        {"host": {"a": 1}},
        {"ports": 0},
        {"ports": 65536},
        {"ports": 53.5},
        {"ports": True},
        {"ports": "٥٣"},
        {"ports": "1_0"},
        {"ports": "-5"},
        {"ports": "5-"},
        {"ports": "1-2-3"},
        {"ports": {"a": 1}},
        {"protocol": "sctp"},
        {"subjects": [5]},
        {"claims": "ops"},
        {"claims": {"team": []}},
        {"claims": {"team": {"a": 1}}},
        {"claims": {"team": [["a"]]}},
        {"name": "two\nlines"},
        {"name": "x" * 101},
        {"cidr": []},
        {"host": []},
        {"ports": []},
        {"protocol": []},
        {"subjects": []},
        {"action": "maybe"},
        {"cidrs": "10.0.0.0/8"},
    ],
)
def test_a_criterion_that_is_unclear_is_refused(criteria: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        rule(**criteria)


def test_claims_keep_their_types() -> None:
    claims = rule(claims={"team": ["ops", 1, True, 1.5], "admin": True}).claims
    assert [type(value) for value in claims["team"]] == [str, int, bool, float]
    assert claims["admin"] == (True,)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(PolicyRule.model_fields)), JUNK))
def test_any_rule_is_taken_or_refused(criteria: dict[str, Any]) -> None:
    try:
        found = rule(**criteria)
    except ValidationError:
        return
    assert all(1 <= low <= high <= 65535 for low, high in found.ports)


def test_rules_without_a_name_are_numbered_from_one() -> None:
    named = name_rules((rule(), rule(name="dns"), rule()))
    assert [one.name for one in named] == ["rule 1", "dns", "rule 3"]


def test_the_gateways_rules_are_named() -> None:
    text = '[auth]\ntoken = "long-enough"\n[[policy.rules]]\naction = "deny"\n'
    rules = parse_gateway_config(text, "f", {}).config.policy.rules
    assert [one.name for one in rules] == ["rule 1"]


def test_a_client_rule_only_allows() -> None:
    text = 'gateway = "g"\n[[policy.allow]]\naction = "deny"\ncidr = "10.0.0.0/8"\nports = 1\n'
    with pytest.raises(ConfigError, match="only allow"):
        parse_client_config(text, "f", {})


def test_a_proxy_header_is_for_rules_that_allow_tcp_at_the_gateway() -> None:
    base = {"action": "allow", "proxy_protocol": "v2"}
    assert PolicyRule.model_validate(base).proxy_protocol == "v2"
    assert PolicyRule.model_validate({**base, "protocol": ["udp", "tcp"]}).proxy_protocol == "v2"
    for changes, text in (
        ({"protocol": "udp"}, "is for TCP"),
        ({"action": "deny"}, "a deny rule lets nothing through"),
        ({"proxy_protocol": "v1"}, "v2"),
    ):
        with pytest.raises(ValidationError, match=text):
            PolicyRule.model_validate({**base, **changes})
