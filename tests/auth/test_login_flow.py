"""Device login and browser login, step by step, in virtual time."""

from __future__ import annotations

from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.auth.login_flow import (
    MAX_INTERVAL_S,
    AuthorizationCodeFlow,
    CodeState,
    DeviceFlow,
    DeviceState,
    challenge_of,
    parse_redirect_uri,
)
from toppy.auth.oidc import (
    Client,
    DeviceAuthorization,
    OidcError,
    Provider,
    ProviderRefusedError,
)
from toppy.errors import ConfigError, LocalError

ISSUER = "https://login.example"
URI = "http://127.0.0.1:8080/callback"
PROVIDER = Provider(
    ISSUER, f"{ISSUER}/token", f"{ISSUER}/jwks", authorization_endpoint=f"{ISSUER}/auth?x=1"
)
CLIENT = Client("toppy", "openid offline_access", "urn:gw")


def device_flow(lifetime_s: float = 600) -> DeviceFlow:
    found = DeviceAuthorization("d", "ABCD", f"{ISSUER}/device", None, lifetime_s, 5.0)
    return DeviceFlow(found, 100.0)


def refuse(flow: DeviceFlow, code: str, now: float) -> None:
    flow.receive_refusal(ProviderRefusedError(code), now)


def test_a_device_login_polls_at_its_interval_until_it_is_approved() -> None:
    flow = device_flow()
    assert flow.next_timeout() == 105
    assert not flow.handle_timeout(104.9)
    assert flow.handle_timeout(105)
    refuse(flow, "authorization_pending", 106)
    assert flow.next_timeout() == 111
    flow.receive_tokens()
    assert flow.state is DeviceState.APPROVED
    assert flow.next_timeout() is None


def test_slow_down_adds_five_seconds_for_good() -> None:
    flow = device_flow()
    refuse(flow, "slow_down", 105)
    assert flow.next_timeout() == 115
    refuse(flow, "authorization_pending", 115)
    assert flow.next_timeout() == 125
    refuse(flow, "slow_down", 125)
    assert flow.next_timeout() == 140


def test_a_silent_provider_is_asked_less_often() -> None:
    flow = device_flow()
    flow.receive_silence(105)
    assert flow.next_timeout() == 115
    for _ in range(10):
        flow.receive_silence(115)
    assert flow.interval_s == MAX_INTERVAL_S


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("access_denied", DeviceState.DENIED, "denied"),
        ("expired_token", DeviceState.EXPIRED, "not used in time"),
        ("invalid_client", DeviceState.FAILED, "invalid_client"),
    ],
)
def test_a_device_login_ends_with_its_reason(code: str, state: DeviceState, why: str) -> None:
    flow = device_flow()
    refuse(flow, code, 105)
    assert flow.state is state
    assert why in flow.problem
    assert not flow.handle_timeout(1000)
    for answer in (flow.receive_tokens, lambda: flow.receive_silence(1)):
        with pytest.raises(LocalError):
            answer()


def test_a_device_code_ends_with_its_time_even_when_nobody_answers() -> None:
    flow = device_flow(lifetime_s=7)
    refuse(flow, "authorization_pending", 105)
    assert flow.next_timeout() == 107
    assert not flow.handle_timeout(107)
    assert flow.state is DeviceState.EXPIRED


@given(st.lists(st.sampled_from(["authorization_pending", "slow_down", "silence"]), max_size=50))
def test_a_device_login_never_polls_faster_and_always_ends(answers: list[str]) -> None:
    flow, now, interval = device_flow(), 100.0, 5.0
    for answer in answers:
        due = flow.next_timeout()
        if due is None:
            break
        now = due
        if not flow.handle_timeout(now):
            continue
        if answer == "silence":
            flow.receive_silence(now)
        else:
            refuse(flow, answer, now)
        assert flow.interval_s >= interval
        interval = flow.interval_s
    flow.handle_timeout(100.0 + 600)
    assert flow.state is DeviceState.EXPIRED


# authorization code


def code_flow(provider: Provider = PROVIDER, uri: str = URI) -> AuthorizationCodeFlow:
    return AuthorizationCodeFlow(
        provider, CLIENT, uri, verifier=b"v" * 32, state=b"s" * 16, nonce=b"n" * 16
    )


def asked(flow: AuthorizationCodeFlow) -> dict[str, str]:
    found = parse_qs(urlsplit(flow.authorization_url).query)
    return {name: values[0] for name, values in found.items()}


def redirect(flow: AuthorizationCodeFlow, **changes: str | None) -> str:
    parameters = {"code": "the-code", "state": asked(flow)["state"], **changes}
    kept = {name: value for name, value in parameters.items() if value is not None}
    return f"/callback?{urlencode(kept)}"


def test_the_challenge_is_that_of_rfc_7636() -> None:
    # RFC 7636 appendix B
    verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    assert challenge_of(verifier) == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_the_address_to_open_has_everything_and_no_verifier() -> None:
    flow = code_flow()
    found = asked(flow)
    assert found["x"] == "1"
    assert found["code_challenge_method"] == "S256"
    assert found["redirect_uri"] == URI
    assert found["response_type"] == "code"
    assert found["prompt"] == "consent"
    assert found["audience"] == found["resource"] == "urn:gw"
    flow.receive_request("GET", redirect(flow))
    verifier = flow.token_request()["code_verifier"]
    assert challenge_of(verifier) == found["code_challenge"]
    assert len(verifier) == 43
    assert verifier not in flow.authorization_url


def test_the_right_redirect_brings_the_code() -> None:
    flow = code_flow()
    assert flow.receive_request("GET", redirect(flow, iss=ISSUER)).status == 200
    form = flow.token_request()
    assert (form["code"], form["redirect_uri"]) == ("the-code", URI)
    assert form["grant_type"] == "authorization_code"
    assert "the-code" not in repr(flow)


def test_a_wrong_path_or_method_changes_nothing() -> None:
    flow = code_flow()
    assert flow.receive_request("GET", "/favicon.ico").status == 404
    assert flow.receive_request("GET", redirect(flow).replace("back", "back/")).status == 404
    assert flow.receive_request("POST", redirect(flow)).status == 405
    assert flow.state is CodeState.WAITING
    with pytest.raises(LocalError):
        flow.token_request()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": "other"}, "state"),
        ({"state": None}, "state"),
        ({"state": "\u00e9"}, "state"),
        ({"iss": "https://other.example"}, "iss"),
        ({"code": None}, "no code"),
        ({"code": ""}, "no code"),
        ({"error": "access_denied", "code": None}, "access_denied"),
    ],
)
def test_a_wrong_redirect_is_400_and_ends_the_login(changes: dict[str, str], why: str) -> None:
    flow = code_flow()
    assert flow.receive_request("GET", redirect(flow, **changes)).status == 400
    assert flow.state is CodeState.FAILED
    assert why in flow.problem
    assert flow.receive_request("GET", redirect(flow)).status == 410


def test_a_parameter_that_comes_twice_ends_the_login() -> None:
    flow = code_flow()
    assert flow.receive_request("GET", redirect(flow) + "&code=other").status == 400
    assert flow.state is CodeState.FAILED


def test_a_provider_that_names_itself_must_do_so() -> None:
    provider = Provider(
        ISSUER, "t", "j", authorization_endpoint=f"{ISSUER}/auth", names_itself=True
    )
    flow = code_flow(provider)
    assert flow.receive_request("GET", redirect(flow)).status == 400


@given(st.text(max_size=60), st.text(max_size=200))
def test_no_guess_brings_a_code(method: str, target: str) -> None:
    flow = code_flow()
    flow.receive_request(method, target)
    flow.receive_request("GET", f"/callback?{target}")
    assert flow.state is not CodeState.RECEIVED


def test_a_provider_without_browser_login_is_told_so() -> None:
    with pytest.raises(OidcError, match="oidc_device_code"):
        code_flow(Provider(ISSUER, "t", "j"))


def test_too_little_randomness_is_an_error_of_the_callers() -> None:
    with pytest.raises(LocalError):
        AuthorizationCodeFlow(PROVIDER, CLIENT, URI, verifier=b"v", state=b"s", nonce=b"n")


@pytest.mark.parametrize(
    "uri",
    [
        *("http://192.0.2.1:80/x", "https://127.0.0.1/x", "http://127.0.0.1/x?y=1", "x", ""),
        *("http://example.com/", "http://127.0.0.1:99999/", "http://[::1/"),
    ],
)
def test_only_loopback_is_listened_on(uri: str) -> None:
    with pytest.raises(ConfigError, match="redirect_uri"):
        parse_redirect_uri(uri)


def test_a_redirect_uri_is_cut_up() -> None:
    found = parse_redirect_uri("http://[::1]:0")
    assert (found.host, found.port, found.path) == ("::1", 0, "/")
    assert parse_redirect_uri("http://localhost/cb").port == 80
