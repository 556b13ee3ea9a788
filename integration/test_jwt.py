"""JSON Web Tokens at a running gateway: what opens a tunnel, and what is 401."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from integration.conftest import Peer
from integration.masque_client import Answer, ask, connected_engine, ping, run
from integration.processes import Gateway, running_gateway, wait_until

SECRET = "a secret that only the issuer knows"
AUDIENCE = "toppy-test"
RULES = """
[[policy.rules]]
name = "alice may"
action = "allow"
cidr = ["127.0.0.1/32"]
subjects = ["alice"]
[[policy.rules]]
name = "ops may"
action = "allow"
cidr = ["127.0.0.1/32"]
claims = { team = "ops" }
"""


@dataclass(frozen=True)
class Keys:
    """One private key of each kind, and one that the gateway does not know."""

    rsa: RSAPrivateKey
    elliptic: ec.EllipticCurvePrivateKey
    edwards: ed25519.Ed25519PrivateKey
    stranger: RSAPrivateKey


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys(
        generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate(),
        generate_private_key(65537, 2048),
    )


def public_pem(keys: Keys) -> bytes:
    return keys.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Iterator[Gateway]:
    """Takes HS256 with a secret, RS256 by a PEM file, ES256 and EdDSA by a JWK set."""
    directory = tmp_path_factory.mktemp("gw")
    (directory / "jwt-secret").write_text(SECRET)
    (directory / "jwt-secret").chmod(0o600)
    (directory / "issuer.pem").write_bytes(public_pem(keys))
    elliptic = jwt.algorithms.ECAlgorithm.to_jwk(keys.elliptic.public_key(), as_dict=True)
    edwards = jwt.algorithms.OKPAlgorithm.to_jwk(keys.edwards.public_key(), as_dict=True)
    (directory / "jwks.json").write_text(
        json.dumps({"keys": [{**elliptic, "kid": "ec-1"}, {**edwards, "kid": "ed-1"}]})
    )
    with running_gateway(
        directory,
        rules=RULES,
        extra=f"""
[auth.jwt]
secret_file = "jwt-secret"
public_key_file = "issuer.pem"
jwks_file = "jwks.json"
issuer = "https://login.example.test"
audience = "{AUDIENCE}"
leeway_s = 5
""",
    ) as running:
        yield running


def claims(**changes: Any) -> dict[str, Any]:
    """A good token's claims, changed; None takes a claim out."""
    whole = {
        "sub": "alice",
        "iss": "https://login.example.test",
        "aud": AUDIENCE,
        "exp": time.time() + 300,
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


def answer_to(gateway: Gateway, token: str, echo: Peer) -> Answer:
    async def scenario() -> Answer:
        async with connected_engine(gateway) as client:
            return await ask(client, echo.host, echo.port, token=token).answer()

    return run(scenario())


@pytest.mark.parametrize("kind", ["HS256", "RS256", "ES256", "EdDSA"])
def test_a_good_token_opens_a_tunnel(gateway: Gateway, keys: Keys, echo: Peer, kind: str) -> None:
    key: Any = {
        "HS256": SECRET,
        "RS256": keys.rsa,
        "ES256": keys.elliptic,
        "EdDSA": keys.edwards,
    }[kind]
    kid = {"ES256": {"kid": "ec-1"}, "EdDSA": {"kid": "ed-1"}}.get(kind)
    token = jwt.encode(claims(), key, algorithm=kind, headers=kid)

    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            client.token = token
            tunnel = ask(client, echo.host, echo.port)
            assert (await tunnel.answer()).status == 200
            await tunnel.echo(b"who I am is known")
        assert await ping(gateway, b"ping " + token.encode()) == b"pong"

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": 1_000_000_000}, "expired"),
        ({"exp": None}, "no expiry"),
        ({"nbf": 9_000_000_000}, "not valid yet"),
        ({"iss": "https://evil.example.test"}, "another issuer"),
        ({"iss": None}, "another issuer"),
        ({"aud": "another-service"}, "another audience"),
        ({"aud": None}, "another audience"),
    ],
)
def test_a_token_with_wrong_claims_is_401_and_says_why(
    gateway: Gateway, echo: Peer, changes: dict[str, Any], reason: str
) -> None:
    answer = answer_to(gateway, jwt.encode(claims(**changes), SECRET, "HS256"), echo)
    assert answer.status == 401
    assert reason in answer.proxy_status.details


def forge(header: dict[str, Any], key: bytes = b"") -> str:
    """A token as PyJWT would not make it, signed with HMAC when there is a key."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = ".".join(encode(json.dumps(part).encode()) for part in (header, claims()))
    signature = hmac.digest(key, signed.encode(), "sha256") if key else b""
    return f"{signed}.{encode(signature)}"


def test_forged_tokens_are_401(gateway: Gateway, keys: Keys, echo: Peer) -> None:
    forged = {
        "wrong secret": jwt.encode(claims(), "another secret of sufficient length", "HS256"),
        "alg none": forge({"alg": "none", "typ": "JWT"}),
        "alg none, another case": forge({"alg": "nOnE", "typ": "JWT"}),
        "no alg": forge({"typ": "JWT"}),
        "public key as secret": forge({"alg": "HS256", "typ": "JWT"}, public_pem(keys)),
        "unknown key": jwt.encode(claims(), keys.stranger, "RS256"),
        "wrong key ID": jwt.encode(claims(), keys.edwards, "EdDSA", headers={"kid": "ec-1"}),
        "cut": jwt.encode(claims(), SECRET, "HS256")[:-4],
        "no JWT": "a.b.c",
        "dots": "." * 3000,
    }
    for name, token in forged.items():
        assert answer_to(gateway, token, echo).status == 401, name
    assert answer_to(gateway, forge({"alg": "HS256"}, SECRET.encode()), echo).status == 200


def test_rules_match_subjects_and_claims(gateway: Gateway, echo: Peer) -> None:
    def status(**changes: Any) -> int:
        return answer_to(gateway, jwt.encode(claims(**changes), SECRET, "HS256"), echo).status

    assert status(sub="alice") == 200
    assert status(sub="bob") == 403
    assert status(sub="bob", team="ops") == 200
    assert status(sub="bob", team="sales") == 403


def test_the_static_token_works_beside_jwt(gateway: Gateway, echo: Peer) -> None:
    answer = answer_to(gateway, gateway.token, echo)
    assert (answer.status, answer.proxy_status.rule) == (403, "default")  # it is not alice


def test_a_tunnel_ends_with_its_token(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        # good until two seconds from now, the leeway of five included
        token = jwt.encode(claims(exp=time.time() - 3), SECRET, "HS256")
        async with connected_engine(gateway) as client:
            tunnel = ask(client, echo.host, echo.port, token=token)
            assert (await tunnel.answer()).status == 200
            await tunnel.echo(b"for now")
            await tunnel.has_ended.wait()

    run(scenario(), deadline_s=20)
    wait_until("no tunnel", lambda: gateway.status()["tunnels"] == 0)


def test_no_token_is_in_the_log(gateway: Gateway, echo: Peer) -> None:
    token = jwt.encode(claims(iss="https://elsewhere.example.test"), SECRET, "HS256")
    assert answer_to(gateway, token, echo).status == 401
    log = gateway.running.output()
    for secret in (token, token.split(".")[2], SECRET, gateway.token):
        assert secret not in log
