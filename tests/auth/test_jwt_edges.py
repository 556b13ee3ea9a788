"""Tokens and keys at the edges: what libraries trip over, and what attackers would try."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from tests.auth.test_authenticator import (
    EC_KEY,
    ED_KEY,
    NOW,
    RSA_KEY,
    SECRET,
    Key,
    forge,
    make_token,
    public_pem,
)
from toppy.auth.bearer import MAX_TOKEN_BYTES, StaticToken, parse_authorization
from toppy.auth.jwt import AuthenticationError, JwtVerifier
from toppy.errors import ConfigError
from toppy.model.identity import Identity

P384_KEY = ec.generate_private_key(ec.SECP384R1())
GOOD = {"sub": "alice", "exp": NOW + 60}


def verify_forged(payload: dict[str, Any], **header: Any) -> Identity:
    token = forge({"alg": "HS256", **header}, payload, SECRET.encode())
    return JwtVerifier(secret=SECRET).verify(token, NOW)[0]


def jwk_of(key: Key, **members: Any) -> dict[str, Any]:
    algorithm = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
    }
    kind = next(
        (a for k, a in algorithm.items() if isinstance(key, k)), jwt.algorithms.OKPAlgorithm
    )
    jwk: dict[str, Any] = json.loads(kind.to_jwk(key.public_key()))  # type: ignore[attr-defined]
    jwk.pop("key_ops", None)
    return jwk | members


def jwks_verifier(*keys: Any) -> JwtVerifier:
    return JwtVerifier(jwks=json.dumps({"keys": keys}))


class TestKeys:
    @pytest.mark.parametrize("length", [16, 31, 32, 64, 65, 200])
    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    def test_a_secret_of_any_length_verifies_what_others_sign(
        self, length: int, algorithm: str
    ) -> None:
        secret = "s" * length
        with warnings.catch_warnings(action="ignore"):
            token = make_token(secret, algorithm)
        verifier = JwtVerifier(secret=secret, algorithms=[algorithm])
        assert verifier.verify(token, NOW)[0].subject == "alice"

    def test_a_short_secret_brings_no_warning_into_the_log(self) -> None:
        secret = "s" * 16
        JwtVerifier(secret=secret).verify(
            forge({"alg": "HS256"}, GOOD, secret.encode()), NOW
        )  # a warning would be an error here

    @pytest.mark.parametrize(
        "secret",
        [
            "s" * 15,
            pytest.param(public_pem(RSA_KEY).decode(), id="public key"),
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPlaceholder",
        ],
    )
    def test_a_public_key_or_a_short_text_is_no_secret(self, secret: str) -> None:
        with pytest.raises(ConfigError) as refused:
            JwtVerifier(secret=secret)
        assert refused.value.key == "auth.jwt.secret"
        assert secret not in str(refused.value)

    def test_a_secret_of_other_bytes_than_text_serves(self) -> None:
        secret = b"\xff" * 32
        token = forge({"alg": "HS256"}, GOOD, secret)
        JwtVerifier(secret=secret.decode("utf-8", "surrogateescape")).verify(token, NOW)

    @pytest.mark.parametrize(
        "key", [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256K1())]
    )
    def test_a_weak_or_unusual_public_key_is_a_configuration_error(self, key: Key) -> None:
        with pytest.raises(ConfigError, match="2048 bits"):
            JwtVerifier(public_key_pem=public_pem(key))

    @pytest.mark.parametrize("algorithm", ["ES256", "ES512"])
    def test_an_algorithm_of_another_curve_is_refused(self, algorithm: str) -> None:
        verifier = JwtVerifier(public_key_pem=public_pem(P384_KEY))
        assert verifier.verify(make_token(P384_KEY, "ES384"), NOW)
        with pytest.raises(AuthenticationError, match="not allowed"):
            verifier.verify(forge({"alg": algorithm}, GOOD, b"x"), NOW)

    def test_a_list_of_algorithms_narrows_what_a_key_serves(self) -> None:
        verifier = JwtVerifier(public_key_pem=public_pem(RSA_KEY), algorithms=["PS256"])
        assert verifier.verify(make_token(RSA_KEY, "PS256"), NOW)
        with pytest.raises(AuthenticationError, match="not allowed"):
            verifier.verify(make_token(RSA_KEY, "RS256"), NOW)

    def test_secret_and_public_key_serve_side_by_side_and_are_never_mixed_up(self) -> None:
        pem = public_pem(RSA_KEY)
        verifier = JwtVerifier(secret=SECRET, public_key_pem=pem)
        assert verifier.verify(make_token(), NOW)
        assert verifier.verify(make_token(RSA_KEY, "RS256"), NOW)
        with pytest.raises(AuthenticationError, match="signature"):
            verifier.verify(forge({"alg": "HS256"}, GOOD, pem), NOW)
        with pytest.raises(AuthenticationError, match="signature"):
            verifier.verify(forge({"alg": "RS256"}, GOOD, SECRET.encode()), NOW)

    def test_no_key_shows_in_a_repr(self) -> None:
        verifier = JwtVerifier(secret=SECRET, public_key_pem=public_pem(EC_KEY))
        assert SECRET not in repr(verifier)
        assert SECRET not in repr(vars(verifier))


class TestKeySets:
    @pytest.mark.parametrize(
        ("key", "algorithm"),
        [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (P384_KEY, "ES384"), (ED_KEY, "EdDSA")],
    )
    def test_each_kind_of_key_serves(self, key: Key, algorithm: str) -> None:
        assert jwks_verifier(jwk_of(key)).verify(make_token(key, algorithm), NOW)

    def test_a_token_without_an_id_is_tried_with_every_key(self) -> None:
        verifier = jwks_verifier(jwk_of(ED_KEY, kid="a"), jwk_of(EC_KEY, kid="b"))
        assert verifier.verify(make_token(EC_KEY, "ES256"), NOW)

    def test_the_algorithm_of_a_key_narrows_what_it_serves(self) -> None:
        verifier = jwks_verifier(jwk_of(RSA_KEY, alg="PS256"))
        assert verifier.verify(make_token(RSA_KEY, "PS256"), NOW)
        with pytest.raises(AuthenticationError, match="not allowed"):
            verifier.verify(make_token(RSA_KEY, "RS256"), NOW)

    @pytest.mark.parametrize(
        "other",
        [
            {"kty": "oct", "k": "c2VjcmV0"},
            {"kty": "new", "x": 1},
            {"kty": 5},
            {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
            {"kty": "RSA", "n": "AA", "e": "AA"},
            jwk_of(RSA_KEY, use="enc"),
            jwk_of(RSA_KEY, alg="RSA-OAEP"),
            jwk_of(RSA_KEY, kid=7),
            json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY)),
            {},
            [],
            None,
            "text",
        ],
    )
    def test_what_is_no_public_signing_key_is_passed_over(self, other: Any) -> None:
        assert jwks_verifier(other, jwk_of(EC_KEY)).verify(make_token(EC_KEY, "ES256"), NOW)
        with pytest.raises(ConfigError, match="no public key for signatures"):
            jwks_verifier(other)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"keys": 5}', "5", '"keys"', "[" * 100_000]
    )
    def test_what_is_no_key_set_is_a_configuration_error(self, text: str) -> None:
        with pytest.raises(ConfigError) as refused:
            JwtVerifier(jwks=text)
        assert refused.value.key == "auth.jwt.jwks_file"


class TestClaims:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("exp", 10**400),
            ("exp", float("inf")),
            ("exp", float("nan")),
            ("exp", [1]),
            ("nbf", -(10**400)),
            ("iat", "now"),
        ],
    )
    def test_a_time_that_is_none_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(AuthenticationError, match=f"{name} is no time"):
            verify_forged(GOOD | {name: value})

    @pytest.mark.parametrize("subject", ["token", "anonymous", "jwt"])
    def test_no_token_can_take_a_name_that_rules_use_for_others(self, subject: str) -> None:
        with pytest.raises(AuthenticationError, match="reserves"):
            verify_forged(GOOD | {"sub": subject})

    @pytest.mark.parametrize("subject", ["x" * 257, "a\nb", "a\x1b[2J", "a\x00"])
    def test_a_subject_that_could_spoil_a_log_is_refused(self, subject: str) -> None:
        with pytest.raises(AuthenticationError, match="too long or not printable"):
            verify_forged(GOOD | {"sub": subject})

    @pytest.mark.parametrize("payload", [{"exp": NOW + 60}, GOOD | {"sub": ""}])
    def test_a_token_without_a_subject_is_called_jwt(self, payload: dict[str, Any]) -> None:
        assert verify_forged(payload).subject == "jwt"

    def test_only_scalar_claims_are_kept(self) -> None:
        extra = {"a": 1, "b": 1.5, "c": True, "d": "x", "e": None, "f": [1], "g": {}, "h": 10**400}
        claims = verify_forged(GOOD | extra).claims
        assert {k: v for k, v in claims.items() if k in extra} == {
            "a": 1,
            "b": 1.5,
            "c": True,
            "d": "x",
        }

    @pytest.mark.parametrize("header", [{"crit": ["b64"], "b64": True}, {"crit": ["exp"]}])
    def test_an_extension_that_is_critical_is_refused(self, header: dict[str, Any]) -> None:
        with pytest.raises(AuthenticationError):
            verify_forged(GOOD, **header)

    def test_an_algorithm_cannot_spoil_the_log(self) -> None:
        with pytest.raises(AuthenticationError) as refused:
            verify_forged(GOOD, alg="\x1b[2J\r\nx: y")
        assert str(refused.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
claim_names = st.sampled_from(["sub", "exp", "nbf", "iat", "iss", "aud", "jti", "x"])
header_names = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "zip"])


class TestAnything:
    @given(st.dictionaries(claim_names, json_values, max_size=6))
    def test_any_signed_claims_are_taken_or_refused(self, payload: dict[str, Any]) -> None:
        verifier = JwtVerifier(secret=SECRET, issuer="idp", audience="toppy")
        token = forge({"alg": "HS256"}, GOOD | {"iss": "idp"} | payload, SECRET.encode())
        try:
            identity, expires_at = verifier.verify(token, NOW)
        except AuthenticationError:
            return
        assert identity.subject
        assert expires_at > NOW

    @given(st.dictionaries(header_names, json_values, max_size=4))
    def test_any_header_is_taken_or_refused(self, header: dict[str, Any]) -> None:
        verifier = JwtVerifier(
            secret=SECRET,
            public_key_pem=public_pem(P384_KEY),
            jwks=json.dumps({"keys": [jwk_of(RSA_KEY, kid="a"), jwk_of(ED_KEY)]}),
        )
        token = forge({"alg": "HS256"} | header, GOOD, SECRET.encode())
        with contextlib.suppress(AuthenticationError):
            assert verifier.verify(token, NOW)[0].subject == "alice"

    @given(
        st.sampled_from(["HS256", "RS256", "PS512", "ES256", "ES384", "ES512", "EdDSA", "ES256K"]),
        st.binary(max_size=100),
    )
    def test_no_algorithm_and_signature_but_the_right_ones_are_taken(
        self, algorithm: str, secret: bytes
    ) -> None:
        token = forge({"alg": algorithm}, GOOD, secret)
        for key in (RSA_KEY, EC_KEY, P384_KEY, ED_KEY):
            with pytest.raises(AuthenticationError):
                JwtVerifier(public_key_pem=public_pem(key)).verify(token, NOW)

    @pytest.mark.parametrize("payload", [[], 5, "text", None])
    def test_a_payload_that_is_no_object_is_refused(self, payload: Any) -> None:
        token = forge({"alg": "HS256"}, payload, SECRET.encode())
        with pytest.raises(AuthenticationError, match="cannot be read"):
            JwtVerifier(secret=SECRET).verify(token, NOW)

    @pytest.mark.parametrize("token", ["\ud800.b.c", "." * 8000, "a.b", "[" * 4000 + "..", "é.é.é"])
    def test_a_strange_text_is_no_token(self, token: str) -> None:
        with pytest.raises(AuthenticationError, match="no JWT"):
            JwtVerifier(secret=SECRET).verify(token, NOW)


class TestBearer:
    @pytest.mark.parametrize("value", ["Bearer", "bearer", " Bearer ", "Basic", "Digest a=b, c=d"])
    def test_a_scheme_is_no_token(self, value: str) -> None:
        found = parse_authorization(value)
        assert found is None or found == value == "Basic"

    @given(st.text(max_size=50))
    def test_any_field_is_a_token_or_none(self, value: str) -> None:
        found = parse_authorization(value)
        assert found is None or (found and found in value)

    @given(st.from_regex(r"[!-~]{1,40}", fullmatch=True))
    def test_what_a_client_sends_is_what_is_read(self, token: str) -> None:
        assert parse_authorization(f"Bearer {token}") == token
        assert StaticToken(token).matches(token)
        assert not StaticToken(token).matches(token + "x")

    @pytest.mark.parametrize("token", ["", " ", " a", "a ", "a\nb", "ü", "x" * MAX_TOKEN_BYTES])
    def test_a_token_that_cannot_be_sent_is_a_configuration_error(self, token: str) -> None:
        with pytest.raises(ConfigError) as refused:
            StaticToken(token)
        assert refused.value.key == "auth.token"
        assert str(refused.value).startswith("auth.token must be printable ASCII")
