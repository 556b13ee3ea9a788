"""Rates and quotas as they are written."""

from __future__ import annotations

import pytest

from toppy.config.client import ClientConfig, parse_client_config
from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.errors import ConfigError
from toppy.model.rate import UNLIMITED, Rate

AUTH = '[auth]\ntoken = "long-enough"\n'
RULE = '[[policy.rules]]\nname = "web"\naction = "allow"\n'
CLIENT = 'gateway = "gw.example.com"\n'


def parse(text: str, **environ: str) -> GatewayConfig:
    return parse_gateway_config(AUTH + text, "gateway.toml", environ).config


def error_of(text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text, **environ)
    return str(refused.value)


def client(text: str) -> ClientConfig:
    return parse_client_config(CLIENT + text, "config.toml", {})


def test_without_rates_nothing_is_limited() -> None:
    rates = parse("").rates
    assert (rates.udp, rates.tcp, rates.subject) == (UNLIMITED,) * 3


def test_the_variables_of_the_gateway_limit_each_udp_tunnel() -> None:
    config = parse("", TOPPY_GW_UDP_BYTES_PER_SEC="1000", TOPPY_GW_UDP_BURST_BYTES="5000")
    assert config.rates.udp == Rate(1000, 5000)
    assert config.rates.tcp == UNLIMITED


def test_the_burst_is_as_large_as_the_rate_unless_it_is_given() -> None:
    assert parse("", TOPPY_GW_UDP_BYTES_PER_SEC="1000").rates.udp == Rate(1000, 1000)
    (rule,) = parse(f"{RULE}limits = {{ bytes_per_sec = 7 }}\n").policy.rules
    assert rule.limits is not None
    assert rule.limits.rate == Rate(7, 7)


def test_zero_and_zero_mean_no_limit() -> None:
    config = parse("", TOPPY_GW_UDP_BYTES_PER_SEC="0", TOPPY_GW_UDP_BURST_BYTES="0")
    assert config.rates.udp == UNLIMITED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[rates]\nudp_burst_bytes = 5\n", "udp_burst_bytes has no effect without"),
        ("[rates]\ntcp_bytes_per_sec = 5\ntcp_burst_bytes = 0\n", "lets nothing through"),
        ("[rates]\nsubject_bytes_per_sec = -1\n", "rates.subject_bytes_per_sec = -1: must be"),
        ("[rates]\nudp_bytes_per_second = 1\n", "did you mean udp_bytes_per_sec?"),
        (f"{RULE}limits = {{ quota_bytes = 5 }}\n", "limits.quota_bytes = 5: must be 0 or at"),
        (f"{RULE}limits = {{ tunnels = true }}\n", "limits.tunnels = True: must not be true"),
        (f"{RULE}limits = {{ burst_bytes = 9 }}\n", "burst_bytes has no effect without"),
        (f"{RULE}limits = {{ quota_period_s = 5 }}\n", "quota_period_s = 5: must be from 60"),
        (
            '[[policy.rules]]\naction = "deny"\nlimits = { tunnels = 1 }\n',
            "a deny rule lets nothing through",
        ),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(text: str, said: str) -> None:
    assert said in error_of(text)


def test_a_wrong_variable_is_named() -> None:
    assert "TOPPY_GW_UDP_BYTES_PER_SEC" in error_of("", TOPPY_GW_UDP_BYTES_PER_SEC="fast")


def test_toppy_udp_is_limited_only_where_the_table_is_written() -> None:
    assert client("").udp_rate == UNLIMITED
    assert client("[rate]\n").udp_rate == Rate(10 << 20, 10 << 20)
    assert client("[rate]\nbytes_per_sec = 5\nburst_bytes = 7\n").udp_rate == Rate(5, 7)
    assert client("[rate]\nbytes_per_sec = 0\nburst_bytes = 0\n").udp_rate == UNLIMITED


def test_limits_of_a_rule_belong_to_the_gateway() -> None:
    with pytest.raises(ConfigError, match="for rules of the gateway"):
        client('[[policy.allow]]\nhost = "*"\nports = [1]\nlimits = { tunnels = 1 }\n')
