"""JSON Web Tokens (RFC 7519): which keys, which algorithms, which claims.

PyJWT checks the signature; the clock is the caller's, so the time claims are checked here. The
algorithms that are taken follow from the kind of key: a public key is never an HMAC secret, and
``none`` is never taken (RFC 8725 section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from toppy.errors import ConfigError, DeniedError
from toppy.model.identity import ClaimValue, Identity

if TYPE_CHECKING:
    from jwt.types import Options

_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_BY_CURVE = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}  # RFC 7518 3.4
_MIN_SECRET_BYTES = 16
_MIN_RSA_BITS = 2048
"""RFC 7518 section 3.3."""
_HMAC_BLOCK_BYTES = 64
_MAX_SUBJECT_CHARACTERS = 256
_MOST_GROUPS = 512
"""Of one token; some providers list every group of a large directory."""
NO_SUBJECT = "jwt"
"""The subject of a token without one."""
_RESERVED_SUBJECTS = frozenset({"token", "anonymous", NO_SUBJECT})
"""What rules call the static token, nobody in particular, and a token without a subject."""
_SIGNATURE_ONLY: Options = {
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


class AuthenticationError(DeniedError):
    """The credential is not good; the text is fit for a log and for the client."""


class UnknownKeyError(AuthenticationError):
    """The token names a signing key that is not known here; newer keys may know it."""


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
            keys.append(_Key(_hmac_key(secret), _HMAC if algorithms else ("HS256",)))
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
        claims, expires_at = self.verify_claims(token, now)
        return identity_of(claims), expires_at

    def verify_claims(self, token: str, now: float) -> tuple[Mapping[str, Any], float]:
        """As ``verify``, with all claims of the token."""
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
        return claims, expires_at

    def _verify_signature(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise AuthenticationError("the token is no JWT") from None
        if "crit" in header:  # RFC 7515 section 4.1.11; there is none that we know
            raise AuthenticationError("the token asks for an extension that is not known (crit)")
        algorithm, key_id = header.get("alg"), header.get("kid")
        if key_id is not None and all(key.key_id not in (None, key_id) for key in self._keys):
            raise UnknownKeyError("the token was signed with a key that is not known here")
        reason = f"the token's algorithm ({str(algorithm)[:20]!a}) is not allowed"
        for key in self._keys:
            if algorithm not in key.algorithms:
                continue
            if key.key_id is not None and key_id is not None and key.key_id != key_id:
                reason = "the token was signed with a key that is not known here"
                continue
            try:
                claims: Mapping[str, Any] = jwt.decode(
                    token, key.key, algorithms=list(key.algorithms), options=_SIGNATURE_ONLY
                )
            except jwt.InvalidSignatureError:
                reason = "the token's signature is wrong"
            except (jwt.PyJWTError, ValueError, RecursionError):
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


def identity_of(claims: Mapping[str, Any]) -> Identity:
    """Who verified claims name. Raises ``AuthenticationError`` for a subject that cannot be one."""
    return Identity(_subject(claims), "jwt", _scalars(claims), groups=_groups(claims))


def _time_claim(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_moderate(value):
        raise AuthenticationError(f"the token's {name} is no time")
    return float(value)


def _is_moderate(value: float) -> bool:
    """Not infinite, not a NaN, and no integer too large for arithmetic with floats."""
    return -(2**63) <= value < 2**63


def _subject(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub")
    if subject is None or subject == "":
        return NO_SUBJECT
    if not isinstance(subject, str):
        raise AuthenticationError("the token's subject (sub) is no text")
    if len(subject) > _MAX_SUBJECT_CHARACTERS or not subject.isprintable():
        raise AuthenticationError("the token's subject (sub) is too long or not printable")
    if subject in _RESERVED_SUBJECTS:
        raise AuthenticationError("the token's subject (sub) is a name that policy reserves")
    return subject


def _scalars(claims: Mapping[str, Any]) -> dict[str, ClaimValue]:
    return {
        name: value
        for name, value in claims.items()
        if isinstance(value, str | bool) or (isinstance(value, int | float) and _is_moderate(value))
    }


def _groups(claims: Mapping[str, Any]) -> tuple[str, ...]:
    """The claim ``groups`` (RFC 9068 section 2.2.3.1), a list or one text."""
    found = claims.get("groups")
    groups = found if isinstance(found, list) else [found]
    return tuple(group for group in groups if isinstance(group, str))[:_MOST_GROUPS]


def _hmac_key(secret: str) -> bytes:
    key = secret.encode("utf-8", "surrogateescape")
    if len(key) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"auth.jwt.secret is too short: at least {_MIN_SECRET_BYTES} bytes",
            key="auth.jwt.secret",
        )
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(key)
    except jwt.PyJWTError:
        raise ConfigError(
            "auth.jwt.secret is a public key or a certificate: use auth.jwt.public_key_file or "
            "auth.jwt.jwks_file for public keys",
            key="auth.jwt.secret",
        ) from None
    # HMAC itself fills a key up with zeros to the block size (RFC 2104 section 2); done here,
    # PyJWT does not warn about short ones on the gateway's standard error
    return key.ljust(_HMAC_BLOCK_BYTES, b"\0")


def _load_public_key(pem: bytes) -> _Key:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            "auth.jwt.public_key_file is no PEM public key", key="auth.jwt.public_key_file"
        ) from None
    served = _algorithms_for(key)
    if not served:
        raise ConfigError(
            "auth.jwt.public_key_file: use an RSA key of at least 2048 bits, an EC key on P-256, "
            "P-384 or P-521, or an Ed25519 key",
            key="auth.jwt.public_key_file",
        )
    return _Key(key, served)


def _algorithms_for(key: object) -> tuple[str, ...]:
    """The algorithms that a public key serves; none for another kind of key, or a weak one."""
    match key:
        case RSAPublicKey():
            return _RSA if key.key_size >= _MIN_RSA_BITS else ()
        case EllipticCurvePublicKey():
            algorithm = _BY_CURVE.get(key.curve.name)
            return (algorithm,) if algorithm is not None else ()
        case Ed25519PublicKey() | Ed448PublicKey():
            return ("EdDSA",)
        case _:
            return ()


def _load_jwks(text: str) -> list[_Key]:
    """Public signing keys of a JWK set (RFC 7517); other ones and unknown kinds are passed over.

    ``alg`` of a key narrows what it serves.
    """
    try:
        written = json.loads(text)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        written = None
    if not isinstance(written, list):
        raise ConfigError("auth.jwt.jwks_file is no JWK set", key="auth.jwt.jwks_file")
    keys = [key for key in map(_load_jwk, written) if key is not None]
    if not keys:
        raise ConfigError(
            "auth.jwt.jwks_file has no public key for signatures", key="auth.jwt.jwks_file"
        )
    return keys


def _load_jwk(written: object) -> _Key | None:
    if not isinstance(written, dict) or written.get("use", "sig") != "sig":
        return None
    try:
        jwk = jwt.PyJWK.from_dict(written)
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        return None
    declared, key_id = written.get("alg"), written.get("kid")
    served = tuple(a for a in _algorithms_for(jwk.key) if declared in (None, a))
    if not served or not isinstance(key_id, str | None):
        return None
    return _Key(jwk.key, served, key_id)
