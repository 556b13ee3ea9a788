"""The file in which a login is kept: its format, and its encryption at rest (pure).

Inside is JSON with ``cache_version`` 1 (T-092). Around it, where it is sealed, is a JSON object
that names cipher, key and key derivation; these are authenticated together with the tokens.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from toppy.auth.oidc import TokenAnswer
from toppy.errors import ToppyError

CACHE_VERSION = 1
EXPIRY_SKEW_S = 60.0
"""A token that ends so soon is renewed before it is used (T-092)."""
SALT_BYTES = 16
NONCE_BYTES = 12
KEY_BYTES = 32
_CIPHER = "AES-256-GCM"
_INFO = b"toppy token cache 1"
_MAX_MEMORY_KIB = 1 << 20
_MAX_PASSES = 64
_MAX_LANES = 16
_MAX_PBKDF2_ITERATIONS = 10_000_000


class TokenCacheError(ToppyError):
    """The file is no token cache, or cannot be opened with this key."""


class Protection(Enum):
    """What the key of a sealed cache comes from."""

    DEVICE = "device"
    """A random key in a file of this machine's."""
    KEYRING = "keyring"
    """A random key in the desktop's keyring."""
    PASSPHRASE = "passphrase"  # noqa: S105  # a kind of key


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """One login. Times are Unix time in seconds, by this machine's clock."""

    issuer: str
    client_id: str
    audience: str | None
    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    token_type: str
    scope: str | None
    issued_at: float
    expires_at: float | None
    """None: the provider did not say."""
    subject: str | None = None
    """Who logged in, where the provider said it."""

    def is_for(self, issuer: str, client_id: str, audience: str | None) -> bool:
        """Whether this is a login of that kind (T-092)."""
        return (self.issuer, self.client_id, self.audience) == (issuer, client_id, audience)

    @property
    def _skew_s(self) -> float:
        """Half of the life of a token that lives shortly: it can be used at all."""
        if self.expires_at is None:
            return 0.0
        return min(EXPIRY_SKEW_S, max(self.expires_at - self.issued_at, 0.0) / 2)

    def is_fresh(self, now: float) -> bool:
        """Whether it can be used without renewing it first."""
        if now + EXPIRY_SKEW_S < self.issued_at:  # the clock was set back: nothing is known
            return False
        return self.expires_at is None or now < self.expires_at - self._skew_s

    def is_valid(self, now: float) -> bool:
        """Whether it can be used at all."""
        return self.expires_at is None or now < self.expires_at

    def renew_at(self) -> float | None:
        """When a program that goes on running renews it: at four fifths of its life, or a little
        before it is too old for a new program.
        """
        if self.expires_at is None:
            return None
        lifetime_s = max(self.expires_at - self.issued_at, 0.0)
        return min(self.issued_at + 0.8 * lifetime_s, self.expires_at - self._skew_s)

    def renewed(self, answer: TokenAnswer, now: float) -> CachedTokens:
        """The same login after a refresh; a provider may keep the refresh token as it is."""
        return replace(
            self,
            access_token=answer.access_token,
            refresh_token=answer.refresh_token or self.refresh_token,
            scope=answer.scope or self.scope,
            issued_at=now,
            expires_at=now + answer.lifetime_s if answer.lifetime_s is not None else None,
        )


class _Plain(msgspec.Struct):
    cache_version: int
    issuer: str
    client_id: str
    audience: str | None
    access_token: str
    refresh_token: str | None
    token_type: str
    scope: str | None
    issued_at: float
    expires_at: float | None
    subject: str | msgspec.UnsetType | None = msgspec.UNSET


class _Kdf(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Literal["hkdf-sha256", "argon2id", "pbkdf2-sha256"]
    salt: str
    memory_kib: int = 0
    iterations: int = 0
    lanes: int = 0


class _Encryption(msgspec.Struct, forbid_unknown_fields=True):
    cipher: str
    key: Literal["device", "keyring", "passphrase"]
    kdf: _Kdf
    nonce: str


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    cache_version: int
    encryption: _Encryption
    ciphertext: str


@dataclass(frozen=True, slots=True)
class SealedCache:
    """A cache that needs a key."""

    protection: Protection
    _written: _Sealed = field(repr=False)


class _Head(msgspec.Struct):
    cache_version: int
    encryption: Any = None


def encode_plain(tokens: CachedTokens) -> bytes:
    """The JSON of T-092, in the clear; times in whole seconds."""
    return msgspec.json.encode(
        _Plain(
            cache_version=CACHE_VERSION,
            issuer=tokens.issuer,
            client_id=tokens.client_id,
            audience=tokens.audience,
            access_token=tokens.access_token,
            refresh_token=tokens.refresh_token,
            token_type=tokens.token_type,
            scope=tokens.scope,
            issued_at=int(tokens.issued_at),
            expires_at=int(tokens.expires_at) if tokens.expires_at is not None else None,
            subject=tokens.subject if tokens.subject is not None else msgspec.UNSET,
        )
    )


def parse_cache(data: bytes) -> CachedTokens | SealedCache:
    """What a file has: tokens in the clear, or sealed ones. Raises ``TokenCacheError``."""
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.cache_version != CACHE_VERSION:
            raise TokenCacheError(
                f"the token cache is of version {head.cache_version}, which this program does not "
                "know: run toppy login again"
            )
        if head.encryption is None:
            return _parse_plain(data)
        written = msgspec.json.decode(data, type=_Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TokenCacheError("the token cache is damaged: run toppy login again") from None
    return SealedCache(Protection(written.encryption.key), written)


def _parse_plain(data: bytes) -> CachedTokens:
    found = msgspec.json.decode(data, type=_Plain)
    return CachedTokens(
        issuer=found.issuer,
        client_id=found.client_id,
        audience=found.audience,
        access_token=found.access_token,
        refresh_token=found.refresh_token,
        token_type=found.token_type,
        scope=found.scope,
        issued_at=found.issued_at,
        expires_at=found.expires_at,
        subject=found.subject if isinstance(found.subject, str) else None,
    )


def seal(
    tokens: CachedTokens, protection: Protection, secret: bytes, *, salt: bytes, nonce: bytes
) -> bytes:
    """The file's bytes, encrypted with AES-256-GCM.

    ``secret`` is 32 random bytes, or a passphrase; ``salt`` and ``nonce`` are 16 and 12 fresh
    random bytes.
    """
    kdf = _Kdf(name="hkdf-sha256", salt=_to_text(salt))
    if protection is Protection.PASSPHRASE:
        # RFC 9106 section 4, the second choice: for machines with little memory to spare
        kdf = _Kdf("argon2id", _to_text(salt), memory_kib=64 * 1024, iterations=3, lanes=4)
    encryption = _Encryption(_CIPHER, protection.value, kdf, _to_text(nonce))
    cipher = AESGCM(_derive(kdf, secret))
    sealed = cipher.encrypt(nonce, encode_plain(tokens), _authenticated(encryption))
    return msgspec.json.encode(_Sealed(CACHE_VERSION, encryption, _to_text(sealed)))


def unseal(sealed: SealedCache, secret: bytes) -> CachedTokens:
    """The tokens. Raises ``TokenCacheError``; the text says which key was tried."""
    encryption = sealed._written.encryption
    if encryption.cipher != _CIPHER:
        raise TokenCacheError("the token cache has an unknown cipher: run toppy login again")
    nonce = _to_bytes(encryption.nonce)
    if len(nonce) != NONCE_BYTES:
        raise TokenCacheError("the token cache is damaged: run toppy login again")
    try:
        plain = AESGCM(_derive(encryption.kdf, secret)).decrypt(
            nonce, _to_bytes(sealed._written.ciphertext), _authenticated(encryption)
        )
        return _parse_plain(plain)
    except InvalidTag:
        what = {
            Protection.DEVICE: "the key of this machine does not open the token cache",
            Protection.KEYRING: "the key in the keyring does not open the token cache",
            Protection.PASSPHRASE: "the passphrase does not open the token cache",
        }[sealed.protection]
        raise TokenCacheError(f"{what}; if that stays so, run toppy login again") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TokenCacheError("the token cache is damaged: run toppy login again") from None


def _derive(kdf: _Kdf, secret: bytes) -> bytes:
    salt = _to_bytes(kdf.salt)
    is_moderate = 8 <= len(salt) <= 64
    match kdf.name:
        case "hkdf-sha256":
            pass
        case "argon2id":
            is_moderate = (
                is_moderate
                and 1 <= kdf.lanes <= _MAX_LANES
                and 8 * kdf.lanes <= kdf.memory_kib <= _MAX_MEMORY_KIB
                and 1 <= kdf.iterations <= _MAX_PASSES
            )
        case "pbkdf2-sha256":
            is_moderate = is_moderate and 1 <= kdf.iterations <= _MAX_PBKDF2_ITERATIONS
    if not is_moderate:
        raise TokenCacheError("the token cache asks for an impossible key derivation")
    if kdf.name == "argon2id":
        return Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=kdf.iterations,
            lanes=kdf.lanes,
            memory_cost=kdf.memory_kib,
        ).derive(secret)
    if kdf.name == "pbkdf2-sha256":
        return PBKDF2HMAC(SHA256(), KEY_BYTES, salt, kdf.iterations).derive(secret)
    return HKDF(SHA256(), KEY_BYTES, salt, _INFO).derive(secret)


def _authenticated(encryption: _Encryption) -> bytes:
    """What is not secret, but must not be changed either."""
    return msgspec.json.encode(encryption)


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _to_bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise TokenCacheError("the token cache is damaged: run toppy login again") from None
