"""Tokens of an OpenID issuer at the gateway."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from toppy.auth.authenticator import Authenticator
from toppy.auth.issuer import IssuerVerifier, NoKeysError, RoleMapping
from toppy.auth.jwt import AuthenticationError, JwtVerifier, UnknownKeyError
from toppy.errors import ConfigError

ISSUER = "https://login.example"
NOW = 1_700_000_000.0
SECRET = "a secret of at least thirty-two bytes!"
KEY = rsa.generate_private_key(65537, 2048)
NEXT_KEY = rsa.generate_private_key(65537, 2048)


def jwks(**keys: rsa.RSAPrivateKey) -> str:
    made = [
        {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id}
        for key_id, key in keys.items()
    ]
    return json.dumps({"keys": made})


def token(key: rsa.RSAPrivateKey = KEY, kid: str = "one", **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": "urn:gw", "sub": "alice", "exp": NOW + 60, **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, "RS256", headers={"kid": kid})


def verifier(*roles: RoleMapping) -> IssuerVerifier:
    made = IssuerVerifier(ISSUER, "urn:gw", roles=roles)
    made.use_keys(jwks(one=KEY))
    return made


def test_a_token_of_the_issuer_for_this_audience_is_taken() -> None:
    identity, expires_at = verifier().verify(token(team="ops"), NOW)
    assert (identity.subject, identity.method, identity.roles) == ("alice", "oidc", ())
    assert identity.claims["team"] == "ops"
    assert expires_at == NOW + 120


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"iss": "https://other.example"}, "iss"),
        ({"aud": "toppy"}, "aud"),
        ({"aud": None}, "aud"),
        ({"exp": NOW - 61}, "expired"),
        ({"exp": None}, "expiry"),
        ({"nbf": NOW + 61}, "nbf"),
        ({"sub": None}, "subject"),
        ({"sub": "token"}, "reserves"),
    ],
)
def test_other_tokens_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(AuthenticationError, match=why):
        verifier().verify(token(**changes), NOW)


def test_before_the_keys_are_there_nothing_is_taken() -> None:
    made = IssuerVerifier(ISSUER, "urn:gw")
    assert not made.has_keys
    with pytest.raises(NoKeysError):
        made.verify(token(), NOW)


def test_a_key_that_is_not_known_is_told_apart_and_taken_once_it_is() -> None:
    made = verifier()
    rotated = token(NEXT_KEY, "two")
    with pytest.raises(UnknownKeyError):
        made.verify(rotated, NOW)
    with pytest.raises(AuthenticationError) as wrong:
        made.verify(token(NEXT_KEY, "one"), NOW)
    assert not isinstance(wrong.value, UnknownKeyError)
    made.use_keys(jwks(two=NEXT_KEY))
    assert made.verify(rotated, NOW)[0].subject == "alice"
    with pytest.raises(UnknownKeyError):
        made.verify(token(), NOW)


def test_a_key_set_without_keys_leaves_the_known_ones() -> None:
    made = verifier()
    with pytest.raises(ConfigError):
        made.use_keys('{"keys": []}')
    assert made.verify(token(), NOW)


ROLES = (
    RoleMapping("operator", "groups", ("ops", "admins")),
    RoleMapping("netadmin", "realm_access.roles", ("net",)),
    RoleMapping("staff", "https://example.com/kind", ("staff",)),
)


@pytest.mark.parametrize(
    ("claims", "roles"),
    [
        ({"groups": ["x", "ops"]}, ("operator",)),
        ({"groups": "admins"}, ("operator",)),
        ({"groups": ["opsx"]}, ()),
        ({"groups": {"ops": True}}, ()),
        ({"groups": [["ops"]]}, ()),
        ({"groups": None, "realm_access": {"roles": ["net"]}}, ("netadmin",)),
        ({"realm_access": ["net"]}, ()),
        ({"https://example.com/kind": "staff", "groups": ["ops"]}, ("operator", "staff")),
        ({"roles": ["operator"], "role": "operator"}, ()),
    ],
)
def test_claims_give_the_roles_that_the_configuration_says(
    claims: dict[str, Any], roles: tuple[str, ...]
) -> None:
    identity, _ = verifier(*ROLES).verify(token(**claims), NOW)
    assert identity.roles == roles


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_no_shape_of_a_claim_breaks_the_roles(value: Any) -> None:
    found = verifier(*ROLES).verify(token(groups=value, realm_access=value), NOW)
    assert set(found[0].roles) <= {"operator", "netadmin"}


def test_tokens_go_to_the_issuer_that_they_name() -> None:
    both = Authenticator(jwt=JwtVerifier(secret=SECRET), oidc=verifier())
    found = both.authenticate(f"Bearer {token()}", NOW)
    assert found.identity.method == "oidc"
    own = jwt.encode({"sub": "bob", "exp": NOW + 60}, SECRET, "HS256")
    assert both.authenticate(f"Bearer {own}", NOW).identity.method == "jwt"
    forged = jwt.encode({"iss": ISSUER, "sub": "bob", "exp": NOW + 60}, SECRET, "HS256")
    with pytest.raises(AuthenticationError):
        both.authenticate(f"Bearer {forged}", NOW)


def test_an_issuer_alone_closes_the_gateway_to_others() -> None:
    only = Authenticator(oidc=verifier(), is_open=True)
    for authorization in (None, "Bearer x", "Bearer a.b.c"):
        with pytest.raises(AuthenticationError):
            only.authenticate(authorization, NOW)
