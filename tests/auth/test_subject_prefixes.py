"""Two issuers, one namespace of subjects: a prefix keeps one's alice from being the other's."""

from __future__ import annotations

import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from toppy.auth.authenticator import Authenticator, SubjectPrefixes
from toppy.auth.issuer import IssuerVerifier
from toppy.auth.jwt import AuthenticationError, JwtVerifier

NOW = 1_700_000_000.0
SECRET = "a secret of at least thirty-two bytes!"
ISSUER = "https://login.example"
KEY = ec.generate_private_key(ec.SECP256R1())
CLAIMS: dict[str, Any] = {"exp": NOW + 60, "aud": "gw"}


def authenticator(jwt_prefix: str = "", oidc_prefix: str = "") -> Authenticator:
    oidc = IssuerVerifier(ISSUER, "gw")
    oidc.use_keys(json.dumps({"keys": [ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True)]}))
    return Authenticator(
        jwt=JwtVerifier(secret=SECRET),
        oidc=oidc,
        prefixes=SubjectPrefixes(jwt_prefix, oidc_prefix),
    )


def by_jwt(subject: str | None) -> str:
    claims = {**CLAIMS, "sub": subject} if subject is not None else CLAIMS
    return jwt.encode(claims, SECRET, "HS256")


def by_oidc(subject: str) -> str:
    return jwt.encode({**CLAIMS, "sub": subject, "iss": ISSUER}, KEY, "ES256")


def subject(found: Authenticator, token: str) -> str:
    return found.authenticate(f"Bearer {token}", NOW).identity.subject


def test_each_issuers_subjects_have_its_prefix() -> None:
    found = authenticator("services:", "staff:")
    assert subject(found, by_jwt("alice")) == "services:alice"
    assert subject(found, by_oidc("alice")) == "staff:alice"


def test_one_may_be_without() -> None:
    found = authenticator("", "staff:")
    assert subject(found, by_jwt("alice")) == "alice"
    assert subject(found, by_oidc("alice")) == "staff:alice"


def test_the_other_issuer_cannot_write_the_prefix_itself() -> None:
    with pytest.raises(AuthenticationError, match="stands for another issuer"):
        subject(authenticator("", "staff:"), by_jwt("staff:alice"))
    with pytest.raises(AuthenticationError, match="stands for another issuer"):
        subject(authenticator("services:", ""), by_oidc("services:alice"))


def test_its_own_prefix_in_a_subject_is_only_text() -> None:
    assert subject(authenticator("", "staff:"), by_oidc("staff:alice")) == "staff:staff:alice"


def test_a_token_without_a_subject_stays_nobody_in_particular() -> None:
    assert subject(authenticator("services:", "staff:"), by_jwt(None)) == "jwt"


def test_no_prefix_makes_a_reserved_name() -> None:
    for name in ("token", "anonymous", "jwt"):
        with pytest.raises(AuthenticationError, match="policy reserves"):
            subject(authenticator("services:", "staff:"), by_jwt(name))


def test_a_prefix_of_a_table_that_is_not_configured_stands_for_nobody() -> None:
    found = Authenticator(jwt=JwtVerifier(secret=SECRET), prefixes=SubjectPrefixes("", "staff:"))
    assert subject(found, by_jwt("staff:alice")) == "staff:alice"
