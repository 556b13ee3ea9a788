"""``[tls]``: what can be asked for, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.config.tls import CIPHER_SUITES
from toppy.errors import ConfigError

TOKEN = {"TOPPY_GW_TOKEN": "a-token-for-tests"}
PAIR = 'certificate = "c.pem"\nprivate_key = "k.pem"\n'


def parse(tls: str = "", auth: str = "", **variables: str) -> GatewayConfig:
    text = f"[tls]\n{tls}\n{auth}"
    return parse_gateway_config(text, "gateway.toml", {**TOKEN, **variables}).config


def test_every_variable_sets_its_key() -> None:
    tls = parse(
        TOPPY_GW_TLS_ENABLED="true",
        TOPPY_GW_TLS_CERT_PATH="c.pem",
        TOPPY_GW_TLS_KEY_PATH="k.pem",
        TOPPY_GW_TLS_KEY_PASSPHRASE_FILE="p",
        TOPPY_GW_TLS_ALLOW_OPEN_KEY="true",
        TOPPY_GW_TLS_CA_PATH="ca.pem",
        TOPPY_GW_TLS_CLIENT_CERTIFICATES="optional",
        TOPPY_GW_TLS_MIN_VERSION="TLSv1.3",
        TOPPY_GW_TLS_CIPHER_SUITES=f"{CIPHER_SUITES[2]}, {CIPHER_SUITES[0]}",
    ).tls
    assert (tls.certificate, tls.private_key, tls.client_ca) == ("c.pem", "k.pem", "ca.pem")
    assert tls.private_key_passphrase_file == "p"
    assert tls.allow_open_private_key
    assert tls.wanted_client_certificates == "optional"
    assert tls.cipher_suites == (CIPHER_SUITES[2], CIPHER_SUITES[0])


def test_a_passphrase_from_the_environment_is_in_no_repr() -> None:
    config = parse(PAIR, TOPPY_GW_TLS_PASSPHRASE="correct horse")
    assert config.tls.private_key_passphrase is not None
    assert config.tls.private_key_passphrase.get_secret_value() == "correct horse"
    assert "correct horse" not in repr(config)


@pytest.mark.parametrize(
    "names",
    [("TOPPY_GW_CERT", "TOPPY_GW_KEY"), ("TOPPY_GW_TLS_CERT_PATH", "TOPPY_GW_TLS_KEY_PATH")],
)
def test_both_names_of_the_pair_are_taken_and_come_together(names: tuple[str, str]) -> None:
    assert parse(**dict.fromkeys(names, "x.pem")).tls.certificate == "x.pem"
    for name in names:
        with pytest.raises(ConfigError, match="go together"):
            parse(**{name: "x.pem"})


def test_two_names_with_two_values_are_refused() -> None:
    pair = {"TOPPY_GW_KEY": "k.pem", "TOPPY_GW_CERT": "a.pem"}
    with pytest.raises(ConfigError, match="different values"):
        parse(**pair, TOPPY_GW_TLS_CERT_PATH="b.pem")
    assert parse(**pair, TOPPY_GW_TLS_CERT_PATH="a.pem").tls.certificate == "a.pem"


def test_a_key_from_the_environment_does_not_have_the_files_passphrase() -> None:
    tls = f'{PAIR}private_key_passphrase_file = "p"'
    assert parse(tls).tls.private_key_passphrase_file == "p"
    found = parse(tls, TOPPY_GW_CERT="x.pem", TOPPY_GW_KEY="y.pem").tls
    assert not found.has_passphrase


def test_a_ca_of_clients_means_that_certificates_are_required() -> None:
    assert parse('client_ca = "ca.pem"').tls.wanted_client_certificates == "required"
    assert parse().tls.wanted_client_certificates == "none"


@pytest.mark.parametrize(
    ("tls", "reason"),
    [
        ("enabled = false", "always encrypted"),
        ('min_version = "TLSv1.2"', "QUIC has no earlier TLS"),
        ('cipher_suites = ["TLS_RSA_WITH_AES_128_CBC_SHA"]', "no cipher suite of TLS 1.3"),
        (f'cipher_suites = ["{CIPHER_SUITES[0]}", "{CIPHER_SUITES[0]}"]', "twice"),
        ('client_certificates = "required"', "needs client_ca"),
        ('client_certificates = "sometimes"', "none"),
        ('certificate = "c.pem"', "private_key is missing"),
        ('private_key_passphrase_file = "p"', "no private_key"),
        (f'{PAIR}private_key_passphrase = "x"\nprivate_key_passphrase_file = "p"', "not both"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tls: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(tls)


def test_a_passphrase_is_in_no_error() -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"{PAIR}private_key_passphrase = 17171717")
    assert "17171717" not in str(error.value)


class TestAsCredentials:
    AUTH = "[auth.client_certificate]\naccept = true\n"

    def test_they_are_authentication(self) -> None:
        text = f'[tls]\nclient_ca = "ca.pem"\n{self.AUTH}'
        config = parse_gateway_config(text, "gateway.toml", {}).config
        assert config.auth.is_configured
        assert config.auth.client_certificate.name_from == "san"

    def test_they_need_a_ca(self) -> None:
        with pytest.raises(ConfigError, match=r"set tls\.client_ca"):
            parse("", self.AUTH)

    @pytest.mark.parametrize(
        "text", ['name_from = "common_name"', 'name_from = "x"\naccept = true']
    )
    def test_half_a_table_is_refused(self, text: Any) -> None:
        with pytest.raises(ConfigError):
            parse('client_ca = "ca.pem"', f"[auth.client_certificate]\n{text}")

    @pytest.mark.parametrize("table", ['rules]]\naction = "deny"', 'roles]]\nrole = "r"'])
    def test_a_host_name_that_no_certificate_can_have_is_refused(self, table: str) -> None:
        with pytest.raises(ConfigError, match="write 'cert:bob'"):
            parse(auth=f'[[policy.{table}\nsubjects = ["x", "cert:Bob"]\n')

    @pytest.mark.parametrize("subject", ["cert:bob", "cert:Bob@b.example", "cert:urn:x:Bob", "Bob"])
    def test_other_names_keep_their_case(self, subject: str) -> None:
        parse(auth=f'[[policy.rules]]\naction = "deny"\nsubjects = ["{subject}"]\n')

    def test_common_names_keep_their_case(self) -> None:
        parse(
            PAIR + 'client_ca = "ca.pem"\n',
            '[auth.client_certificate]\naccept = true\nname_from = "common_name"\n'
            '[[policy.rules]]\naction = "deny"\nsubjects = "cert:Bob"\n',
        )
