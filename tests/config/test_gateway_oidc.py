"""``[auth.oidc]`` of the gateway."""

from __future__ import annotations

import pytest

from toppy.config.authentication import OidcSection
from toppy.config.gateway import parse_gateway_config
from toppy.errors import ConfigError

GOOD = '[auth.oidc]\nissuer = "https://login.example/realm"\naudience = "urn:gw"\n'


def section(text: str) -> OidcSection:
    return parse_gateway_config(text, "gateway.toml", {}).config.auth.oidc


def test_an_issuer_alone_is_authentication_enough() -> None:
    found = section(GOOD)
    assert found.is_configured
    assert (found.leeway_s, found.refresh_s, found.roles) == (60, 300, ())


def test_claims_give_roles() -> None:
    found = section(
        GOOD
        + '[[auth.oidc.roles]]\nrole = "ops"\nclaim = "groups"\nvalues = ["a", "b"]\n'
        + '[[auth.oidc.roles]]\nrole = "net"\nclaim = "realm_access.roles"\nvalues = "n"\n'
    )
    assert [(each.role, each.claim, each.values) for each in found.roles] == [
        ("ops", "groups", ("a", "b")),
        ("net", "realm_access.roles", ("n",)),
    ]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_an_issuer_on_loopback_may_do_without_tls(host: str) -> None:
    assert section(GOOD.replace("https://login.example", f"http://{host}:8080")).is_configured


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[auth.oidc]\nissuer = "https://i.example"\n', "audience is missing"),
        ('[auth.oidc]\naudience = "gw"\n', "issuer is missing"),
        ("[auth.oidc]\nleeway_s = 5\n", "needs issuer and audience"),
        (GOOD.replace("https", "http"), "https://"),
        (GOOD.replace("https://login", "http://localhost.login"), "https://"),
        (GOOD.replace("https://login", "http://127.0.0.1@login"), "https://"),
        (GOOD.replace("login.example", "login .example"), "https://"),
        (GOOD + "refresh_s = 1\n", "refresh_s"),
        (GOOD + '[[auth.oidc.roles]]\nrole = "x"\nclaim = "y"\nvalues = []\n', "values"),
        (GOOD + '[[auth.oidc.roles]]\nrole = "x"\nclaim = "y"\n', "values"),
        (GOOD + 'algorithm = "none"\n', "algorithm"),
    ],
)
def test_what_is_not_safe_or_not_whole_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        section(text)


JWT = '[auth.jwt]\nsecret = "a secret of at least thirty-two bytes!"\n'


def both(jwt: str, oidc: str) -> str:
    return f'{JWT}subject_prefix = "{jwt}"\n{GOOD}subject_prefix = "{oidc}"\n'


@pytest.mark.parametrize(("jwt", "oidc"), [("", ""), ("a:", "a:"), ("a", ""), ("", "cert:")])
def test_two_issuers_must_not_name_their_subjects_alike(jwt: str, oidc: str) -> None:
    with pytest.raises(ConfigError, match="subject_prefix"):
        parse_gateway_config(both(jwt, oidc), "gateway.toml", {})


@pytest.mark.parametrize(("jwt", "oidc"), [("", "staff:"), ("services/", ""), ("a:", "b:")])
def test_a_prefix_keeps_two_issuers_apart(jwt: str, oidc: str) -> None:
    auth = parse_gateway_config(both(jwt, oidc), "gateway.toml", {}).config.auth
    assert (auth.jwt.subject_prefix, auth.oidc.subject_prefix) == (jwt, oidc)


def test_one_issuer_needs_no_prefix() -> None:
    assert section(GOOD).subject_prefix == ""
