"""What a gateway's configuration refuses although each value alone is right."""

from __future__ import annotations

import pytest

from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.errors import ConfigError

AUTH = '[auth]\ntoken = "long-enough"\n'


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_gateway_config(text, "gateway.toml", {})
    return str(error.value)


def taken(text: str) -> GatewayConfig:
    return parse_gateway_config(text, "gateway.toml", {}).config


def test_no_authentication_on_a_public_address_is_refused_even_beside_a_token() -> None:
    assert "loopback" in refused("insecure_no_auth = true\n" + AUTH)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "[::ffff:10.0.0.1]:1"])
def test_no_authentication_needs_every_address_to_be_loopback(address: str) -> None:
    text = f'insecure_no_auth = true\n[listen]\nquic = ["127.0.0.1:1", "{address}"]\n'
    assert address in refused(text)


def test_no_authentication_beside_a_token_has_no_effect_and_says_so() -> None:
    loaded = parse_gateway_config(
        'insecure_no_auth = true\n[listen]\nquic = ["127.0.0.1:1"]\n' + AUTH, "f", {}
    )
    assert any("no effect" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    "addresses",
    ['["127.0.0.1:1", "127.0.0.1:1"]', '[":1", "0.0.0.0:1"]', '["[::1]:1", "[0::1]:1"]'],
)
def test_one_address_twice_is_refused(addresses: str) -> None:
    assert "is there twice" in refused(f"[listen]\nquic = {addresses}\n" + AUTH)


def test_one_address_with_two_ports_that_the_system_chooses_is_taken() -> None:
    assert len(taken('[listen]\nquic = ["127.0.0.1:0", "127.0.0.1:0"]\n' + AUTH).listen.quic) == 2


@pytest.mark.parametrize("token", ["eight ch", "ünicodeünicode", "line\\nbreak", "tab\\tbreak"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    assert "printable ASCII" in refused(f'[auth]\ntoken = "{token}"\n')


@pytest.mark.parametrize("algorithm", ["none", "RS25", "HS1"])
def test_an_unknown_algorithm_is_refused(algorithm: str) -> None:
    text = f'[auth.jwt]\npublic_key_file = "k.pem"\nalgorithms = ["ES256", "{algorithm}"]\n'
    assert f"auth.jwt.algorithms[1] = '{algorithm}'" in refused(text)


def test_a_short_hmac_secret_is_refused() -> None:
    assert "at least 16 bytes" in refused('[auth.jwt]\nsecret = "only-15-bytes-x"\n')


def test_a_connection_may_queue_what_one_tunnel_may() -> None:
    text = "[limits]\nconnection_queue_bytes = 65536\n"
    assert "must not be below tunnel_queue_bytes" in refused(AUTH + text)


def test_the_log_level_may_be_written_in_capitals() -> None:
    assert taken(AUTH + '[log]\nlevel = "DEBUG"\n').log.level == "debug"


@pytest.mark.parametrize(("written", "means"), [('"auto"', "auto"), ('"4"', 4), ("64", 64)])
def test_workers_are_a_number_or_auto(written: str, means: int | str) -> None:
    assert taken(f"workers = {written}\n" + AUTH).workers == means


@pytest.mark.parametrize("written", ["0", "65", "-1", "1.5", '"AUTO"', "[]", "{}"])
def test_other_workers_are_refused(written: str) -> None:
    assert "from 1 to 64" in refused(f"workers = {written}\n" + AUTH)
