"""The ``[audit]`` table and the client's audit keys."""

from __future__ import annotations

from typing import Any

import pytest

from toppy.config.client import ClientConfig, parse_client_config
from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.errors import ConfigError

AUTH = '[auth]\ntoken = "long-enough"\n'


def gateway(text: str, **environ: str) -> GatewayConfig:
    return parse_gateway_config(AUTH + "[audit]\n" + text, "gateway.toml", environ).config


def client(text: str, **environ: str) -> ClientConfig:
    return parse_client_config('gateway = "g"\n' + text, "config.toml", environ)


def test_without_a_path_there_is_no_log() -> None:
    assert gateway("").audit.path == ""
    assert gateway("").audit.when_full == "refuse"


def test_variables_override_the_table() -> None:
    audit = gateway(
        'path = "a"\nsigning_key_file = "k"\nship_token_file = "t"\n',
        TOPPY_GW_AUDIT_LOG="b",
        TOPPY_GW_AUDIT_SIGNING_KEY="the key",
        TOPPY_GW_AUDIT_SHIP_URL="https://c.example/",
        TOPPY_GW_AUDIT_SHIP_TOKEN="the-token",
    ).audit
    assert (audit.path, audit.ship_url) == ("b", "https://c.example/")
    assert audit.signing_key is not None
    assert audit.signing_key.get_secret_value() == "the key"
    assert (audit.signing_key_file, audit.ship_token_file) == ("", "")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('signing_key = ""', "must not be empty"),
        ('signing_key = "a"\nsigning_key_file = "b"', "not both"),
        ('ship_token = "a"\nship_token_file = "b"', "not both"),
        ('ship_token = "two words"', "printable ASCII"),
        ('ship_url = "collector.example"', "http or https"),
        ('ship_url = "file:///etc/passwd"', "http or https"),
        ('ship_url = "http://[::1"', "http or https"),
        ("queue_events = 1", "from 100 to 1000000"),
        ('fsync = "sometimes"', "'always', 'interval' or 'never'"),
        ("rotate_bytes = -1", "at least 0"),
        ("keep_files = -1", "at least 0"),
        ("keep_days = 1\nrotate_bytes = 0\nrotate_interval_s = 0", "set rotate_bytes"),
        ("repeat_interval_s = 0", "from 1"),
    ],
)
def test_wrong_values_are_named(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        gateway(text)
    assert "audit" in str(refused.value)
    assert part in str(refused.value)


def test_no_secret_shows_in_an_error_or_a_repr() -> None:
    with pytest.raises(ConfigError) as refused:
        gateway("signing_key = 12345\nship_token = 67890\n")
    assert "12345" not in str(refused.value)
    assert "67890" not in str(refused.value)
    assert "hidden" not in repr(gateway('signing_key = "hidden"\nship_token = "hidden"'))


def test_the_clients_variables_override_its_keys() -> None:
    config = client(
        'audit_log_path = "a"\naudit_ship_timeout_secs = 7\n',
        TOPPY_AUDIT_LOG="b",
        TOPPY_AUDIT_SIGNING_KEY="k",
        TOPPY_AUDIT_SHIP_URL="http://c.example/",
        TOPPY_AUDIT_SHIP_TOKEN="t",
        TOPPY_AUDIT_SHIP_RETRIES="4",
        TOPPY_AUDIT_SHIP_BACKOFF_MS="10",
        TOPPY_AUDIT_SHIP_BATCH_SIZE="1",
        TOPPY_AUDIT_VERIFY_URL="http://v.example/",
        TOPPY_AUDIT_VERIFY_TOKEN="u",
        TOPPY_AUDIT_VERIFY_TIMEOUT="9",
        TOPPY_AUDIT_VERIFY_RETRIES="0",
        TOPPY_AUDIT_VERIFY_BACKOFF_MS="20",
    )
    assert (config.audit_log_path, config.audit_ship_timeout_secs) == ("b", 7.0)
    assert (config.audit_ship_retries, config.audit_ship_backoff_ms) == (4, 10)
    assert config.audit_ship_batch_size == 1
    assert (config.audit_verify_timeout_secs, config.audit_verify_retries) == (9.0, 0)


def test_the_clients_defaults_are_those_of_the_field() -> None:
    config = client("")
    found: list[Any] = [
        *(config.audit_ship_timeout_secs, config.audit_ship_retries),
        *(config.audit_ship_backoff_ms, config.audit_ship_batch_size),
        *(config.audit_verify_timeout_secs, config.audit_verify_retries),
        config.audit_verify_backoff_ms,
    ]
    assert found == [3.0, 2, 250, 100, 5.0, 2, 250]


@pytest.mark.parametrize("key", ["audit_ship_url", "audit_verify_url"])
def test_a_url_of_the_client_is_checked(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*http or https"):
        client(f'{key} = "c.example"\n')
