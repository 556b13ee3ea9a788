"""Errors say where, which key, which value and what is allowed, and never a secret."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.config.client import ClientConfig, parse_client_config
from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.config.reading import (
    apply_environment,
    find_line,
    parse_toml,
    put,
    suggest,
    validate,
)
from toppy.errors import ConfigError

AUTH = '[auth]\ntoken = "long-enough"\n'
CLIENT = 'gateway = "gw.example"\n'


def gateway_error(text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_gateway_config(text, "gateway.toml", environ)
    return str(refused.value)


def client_error(text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_client_config(text, "config.toml", environ)
    return str(refused.value)


DOCUMENT = """\
# comment
workers = 2
"odd key" = 1
[a.b]
c = 1
d.e = 2  # comment
[[rules]]
x = 1
[rules.claims]
team = "a"
[[ rules ]]  # comment
y = 1
[rules.claims]
team = "b"
list = [
  "one",
]
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("workers",), 2),
        (("odd key",), 3),
        (("a", "b"), 4),
        (("a", "b", "c"), 5),
        (("a", "b", "d", "e"), 6),
        (("rules",), 7),
        (("rules", 0), 7),
        (("rules", 0, "x"), 8),
        (("rules", 0, "claims", "team"), 10),
        (("rules", 1), 11),
        (("rules", 1, "y"), 12),
        (("rules", 1, "claims", "team"), 14),
        (("rules", 1, "claims", "list", 0), 15),
        (("rules", 1, "missing"), 11),
        (("a", "b", "missing"), 4),
        (("missing",), None),
        ((), None),
    ],
)
def test_a_key_is_found_at_its_line_or_its_tables(
    location: tuple[str | int, ...], line: int | None
) -> None:
    assert find_line(DOCUMENT, location) == line


@given(st.text(max_size=300), st.lists(st.text(max_size=5) | st.integers(0, 3), max_size=4))
def test_a_line_is_found_in_any_text_or_not(text: str, location: list[str | int]) -> None:
    line = find_line(text, tuple(location))
    assert line is None or 1 <= line <= len(text.splitlines())


@pytest.mark.parametrize(
    "text", ["x = " + "9" * 5000, "x = " + "[" * 100_000, "x = 1\nx = 2", "x = \x00", "="]
)
def test_what_is_no_toml_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_toml(text, "f.toml")


def test_a_wrong_variable_is_named_instead_of_the_file() -> None:
    said = gateway_error('[listen]\nhealth = "127.0.0.1:1"\n' + AUTH, TOPPY_GW_LISTEN="nowhere")
    assert said.startswith("TOPPY_GW_LISTEN: listen.health = 'nowhere':")
    assert client_error(CLIENT, TOPPY_UDP_MAX_PEERS="0").startswith("TOPPY_UDP_MAX_PEERS: ")


def test_variables_that_lack_another_are_named() -> None:
    variables = {"TOPPY_GW_JWT_ISS": "idp", "TOPPY_GW_JWT_AUD": "toppy"}
    said = gateway_error("", **variables)
    assert said.startswith("TOPPY_GW_JWT_ISS, TOPPY_GW_JWT_AUD: auth.jwt: needs one of")
    said = gateway_error(AUTH, **variables)
    assert said.startswith("gateway.toml:1, TOPPY_GW_JWT_ISS, TOPPY_GW_JWT_AUD: auth.jwt: needs")


def test_an_empty_variable_is_as_good_as_unset() -> None:
    assert parse_gateway_config(AUTH, "f", {"TOPPY_GW_LISTEN": ""}).config.listen.health


def test_a_variable_does_not_replace_what_is_no_table() -> None:
    data: dict[str, Any] = {"listen": 5}
    assert apply_environment(data, {"V": "x"}, {"V": "listen.health"}) == {"listen.health": "V"}
    assert data == {"listen": 5}
    assert "must be a table" in gateway_error("listen = 5\n" + AUTH, TOPPY_GW_LISTEN=":1")


def test_put_makes_the_tables_that_are_missing() -> None:
    data: dict[str, Any] = {"a": {"x": 1}}
    put(data, "a.b.c", 2)
    assert data == {"a": {"x": 1, "b": {"c": 2}}}


def test_a_suggestion_is_made_only_when_something_is_close() -> None:
    assert suggest("wrokers", ["workers", "name"]) == " (did you mean workers?)"
    assert suggest("zzz", ["workers", "name"]) == ""


def test_a_key_that_is_close_to_another_is_told_first_and_without_all_the_others() -> None:
    said = gateway_error(AUTH + '[[policy.rules]]\nacton = "allow"\n').splitlines()
    assert said == [
        "gateway.toml:4: policy.rules[0].acton: unknown key (did you mean action?)",
        "gateway.toml:3: policy.rules[0].action: is required",
    ]
    assert "unknown key; known here: name, action, cidr" in gateway_error(
        AUTH + '[[policy.rules]]\naction = "allow"\nzzz = 1\n'
    )


def test_a_name_that_two_rules_have_is_told_with_both_and_no_dump() -> None:
    rule = '[[policy.rules]]\nname = "a"\naction = "allow"\n'
    said = gateway_error(AUTH + rule + rule.replace('"a"', '"b"') + rule)
    assert said == (
        "gateway.toml:3: policy.rules: the name 'a' is used twice, by rule 1 and rule 3; give "
        "each a name of its own"
    )


def test_the_kind_of_auth_is_no_part_of_the_key() -> None:
    said = client_error(CLIENT + '[auth]\nmode = "saml"\nbrokerissuer = "x"\n')
    assert "config.toml:2: auth.idp_entity_id: is required" in said
    assert "config.toml:4: auth.brokerissuer: unknown key (did you mean broker_issuer?)" in said
    assert "auth.saml" not in said


def test_auth_without_a_mode_says_that_it_is_required() -> None:
    assert "auth: mode: is required" in client_error(CLIENT + '[auth]\ntoken = "t"\n')


def test_a_missing_key_is_reported_at_its_table() -> None:
    said = gateway_error(AUTH + '[[policy.rules]]\naction = "allow"\n[[policy.rules]]\n')
    assert said == "gateway.toml:5: policy.rules[1].action: is required"


def test_bounds_are_said_in_full() -> None:
    assert "must be from 1 to 65535" in client_error(CLIENT + "port = 0\n")
    assert "must be from 1 to 65507" in client_error(CLIENT + "mtu = 65508\n")
    assert "must be more than 0" in client_error(CLIENT + "audit_ship_timeout_secs = 0\n")
    assert "must be at least 0" in client_error(CLIENT + "[rate]\nbytes_per_sec = -1\n")


def test_a_key_with_a_line_break_stays_on_its_line() -> None:
    assert len(gateway_error('"a\\nb" = 1\n' + AUTH).splitlines()) == 1


def test_a_long_value_is_cut() -> None:
    assert len(gateway_error(f'workers = "{"x" * 10_000}"\n' + AUTH)) < 300


@pytest.mark.parametrize(
    "text",
    [
        'auth = "5ecret-value"',
        '[auth]\njwt = "5ecret-value"',
        '[auth]\ntoken = ["5ecret-value"]',
        '[auth]\ntoken = { a = "5ecret-value" }',
        '[auth]\ntokn = "5ecret-value"',
        '[auth]\ntoken = "5ecret value"',
        '[auth]\ntoken = "5ecret-value\\u0000"',
        '[auth.jwt]\nsecret = "5ecret-value"',
        '[auth.jwt]\nsecret = "5ecret-value"\nbad = 1',
        '[auth]\ntoken = "5ecret-value"\ntoken_file = "x"',
        '[[auth.tokens]]\ntoken = "5ecret-value"',
    ],
)
def test_no_gateway_error_shows_a_secret(text: str) -> None:
    assert "5ecret" not in gateway_error(text)


@pytest.mark.parametrize(
    "text",
    [
        'auth = "5ecret-value"',
        'auth_token = ["5ecret-value"]',
        'auth_token = "5ecret\\r\\nvalue"',
        'auth_token = { x = "5ecret-value" }',
        '[auth]\nmode = "token"\ntoken = "5ecret value"',
        '[auth]\nmode = "token"\ntoken = ["5ecret-value"]',
        '[auth]\nmode = "other"\ntoken = "5ecret-value"',
        '[auth]\ntoken = "5ecret-value"',
        'audit_ship_token = "5ecret value"',
        'audit_signing_key = ["5ecret-value"]',
    ],
)
def test_no_client_error_shows_a_secret(text: str) -> None:
    assert "5ecret" not in client_error(CLIENT + text)


def test_true_is_no_number_and_nan_is_no_time() -> None:
    assert "workers = True: must not be" in gateway_error("workers = true\n" + AUTH)
    assert "true or false" in gateway_error(AUTH + "[quic]\nidle_timeout_s = true\n")
    assert "finite" in gateway_error(AUTH + "[quic]\nidle_timeout_s = nan\n")
    assert "finite" in client_error(CLIENT + "audit_ship_timeout_secs = inf\n")


def test_a_nul_character_is_refused() -> None:
    said = gateway_error(AUTH + '[tls]\ncertificate = "a\\u0000b"\nprivate_key = "k"\n')
    assert "tls.certificate" in said
    assert "NUL" in said


_GATEWAY_KEYS = [*GatewayConfig.model_fields, *ClientConfig.model_fields, "allow", "rules", "jwt"]
_KEYS = st.sampled_from(
    [*_GATEWAY_KEYS, "cidr", "host", "ports", "claims", "action", "token", "mode", "quic"]
) | st.text(max_size=4)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["allow", "deny", "token", "saml", "10.0.0.0/8", "*.x", "1-5", ":1"])
    | st.datetimes()
    | st.just(datetime.time(1))
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_any_document_is_a_gateway_configuration_or_a_config_error(data: dict[str, Any]) -> None:
    try:
        validate(GatewayConfig, data, "", "f")
    except ConfigError as error:
        assert str(error)


@settings(deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_any_document_is_a_client_configuration_or_a_config_error(data: dict[str, Any]) -> None:
    try:
        validate(ClientConfig, {"gateway": "gw", **data}, "", "f")
    except ConfigError as error:
        assert str(error)
