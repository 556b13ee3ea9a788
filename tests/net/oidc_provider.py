"""A provider in memory: answers what httpx would send over a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from toppy.net.oidc_http import ProviderConnection

ISSUER = "https://login.example"
NOW = 1_700_000_000.0
KEY = rsa.generate_private_key(65537, 2048)
JWKS = json.dumps(
    {"keys": [{**jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "one"}]}
)


def sign(**claims: Any) -> str:
    return jwt.encode(claims, KEY, "RS256", headers={"kid": "one"})


@dataclass
class FakeProvider:
    """``tokens`` decides about each request to the token endpoint: a status and a body."""

    tokens: Callable[[dict[str, str]], tuple[int, dict[str, Any]]] = lambda form: (500, {})
    is_down: bool = False
    device: dict[str, Any] = field(
        default_factory=lambda: {
            "device_code": "the-device-code",
            "user_code": "ABCD-EFGH",
            "verification_uri": f"{ISSUER}/device",
            "verification_uri_complete": f"{ISSUER}/device?user_code=ABCD-EFGH",
            "expires_in": 60,
        }
    )
    lacks: tuple[str, ...] = ()
    jwks: str = JWKS
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def connect(self, issuer: str) -> ProviderConnection:
        return ProviderConnection(issuer, transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        form = {k: v[0] for k, v in parse_qs(request.content.decode()).items()}
        self.asked.append((request.url.path, form))
        if self.is_down:
            raise httpx.ConnectError("connection refused")
        match request.url.path:
            case "/.well-known/openid-configuration":
                found = {
                    "issuer": ISSUER,
                    "token_endpoint": f"{ISSUER}/token",
                    "jwks_uri": f"{ISSUER}/jwks",
                    "authorization_endpoint": f"{ISSUER}/auth",
                    "device_authorization_endpoint": f"{ISSUER}/device/auth",
                    "revocation_endpoint": f"{ISSUER}/revoke",
                }
                left = {name: url for name, url in found.items() if name not in self.lacks}
                return httpx.Response(200, json=left)
            case "/jwks":
                return httpx.Response(200, text=self.jwks)
            case "/device/auth":
                return httpx.Response(200, json=self.device)
            case "/revoke":
                return httpx.Response(200)
            case "/token":
                status, body = self.tokens(form)
                return httpx.Response(status, json=body)
        return httpx.Response(404)

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]
