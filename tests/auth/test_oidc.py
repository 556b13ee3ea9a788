"""What a provider says, and what of it is believed."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from toppy.auth.oidc import (
    Client,
    OidcError,
    Provider,
    ProviderRefusedError,
    ProviderUnreachableError,
    check_id_token,
    check_url,
    device_request,
    device_token_request,
    discovery_url,
    parse_device_authorization,
    parse_discovery,
    parse_refusal,
    parse_tokens,
    refresh_request,
    revocation_request,
    show,
)

ISSUER = "https://login.example"
NOW = 1_700_000_000.0
CLIENT = Client("toppy", "openid offline_access", "urn:gw")
PROVIDER = Provider(ISSUER, f"{ISSUER}/token", f"{ISSUER}/jwks")
KEY = rsa.generate_private_key(65537, 2048)
OTHER_KEY = rsa.generate_private_key(65537, 2048)


def jwks(*keys: rsa.RSAPrivateKey) -> str:
    made = [jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True) for key in keys]
    return json.dumps({"keys": made})


def discovery(**changes: Any) -> bytes:
    found = {
        "issuer": ISSUER,
        "token_endpoint": f"{ISSUER}/token",
        "jwks_uri": f"{ISSUER}/jwks",
        "device_authorization_endpoint": f"{ISSUER}/device",
        **changes,
    }
    return json.dumps(found).encode()


def id_token(key: Any = KEY, **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": "toppy", "sub": "alice", "exp": NOW + 60, "iat": NOW, **changes}
    return jwt.encode(claims, key, "RS256")


def test_discovery_is_found_below_the_issuer() -> None:
    assert discovery_url(ISSUER) == f"{ISSUER}/.well-known/openid-configuration"
    assert discovery_url(f"{ISSUER}/realm/") == f"{ISSUER}/realm/.well-known/openid-configuration"


def test_a_discovery_document_is_read() -> None:
    found = parse_discovery(discovery(unknown=[1]), ISSUER)
    assert found.device_authorization_endpoint == f"{ISSUER}/device"
    assert found.authorization_endpoint is None


def test_a_provider_that_calls_itself_otherwise_is_refused() -> None:
    with pytest.raises(OidcError, match="calls itself"):
        parse_discovery(discovery(issuer=f"{ISSUER}/"), ISSUER)


@pytest.mark.parametrize(
    "url",
    [
        *("http://login.example/token", "ftp://x/", "https://", "https://u@h/", "https://h/#f"),
        *("", "https://h:99999/", "https://h\n/", "https://[::1", "https://h:0/", "javascript:x"),
    ],
)
def test_only_https_and_loopback_addresses_are_used(url: str) -> None:
    with pytest.raises(OidcError):
        check_url(url, "token_endpoint")
    with pytest.raises(OidcError):
        parse_discovery(discovery(token_endpoint=url), ISSUER)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "127.0.0.2:8080"])
def test_plain_http_is_for_loopback(host: str) -> None:
    check_url(f"http://{host}/x", "issuer")


@given(st.binary(max_size=300))
def test_any_answer_is_read_or_refused(data: bytes) -> None:
    for parse in (
        lambda: parse_discovery(data, ISSUER),
        lambda: parse_tokens(data),
        lambda: parse_device_authorization(data, CLIENT),
    ):
        with pytest.raises(OidcError):
            parse()
    assert isinstance(parse_refusal(400, data), OidcError)


@given(
    st.dictionaries(
        st.sampled_from(["access_token", "token_type", "expires_in", "refresh_token", "scope"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    )
)
def test_any_token_answer_is_sendable_or_refused(fields: dict[str, Any]) -> None:
    try:
        found = parse_tokens(json.dumps(fields).encode())
    except OidcError:
        return
    assert found.access_token.isascii()
    assert " " not in found.access_token
    assert found.lifetime_s is None or found.lifetime_s > 0


def test_numbers_may_be_written_as_text() -> None:
    data = {"access_token": "x", "token_type": "bearer", "expires_in": "3600"}
    assert parse_tokens(json.dumps(data).encode()).lifetime_s == 3600


def test_no_error_and_no_repr_shows_a_token() -> None:
    data = {"access_token": "se cret", "token_type": "Bearer"}
    with pytest.raises(OidcError) as refused:
        parse_tokens(json.dumps(data).encode())
    assert "se cret" not in str(refused.value)
    data = {"access_token": "sesame", "token_type": "Bearer", "refresh_token": "open"}
    found = parse_tokens(json.dumps(data).encode())
    assert "sesame" not in repr(found)
    assert "open" not in repr(found)


def test_a_token_that_is_no_bearer_token_is_refused() -> None:
    with pytest.raises(OidcError, match="DPoP"):
        parse_tokens(b'{"access_token": "x", "token_type": "DPoP"}')


def device_answer(**changes: Any) -> bytes:
    found = {
        "device_code": "d",
        "user_code": "ABCD",
        "verification_uri": f"{ISSUER}/device",
        "expires_in": 600,
        **changes,
    }
    return json.dumps(found).encode()


def test_the_poll_interval_is_five_seconds_unless_said_otherwise() -> None:
    assert parse_device_authorization(device_answer(), CLIENT).interval_s == 5
    assert parse_device_authorization(device_answer(interval=2), CLIENT).interval_s == 2
    assert parse_device_authorization(device_answer(interval=0), CLIENT).interval_s == 1


def test_a_device_answer_without_an_address_or_time_is_refused() -> None:
    for changes in (
        {"verification_uri": None},
        {"expires_in": 0},
        {"user_code": ""},
        {"user_code": "\x1b[2J"},
        {"verification_uri": "http://elsewhere.example/"},
    ):
        with pytest.raises(OidcError):
            parse_device_authorization(device_answer(**changes), CLIENT)


def test_a_brokers_hint_is_in_the_request_and_in_the_addresses() -> None:
    client = Client("c", "openid", None, {"aarc_idp_hint": "https://idp.example/?a=b"})
    assert device_request(client)["aarc_idp_hint"] == "https://idp.example/?a=b"
    complete = f"{ISSUER}/device?user_code=ABCD"
    found = parse_device_authorization(device_answer(verification_uri_complete=complete), client)
    hint = "aarc_idp_hint=https%3A%2F%2Fidp.example%2F%3Fa%3Db"
    assert found.verification_uri == f"{ISSUER}/device?{hint}"
    assert found.verification_uri_complete == f"{complete}&{hint}"


def test_the_audience_is_asked_for_in_both_ways_that_providers_know() -> None:
    for form in (device_token_request(CLIENT, "d"), refresh_request(CLIENT, "r")):
        assert (form["audience"], form["resource"]) == ("urn:gw", "urn:gw")
    assert "resource" not in refresh_request(Client("c", "openid", "gw"), "r")
    assert "audience" not in refresh_request(Client("c", "openid"), "r")
    assert revocation_request(CLIENT, "r", "refresh_token") == {
        "token": "r",
        "token_type_hint": "refresh_token",
        "client_id": "toppy",
    }


def test_refusals_and_trouble_are_told_apart() -> None:
    refusal = parse_refusal(400, b'{"error": "slow_down"}')
    assert isinstance(refusal, ProviderRefusedError)
    assert refusal.code == "slow_down"
    for status, data in ((503, b"busy"), (500, b'{"error": "server_error"}'), (429, b"")):
        assert isinstance(parse_refusal(status, data), ProviderUnreachableError)
    other = parse_refusal(404, b"nothing")
    assert not isinstance(other, ProviderRefusedError | ProviderUnreachableError)
    assert "404" in str(other)


def test_what_a_provider_says_is_made_fit_for_a_terminal() -> None:
    assert show("a\x1b[2Jb\n") == "a?[2Jb?"
    assert len(show("x" * 5000)) == 201


def check(token: str, *, nonce: str | None = None, keys: str | None = None) -> str:
    found = check_id_token(token, keys or jwks(KEY), PROVIDER, CLIENT, NOW, nonce=nonce)
    return found.subject


def test_an_id_token_says_who_logged_in() -> None:
    assert check(id_token()) == "alice"
    assert check(id_token(nonce="n"), nonce="n") == "alice"
    assert check(id_token(aud=["toppy", "x"], azp="toppy")) == "alice"


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (id_token(iss="https://other.example"), "iss"),
        (id_token(aud="other"), "aud"),
        (id_token(exp=NOW - 61), "expired"),
        (id_token(iat=NOW + 61), "iat"),
        (id_token(azp="other"), "azp"),
        (id_token(key=OTHER_KEY), "signature"),
        (id_token(nonce="other"), "nonce"),
        (id_token(), "nonce"),
        ("no token", "no JWT"),
        (jwt.encode({"iss": ISSUER}, "x" * 32, "HS256"), "not allowed"),
    ],
    ids=["iss", "aud", "exp", "iat", "azp", "key", "nonce", "no nonce", "text", "algorithm"],
)
def test_an_id_token_that_is_not_this_logins_is_refused(token: str, why: str) -> None:
    with pytest.raises(OidcError, match=why):
        check(token, nonce="n" if why == "nonce" else None)


def test_clocks_may_differ_by_a_minute() -> None:
    assert check(id_token(iat=NOW + 59)) == "alice"
    assert check(id_token(exp=NOW - 59)) == "alice"


def test_a_key_set_without_keys_is_an_error_of_the_providers() -> None:
    with pytest.raises(OidcError, match="jwks_uri"):
        check(id_token(), keys='{"keys": []}')
