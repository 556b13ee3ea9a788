"""Every wrong value is named with file, line, key, value and what is allowed."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.config.address import parse_host_port
from toppy.config.gateway import GatewayConfig, parse_gateway_config, resolve_path
from toppy.errors import ConfigError

AUTH = '[auth]\ntoken = "long-enough"\n'


def parse(text: str, **environ: str) -> GatewayConfig:
    return parse_gateway_config(text, "gateway.toml", environ).config


def error_of(text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text, **environ)
    return str(refused.value)


def test_the_environment_alone_configures_a_gateway() -> None:
    config = parse("", TOPPY_GW_TOKEN="long-enough")
    assert config.listen.quic == ("0.0.0.0:4433", "[::]:4433")
    assert config.listen.health == "0.0.0.0:8080"
    assert config.auth.is_configured


def test_variables_override_the_file() -> None:
    config = parse(
        '[listen]\nhealth = "127.0.0.1:1"\n[quic]\nengine = "native"\n[auth]\ntoken_file = "t"\n',
        TOPPY_GW_LISTEN="127.0.0.1:2",
        TOPPY_GW_QUIC_LISTEN="127.0.0.1:3, [::1]:3",
        TOPPY_GW_CERT="c.pem",
        TOPPY_GW_KEY="k.pem",
        TOPPY_GW_TOKEN="from-the-environment",
        TOPPY_GW_JWT_SECRET="0123456789abcdef",
        TOPPY_GW_JWT_ISS="idp",
        TOPPY_GW_JWT_AUD="toppy",
        TOPPY_GW_LOG_LEVEL="debug",
        TOPPY_QUIC_ENGINE="aioquic",
    )
    assert config.listen.health == "127.0.0.1:2"
    assert config.listen.quic == ("127.0.0.1:3", "[::1]:3")
    assert config.tls.certificate == "c.pem"
    assert config.auth.token is not None
    assert config.auth.token.get_secret_value() == "from-the-environment"
    assert (config.auth.jwt.issuer, config.auth.jwt.audience) == ("idp", "toppy")
    assert config.quic.engine == "aioquic"
    assert config.log.level == "debug"


def test_a_variable_that_nobody_knows_is_a_warning_with_a_suggestion() -> None:
    loaded = parse_gateway_config(AUTH, "gateway.toml", {"TOPPY_GW_TOKN": "x", "PATH": "/bin"})
    assert len(loaded.warnings) == 1
    assert "TOPPY_GW_TOKN" in loaded.warnings[0]
    assert "did you mean TOPPY_GW_TOKEN" in loaded.warnings[0]


@pytest.mark.parametrize("variable", ["TOPPY_GW_CERT", "TOPPY_GW_KEY"])
def test_a_certificate_without_its_key_is_refused(variable: str) -> None:
    assert "go together" in error_of(AUTH, **{variable: "x.pem"})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("wrokers = 2\n" + AUTH, ["gateway.toml:1", "wrokers", "did you mean workers"]),
        (AUTH + "[limits]\nmax_conections = 1\n", [":4", "limits.max_conections", "unknown key"]),
        (AUTH + "[limits]\nmax_connections = 0\n", [":4", "limits.max_connections = 0", "1"]),
        (AUTH + '[limits]\nmax_connections = "x"\n', ["'x'", "integer"]),
        ("workers = 0\n" + AUTH, ["workers = 0", "1 to 64"]),
        ('workers = "many"\n' + AUTH, ["workers", "many", "auto"]),
        (AUTH + '[quic]\nengine = "fast"\n', ["quic.engine = 'fast'", "native"]),
        (AUTH + "[quic]\nmax_packet_bytes = 1300\n", ["quic", "must not be below"]),
        (AUTH + '[listen]\nquic = ["localhost:1"]\n', ["listen.quic", "localhost", "address"]),
        (AUTH + '[listen]\nquic = ["::1:1"]\n', ["listen.quic", "brackets"]),
        (AUTH + "[listen]\nquic = []\n", ["listen.quic", "at least one"]),
        (AUTH + '[listen]\nhealth = "nowhere"\n', ["listen.health", "HOST:PORT"]),
        (AUTH + '[tls]\ncertificate = "c.pem"\n', ["tls", "private_key is missing"]),
        (AUTH + '[resolver]\nnameservers = ["dns.example"]\n', ["resolver.nameservers"]),
        (AUTH + '[[policy.rules]]\naction = "maybe"\n', ["policy.rules[0].action", "'maybe'"]),
        (AUTH + '[[policy.rules]]\ncidr = "10.0.0.0/8"\n', ["action: is required"]),
        (
            AUTH + '[[policy.rules]]\naction = "allow"\n[[policy.rules]]\naction = "allow"\n'
            'cidr = "10.0.0.0/33"\n',
            [":7", "policy.rules[1].cidr", "10.0.0.0/33", "write"],
        ),
        (AUTH + '[[policy.rules]]\naction = "allow"\nports = [0]\n', ["ports", "1 to 65535"]),
        (AUTH + '[[policy.rules]]\naction = "allow"\nports = []\n', ["ports", "empty list"]),
        (AUTH + '[[policy.rules]]\naction = "allow"\nports = ["9-8"]\n', ["9-8"]),
        (AUTH + '[[policy.rules]]\naction = "allow"\nhost = "a b"\n', ["host", "'a b'"]),
        ("name = 'two words'\n" + AUTH, ["name", "token"]),
        ("[auth]\ntoken = 'short'\n", ["auth.token", "at least 8"]),
        ("[auth.jwt]\nissuer = 'x'\n", ["auth.jwt", "secret"]),
        ("[auth]\ntoken = 'long-enough'\ntoken_file = 'x'\n", ["auth", "not both"]),
        ("", ["no authentication", "insecure_no_auth"]),
        ("insecure_no_auth = true\n", ["loopback"]),
        ("this is not toml", ["gateway.toml", "not valid TOML"]),
    ],
)
def test_an_error_says_where_what_and_what_is_allowed(text: str, parts: list[str]) -> None:
    said = error_of(text)
    for part in parts:
        assert part in said, said


def test_every_error_is_listed() -> None:
    said = error_of("workers = 0\n[quic]\nengine = 'x'\n" + AUTH)
    assert len(said.splitlines()) == 2


def test_no_authentication_is_served_on_loopback_when_told_to() -> None:
    config = parse('insecure_no_auth = true\n[listen]\nquic = ["127.0.0.1:1", "[::1]:1"]\n')
    assert not config.auth.is_configured


def test_secrets_are_neither_in_repr_nor_in_errors() -> None:
    secret = "5up3r-s3cr3t-v4lu3"
    config = parse(f'[auth]\ntoken = "{secret}"\n[auth.jwt]\nsecret = "{secret}"\n')
    assert secret not in repr(config)
    for text in (
        f'[auth]\ntoken = "{secret}"\ntoken_file = "x"\n',
        f'[auth.jwt]\nsecret = "{secret}"\nsecret_file = "x"\n',
        f'[auth]\ntoken = ["{secret}"]\n',
    ):
        assert secret not in error_of(text)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("0.0.0.0:4433", ("0.0.0.0", 4433)),
        (":4433", ("0.0.0.0", 4433)),
        ("[::]:1", ("::", 1)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
    ],
)
def test_addresses(text: str, means: tuple[str, int]) -> None:
    assert parse_host_port(text) == means


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        host, port = parse_host_port(text)
    except ValueError:
        return
    assert host
    assert 0 <= port <= 65535


@given(st.text(max_size=200))
def test_any_file_is_a_configuration_or_a_config_error(text: str) -> None:
    try:
        parse(text + "\n" + AUTH)
    except ConfigError:
        return
    tomllib.loads(text + "\n" + AUTH)


def test_relative_paths_begin_at_the_files_directory() -> None:
    assert resolve_path("/etc/toppy", "server.pem") == "/etc/toppy/server.pem"
    assert resolve_path("/etc/toppy", "/var/x") == "/var/x"
