"""The keys of T-030 to T-038, and their errors."""

from __future__ import annotations

import pytest

from toppy.config.client import (
    ClientConfig,
    OidcDeviceCodeAuth,
    SamlAuth,
    client_config_path,
    parse_client_config,
)
from toppy.errors import ConfigError

BASE = 'gateway = "gw.example"\n'


def parse(text: str, **environ: str) -> ClientConfig:
    return parse_client_config(text, "config.toml", environ)


def test_every_documented_key_is_taken() -> None:
    config = parse(
        BASE
        + """
port = 4434
server_name = "name.example"
ca_cert_path = "/ca.pem"
auth_token = "secret-token"
mtu = 1350
audit_log_path = "/a"
audit_signing_key = "k"
audit_ship_url = "https://c.example"
audit_ship_token = "t"
audit_ship_timeout_secs = 5
[policy]
[[policy.allow]]
cidr = "10.0.0.0/8"
ports = [53, "8000-8999"]
subjects = ["alice"]
claims = { team = "ops" }
[rate]
bytes_per_sec = 1000
burst_bytes = 2000
"""
    )
    assert config.port == 4434
    assert config.token is not None
    assert "secret-token" not in repr(config)
    assert config.policy is not None
    assert config.policy.allow[0].ports == ((53, 53), (8000, 8999))
    assert config.policy.allow[0].name == "rule 1"


def test_auth_of_mode_token_has_the_token() -> None:
    config = parse(BASE + '[auth]\nmode = "token"\ntoken = "abc"\n')
    assert config.token is not None
    assert config.token.get_secret_value() == "abc"


def test_login_modes_are_read_with_their_defaults() -> None:
    device = parse(
        BASE + '[auth]\nmode = "oidc_device_code"\nissuer = "https://i"\nclient_id = "c"\n'
    )
    assert isinstance(device.auth, OidcDeviceCodeAuth)
    assert device.auth.scope == "openid offline_access"
    assert device.token is None
    saml = parse(
        BASE + '[auth]\nmode = "saml"\nidp_entity_id = "i"\nbroker_issuer = "https://b"\n'
        'broker_client_id = "c"\n'
    )
    assert isinstance(saml.auth, SamlAuth)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["gateway: is required"]),
        ('gateway = ""\n', ["gateway", "''"]),
        ('gateway = "https://gw"\n', ["gateway", "without a port or a scheme"]),
        ('gateway = "1.2.3"\n', ["gateway", "must be a host name"]),
        ('gateway = "fe80::1%eth0"\n', ["gateway", "without a zone", "/etc/hosts"]),
        (BASE + 'server_name = "a b"\n', ["config.toml:2", "server_name", "must be a host name"]),
        (BASE + 'server_name = "gä.example"\n', ["server_name", "must be a host name"]),
        (BASE + "port = 0\n", ["config.toml:2", "port = 0"]),
        (BASE + "mtu = 0\n", ["mtu = 0"]),
        (BASE + 'auth_token = ""\n', ["auth_token", "empty"]),
        (BASE + 'ca_cert_path = ""\n', ["ca_cert_path"]),
        (BASE + 'gatway_template = "x"\n', ["did you mean gateway_template"]),
        (BASE + 'gateway_template = "https://x/{target_host}"\n', ["{target_port}"]),
        (BASE + '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = []\n', ["ports", "empty"]),
        (BASE + '[[policy.allow]]\ncidr = "10.0.0.0/8"\n', ["policy.allow[0]", "ports"]),
        (BASE + "[[policy.allow]]\nports = [1]\n", ["needs cidr or host"]),
        (BASE + '[[policy.allow]]\ncidr = "x"\nports = [1]\n', ["cidr", "no network"]),
        (BASE + "[rate]\nbytes_per_sec = 0\nburst_bytes = 5\n", ["rate", "both to zero"]),
        (BASE + '[auth]\nmode = "magic"\n', ["auth", "magic"]),
        (BASE + '[auth]\nmode = "oidc_device_code"\nissuer = "x"\n', ["client_id"]),
    ],
)
def test_an_error_names_the_key(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    for part in parts:
        assert part in str(refused.value)


def test_both_rates_zero_mean_off() -> None:
    assert parse(BASE + "[rate]\nbytes_per_sec = 0\n").rate.bytes_per_sec == 0


def test_without_a_policy_there_is_none() -> None:
    assert parse(BASE).policy is None


def test_variables_override_the_file() -> None:
    config = parse(
        BASE, TOPPY_UDP_IDLE_SECS="5", TOPPY_UDP_MAX_PEERS="3", TOPPY_QUIC_ENGINE="aioquic"
    )
    assert (config.udp_idle_s, config.udp_max_peers, config.quic.engine) == (5, 3, "aioquic")
    with pytest.raises(ConfigError, match="udp_idle_s"):
        parse(BASE, TOPPY_UDP_IDLE_SECS="never")


def test_the_file_is_found_by_flag_then_variable_then_home() -> None:
    environ = {"TOPPY_CONFIG": "/env.toml"}
    assert client_config_path("/flag.toml", environ, "/home/a") == "/flag.toml"
    assert client_config_path(None, environ, "/home/a") == "/env.toml"
    assert client_config_path(None, {}, "/home/a") == "/home/a/.config/toppy/config.toml"
    assert client_config_path(None, {"XDG_CONFIG_HOME": "/x"}, "/h") == "/x/toppy/config.toml"
