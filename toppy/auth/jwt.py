"""JSON Web Tokens (RFC 7519): which keys, which algorithms, which claims.

PyJWT checks the signature; the clock is the caller's, so the time claims are checked here. The
algorithms that are taken follow from the kind of key: a public key is never an HMAC secret, and
``none`` is never taken (RFC 8725 section 3.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from toppy.errors import ConfigError, DeniedError
from toppy.model.identity import ClaimValue, Identity

_HMAC = ("HS256", "HS384", "HS512")
_BY_KEY: tuple[tuple[type, tuple[str, ...]], ...] = (
    (RSAPublicKey, ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    (EllipticCurvePublicKey, ("ES256", "ES384", "ES512")),
    (Ed25519PublicKey, ("EdDSA",)),
    (Ed448PublicKey, ("EdDSA",)),
)
_MIN_SECRET_BYTES = 16


class AuthenticationError(DeniedError):
    """The credential is not good; the text is fit for a log and for the client."""


@dataclass(frozen=True, slots=True)
class _Key:
    key: Any = field(repr=False)
    algorithms: tuple[str, ...]
    key_id: str | None = None


class JwtVerifier:
    """Verifies tokens against a fixed set of keys."""

    def __init__(
        self,
        *,
        secret: str | None = None,
        public_key_pem: bytes | None = None,
        jwks: str | None = None,
        algorithms: Sequence[str] = (),
        issuer: str | None = None,
        audience: str | None = None,
        leeway_s: float = 60.0,
    ) -> None:
        """Give at least one of ``secret`` (HMAC), ``public_key_pem`` and ``jwks`` (JSON text).

        ``algorithms`` narrows what the keys allow. Raises ``ConfigError``.
        """
        keys: list[_Key] = []
        if secret is not None:
            if len(secret.encode()) < _MIN_SECRET_BYTES:
                raise ConfigError(
                    f"auth.jwt.secret is too short: at least {_MIN_SECRET_BYTES} bytes",
                    key="auth.jwt.secret",
                )
            if "-----BEGIN" in secret:
                raise ConfigError(
                    "auth.jwt.secret is a PEM key: use auth.jwt.public_key_file for public keys",
                    key="auth.jwt.secret",
                )
            keys.append(_Key(secret, ("HS256",) if not algorithms else _HMAC))
        if public_key_pem is not None:
            keys.append(_load_public_key(public_key_pem))
        if jwks is not None:
            keys += _load_jwks(jwks)
        allowed = frozenset(algorithms)
        self._keys = [
            _Key(k.key, tuple(a for a in k.algorithms if not allowed or a in allowed), k.key_id)
            for k in keys
        ]
        if not any(k.algorithms for k in self._keys):
            raise ConfigError(
                "auth.jwt: no key serves the algorithms that are allowed",
                key="auth.jwt.algorithms",
            )
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s

    def __repr__(self) -> str:
        return f"JwtVerifier({len(self._keys)} keys)"

    def verify(self, token: str, now: float) -> tuple[Identity, float]:
        """Who the token names, and the Unix time until which it is good (leeway included).

        ``now`` is Unix time in seconds. Raises ``AuthenticationError``.
        """
        claims = self._verify_signature(token)
        expires_at = _time_claim(claims, "exp")
        if expires_at is None:
            raise AuthenticationError("the token has no expiry (exp)")
        expires_at += self._leeway_s
        if now >= expires_at:
            raise AuthenticationError("the token has expired")
        for name in ("nbf", "iat"):
            begins = _time_claim(claims, name)
            if begins is not None and now + self._leeway_s < begins:
                raise AuthenticationError(f"the token is not valid yet ({name})")
        if self._issuer is not None and claims.get("iss") != self._issuer:
            raise AuthenticationError("the token is of another issuer (iss)")
        self._check_audience(claims)
        subject = claims.get("sub", "")
        if not isinstance(subject, str):
            raise AuthenticationError("the token's subject (sub) is no text")
        scalars: dict[str, ClaimValue] = {
            name: value
            for name, value in claims.items()
            if isinstance(value, str | int | float | bool)
        }
        return Identity(subject or "jwt", "jwt", scalars), expires_at

    def _verify_signature(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise AuthenticationError("the token is no JWT") from None
        algorithm, key_id = header.get("alg"), header.get("kid")
        reason = f"the token's algorithm ({str(algorithm)[:20]}) is not allowed"
        for key in self._keys:
            if algorithm not in key.algorithms:
                continue
            if key.key_id is not None and key_id is not None and key.key_id != key_id:
                reason = "the token was signed with a key that is not known here"
                continue
            try:
                claims: Mapping[str, Any] = jwt.decode(
                    token,
                    key.key,
                    algorithms=list(key.algorithms),
                    options={
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                        "verify_aud": False,
                        "verify_iss": False,
                        "verify_sub": False,
                        "verify_jti": False,
                    },
                )
            except jwt.InvalidSignatureError:
                reason = "the token's signature is wrong"
            except (jwt.InvalidTokenError, ValueError, RecursionError):
                reason = "the token cannot be read"
            else:
                return claims
        raise AuthenticationError(reason)

    def _check_audience(self, claims: Mapping[str, Any]) -> None:
        if self._audience is None:
            return
        audience = claims.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        if self._audience not in named:
            raise AuthenticationError("the token is for another audience (aud)")


def _time_claim(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AuthenticationError(f"the token's {name} is no time")
    return float(value)


def _load_public_key(pem: bytes) -> _Key:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            "auth.jwt.public_key_file is no PEM public key", key="auth.jwt.public_key_file"
        ) from None
    for kind, algorithms in _BY_KEY:
        if isinstance(key, kind):
            return _Key(key, algorithms)
    raise ConfigError(
        "auth.jwt.public_key_file: use an RSA, EC or Ed25519 key", key="auth.jwt.public_key_file"
    )


def _load_jwks(text: str) -> list[_Key]:
    """Public keys of a JWK set (RFC 7517); symmetric ones and unknown kinds are passed over."""
    try:
        found = jwt.PyJWKSet.from_dict(json.loads(text)).keys
    except (ValueError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise ConfigError(
            f"auth.jwt.jwks_file is no JWK set: {error}", key="auth.jwt.jwks_file"
        ) from None
    keys = []
    for jwk in found:
        for kind, algorithms in _BY_KEY:
            if isinstance(jwk.key, kind):
                keys.append(_Key(jwk.key, algorithms, jwk.key_id))
    if not keys:
        raise ConfigError("auth.jwt.jwks_file has no public key", key="auth.jwt.jwks_file")
    return keys
