"""Who gets in: static token, JWT by every kind of key, nobody by accident."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from toppy.auth.authenticator import Authenticator
from toppy.auth.bearer import MAX_TOKEN_BYTES, StaticToken, parse_authorization
from toppy.auth.jwt import AuthenticationError, JwtVerifier
from toppy.errors import ConfigError

NOW = 1_700_000_000.0
SECRET = "a secret of at least thirty-two bytes!"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def public_pem(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def make_token(key: Any = SECRET, algorithm: str = "HS256", kid: str = "", **claims: Any) -> str:
    payload = {"sub": "alice", "exp": NOW + 60, **claims}
    payload = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(payload, key, algorithm, headers={"kid": kid} if kid else None)


def forge(header: dict[str, Any], payload: dict[str, Any], secret: bytes | None) -> str:
    """A token as an attacker would write it, with a library that forbids nothing."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = f"{part(json.dumps(header).encode())}.{part(json.dumps(payload).encode())}"
    if secret is None:
        return signed + "."
    return f"{signed}.{part(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


class TestBearer:
    @pytest.mark.parametrize(
        ("value", "token"),
        [
            ("Bearer abc", "abc"),
            ("bearer   abc ", "abc"),
            ("BEARER abc", "abc"),
            ("abc", "abc"),
            (None, None),
            ("", None),
            ("Bearer ", None),
            ("Basic abc", None),
            ("x" * (MAX_TOKEN_BYTES + 1), None),
        ],
    )
    def test_the_token_is_found_or_there_is_none(
        self, value: str | None, token: str | None
    ) -> None:
        assert parse_authorization(value) == (token if token != "" else None)

    def test_a_static_token_matches_itself_only_and_shows_nothing(self) -> None:
        token = StaticToken("open sesame")
        assert token.matches("open sesame")
        assert not token.matches("open sesamE")
        assert not token.matches("ü\udcff")
        assert "sesame" not in repr(token)


class TestJwt:
    def test_a_good_token_names_its_subject_and_claims(self) -> None:
        identity, expires_at = JwtVerifier(secret=SECRET).verify(
            make_token(team="ops", level=3, tags=["a"]), NOW
        )
        assert identity.subject == "alice"
        assert identity.claims["team"] == "ops"
        assert "tags" not in identity.claims
        assert expires_at == NOW + 60 + 60

    @pytest.mark.parametrize(
        ("claims", "reason"),
        [
            ({"exp": NOW - 61}, "expired"),
            ({"exp": None}, "no expiry"),
            ({"exp": "soon"}, "exp is no time"),
            ({"exp": True}, "exp is no time"),
            ({"nbf": NOW + 61}, "not valid yet"),
            ({"iat": NOW + 61}, "not valid yet"),
            ({"iss": "other"}, "another issuer"),
            ({"iss": None}, "another issuer"),
            ({"aud": "other"}, "another audience"),
            ({"aud": None}, "another audience"),
            ({"aud": ["x", "y"]}, "another audience"),
            ({"sub": 5}, "no text"),
        ],
    )
    def test_a_claim_that_is_wrong_is_refused_with_its_reason(
        self, claims: dict[str, Any], reason: str
    ) -> None:
        verifier = JwtVerifier(secret=SECRET, issuer="idp", audience="toppy")
        good = {"iss": "idp", "aud": "toppy", "sub": "alice", "exp": NOW + 60}
        payload = {k: v for k, v in (good | claims).items() if v is not None}
        token = forge({"alg": "HS256"}, payload, SECRET.encode())
        with pytest.raises(AuthenticationError, match=reason):
            verifier.verify(token, NOW)

    @pytest.mark.parametrize("exp", [NOW - 59, NOW + 1])
    def test_a_clock_difference_within_the_leeway_is_forgiven(self, exp: float) -> None:
        JwtVerifier(secret=SECRET).verify(make_token(exp=exp, nbf=NOW + 59), NOW)

    def test_an_audience_may_stand_in_a_list(self) -> None:
        JwtVerifier(secret=SECRET, audience="toppy").verify(make_token(aud=["x", "toppy"]), NOW)

    @pytest.mark.parametrize(
        ("key", "algorithm"),
        [(RSA_KEY, "RS256"), (RSA_KEY, "PS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA")],
    )
    def test_a_public_key_verifies_its_own_kind(self, key: Key, algorithm: str) -> None:
        verifier = JwtVerifier(public_key_pem=public_pem(key))
        assert verifier.verify(make_token(key, algorithm), NOW)[0].subject == "alice"

    @pytest.mark.parametrize("key", [RSA_KEY, EC_KEY, ED_KEY])
    def test_a_public_key_is_never_taken_as_a_shared_secret(self, key: Key) -> None:
        pem = public_pem(key)
        token = forge({"alg": "HS256"}, {"sub": "eve", "exp": NOW + 60}, pem)
        with pytest.raises(AuthenticationError, match="not allowed"):
            JwtVerifier(public_key_pem=pem).verify(token, NOW)

    @pytest.mark.parametrize("algorithm", ["none", "None", "nOnE", "", "HS384", None, 5])
    def test_no_other_algorithm_is_taken(self, algorithm: Any) -> None:
        payload = {"sub": "eve", "exp": NOW + 60}
        for secret in (None, SECRET.encode()):
            with pytest.raises(AuthenticationError):
                JwtVerifier(secret=SECRET).verify(forge({"alg": algorithm}, payload, secret), NOW)

    def test_a_wrong_signature_is_refused(self) -> None:
        with pytest.raises(AuthenticationError, match="signature"):
            JwtVerifier(secret=SECRET).verify(make_token("another secret" * 4), NOW)

    def test_keys_of_a_set_are_chosen_by_their_id(self) -> None:
        keys = []
        for name, key in (("a", EC_KEY), ("b", ec.generate_private_key(ec.SECP256R1()))):
            jwk = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
            keys.append(jwk | {"kid": name, "use": "sig"})
        keys.append({"kty": "oct", "k": "c2VjcmV0", "kid": "c"})
        verifier = JwtVerifier(jwks=json.dumps({"keys": keys}))
        assert verifier.verify(make_token(EC_KEY, "ES256", kid="a"), NOW)
        with pytest.raises(AuthenticationError):
            verifier.verify(make_token(EC_KEY, "ES256", kid="b"), NOW)
        with pytest.raises(AuthenticationError, match="not known"):
            verifier.verify(make_token(EC_KEY, "ES256", kid="z"), NOW)

    @pytest.mark.parametrize(
        ("arguments", "key"),
        [
            ({"secret": "short"}, "auth.jwt.secret"),
            ({"secret": public_pem(EC_KEY).decode()}, "auth.jwt.secret"),
            ({"public_key_pem": b"nonsense"}, "auth.jwt.public_key_file"),
            ({"jwks": "nonsense"}, "auth.jwt.jwks_file"),
            ({"jwks": "[]"}, "auth.jwt.jwks_file"),
            ({"jwks": '{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}'}, "auth.jwt.jwks_file"),
            ({"secret": SECRET, "algorithms": ["RS256"]}, "auth.jwt.algorithms"),
        ],
    )
    def test_a_key_that_cannot_serve_is_a_configuration_error(
        self, arguments: dict[str, Any], key: str
    ) -> None:
        with pytest.raises(ConfigError) as refused:
            JwtVerifier(**arguments)
        assert refused.value.key == key

    @given(st.text(max_size=200))
    def test_any_text_is_a_token_or_refused(self, token: str) -> None:
        with pytest.raises(AuthenticationError):
            JwtVerifier(secret=SECRET).verify(token, NOW)

    @given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5)))
    def test_a_refusal_never_shows_the_token(self, payload: dict[str, Any]) -> None:
        token = forge({"alg": "HS256"}, payload, b"wrong")
        with pytest.raises(AuthenticationError) as refused:
            JwtVerifier(secret=SECRET).verify(token, NOW)
        assert token not in str(refused.value)


class TestAuthenticator:
    def test_every_configured_method_is_tried(self) -> None:
        authenticator = Authenticator(
            static_token=StaticToken("shared token"), jwt=JwtVerifier(secret=SECRET)
        )
        shared = authenticator.authenticate("Bearer shared token", NOW)
        assert shared.identity.method == "static"
        assert shared.expires_at is None
        named = authenticator.authenticate(f"Bearer {make_token()}", NOW)
        assert named.identity.subject == "alice"
        assert named.expires_at is not None

    @pytest.mark.parametrize("value", [None, "", "Basic abc", "Bearer wrong token"])
    def test_nobody_gets_in_without_a_good_token(self, value: str | None) -> None:
        with pytest.raises(AuthenticationError):
            Authenticator(static_token=StaticToken("shared token")).authenticate(value, NOW)

    def test_nothing_configured_lets_nobody_in(self) -> None:
        with pytest.raises(AuthenticationError):
            Authenticator().authenticate("Bearer x", NOW)

    def test_an_open_gateway_lets_everybody_in(self) -> None:
        assert Authenticator(is_open=True).authenticate(None, NOW).identity.method == "none"

    def test_open_means_nothing_once_a_method_is_configured(self) -> None:
        authenticator = Authenticator(static_token=StaticToken("shared token"), is_open=True)
        with pytest.raises(AuthenticationError):
            authenticator.authenticate(None, NOW)
