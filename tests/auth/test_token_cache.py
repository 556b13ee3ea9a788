"""The token cache: its format, its encryption, and when tokens are renewed."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.auth.oidc import TokenAnswer
from toppy.auth.token_cache import (
    CachedTokens,
    Protection,
    SealedCache,
    TokenCacheError,
    encode_plain,
    parse_cache,
    seal,
    unseal,
)

NOW = 1_700_000_000.0
SECRET = b"k" * 32
TOKENS = CachedTokens(
    issuer="https://login.example",
    client_id="toppy",
    audience="urn:gw",
    access_token="the-access-token",
    refresh_token="the-refresh-token",
    token_type="Bearer",
    scope="openid",
    issued_at=NOW,
    expires_at=NOW + 600,
)
times = st.integers(0, 2**40).map(float)
tokens = st.builds(
    CachedTokens,
    issuer=st.text(),
    client_id=st.text(),
    audience=st.none() | st.text(),
    access_token=st.text(),
    refresh_token=st.none() | st.text(),
    token_type=st.just("Bearer"),
    scope=st.none() | st.text(),
    issued_at=times,
    expires_at=st.none() | times,
    subject=st.none() | st.text(),
)


def sealed(protection: Protection = Protection.DEVICE, secret: bytes = SECRET) -> bytes:
    return seal(TOKENS, protection, secret, salt=b"s" * 16, nonce=b"n" * 12)


def opened(data: bytes, secret: bytes = SECRET) -> CachedTokens:
    found = parse_cache(data)
    assert isinstance(found, SealedCache)
    return unseal(found, secret)


def test_the_plain_form_is_that_of_the_requirements() -> None:
    assert json.loads(encode_plain(TOKENS)) == {
        "cache_version": 1,
        "issuer": "https://login.example",
        "client_id": "toppy",
        "audience": "urn:gw",
        "access_token": "the-access-token",
        "refresh_token": "the-refresh-token",
        "token_type": "Bearer",
        "scope": "openid",
        "issued_at": 1_700_000_000,
        "expires_at": 1_700_000_600,
    }


@given(tokens)
def test_what_is_written_is_read(found: CachedTokens) -> None:
    assert parse_cache(encode_plain(found)) == found
    data = seal(found, Protection.KEYRING, SECRET, salt=b"s" * 16, nonce=b"n" * 12)
    assert opened(data) == found


def test_a_sealed_cache_shows_no_token_and_names_its_key() -> None:
    for protection in (Protection.DEVICE, Protection.KEYRING):
        data = sealed(protection)
        assert b"the-" not in data
        assert base64.b64encode(b"the-access-token")[:12] not in data
        found = parse_cache(data)
        assert isinstance(found, SealedCache)
        assert found.protection is protection
        assert unseal(found, SECRET) == TOKENS
    assert "the-access-token" not in repr(TOKENS)


def test_a_passphrase_opens_what_it_has_sealed() -> None:
    data = sealed(Protection.PASSPHRASE, b"correct horse")
    assert json.loads(data)["encryption"]["kdf"]["name"] == "argon2id"
    assert opened(data, b"correct horse") == TOKENS
    with pytest.raises(TokenCacheError, match="passphrase"):
        opened(data, b"wrong horse")


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(TokenCacheError, match="this machine"):
        opened(sealed(), b"x" * 32)
    with pytest.raises(TokenCacheError, match="keyring"):
        opened(sealed(Protection.KEYRING), b"x" * 32)


def test_a_cache_that_pbkdf2_protects_is_read() -> None:
    salt, nonce = b"s" * 16, b"n" * 12
    encryption = {
        "cipher": "AES-256-GCM",
        "key": "passphrase",
        "kdf": {
            "name": "pbkdf2-sha256",
            "salt": base64.b64encode(salt).decode(),
            "iterations": 100_000,
        },
        "nonce": base64.b64encode(nonce).decode(),
    }
    key = PBKDF2HMAC(SHA256(), 32, salt, 100_000).derive(b"correct horse")
    authenticated = json.dumps(encryption, separators=(",", ":")).encode()
    text = AESGCM(key).encrypt(nonce, encode_plain(TOKENS), authenticated)
    data = json.dumps(
        {
            "cache_version": 1,
            "encryption": encryption,
            "ciphertext": base64.b64encode(text).decode(),
        }
    )
    assert opened(data.encode(), b"correct horse") == TOKENS


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None)
def test_no_changed_byte_goes_unnoticed(position: int, change: int) -> None:
    data = bytearray(sealed())
    data[position % len(data)] ^= change
    try:
        found = parse_cache(bytes(data))
        result = unseal(found, SECRET) if isinstance(found, SealedCache) else None
    except TokenCacheError:
        return
    # unused bits of base64's last character carry nothing
    assert result == TOKENS


@given(st.binary(max_size=200))
def test_any_file_is_read_or_refused(data: bytes) -> None:
    with pytest.raises(TokenCacheError):
        parse_cache(data)


@pytest.mark.parametrize(
    "kdf",
    [
        {"name": "argon2id", "memory_kib": 1 << 30, "iterations": 3, "lanes": 4},
        {"name": "argon2id", "memory_kib": 65536, "iterations": 1 << 30, "lanes": 4},
        {"name": "argon2id", "memory_kib": 8, "iterations": 1, "lanes": 4},
        {"name": "argon2id", "memory_kib": 65536, "iterations": 1, "lanes": 0},
        {"name": "pbkdf2-sha256", "iterations": 1 << 40},
        {"name": "pbkdf2-sha256", "iterations": 0},
        {"name": "scrypt"},
        {"name": "argon2id", "memory_kib": 65536, "iterations": 3, "lanes": 4, "salt": ""},
        {"name": "hkdf-sha256", "salt": "!"},
    ],
)
def test_a_file_cannot_make_us_work_for_ever(kdf: dict[str, Any]) -> None:
    written = json.loads(sealed())
    written["encryption"]["kdf"] = {"salt": base64.b64encode(b"s" * 16).decode(), **kdf}
    with pytest.raises(TokenCacheError):
        opened(json.dumps(written).encode())


def test_another_version_or_cipher_is_refused() -> None:
    with pytest.raises(TokenCacheError, match="version 2"):
        parse_cache(b'{"cache_version": 2}')
    written = json.loads(sealed())
    written["encryption"]["cipher"] = "none"
    with pytest.raises(TokenCacheError, match="cipher"):
        opened(json.dumps(written).encode())


def test_a_cache_of_another_login_is_not_this_one() -> None:
    assert TOKENS.is_for("https://login.example", "toppy", "urn:gw")
    assert not TOKENS.is_for("https://other.example", "toppy", "urn:gw")
    assert not TOKENS.is_for("https://login.example", "other", "urn:gw")
    assert not TOKENS.is_for("https://login.example", "toppy", None)


def test_a_token_is_fresh_until_a_minute_before_its_end() -> None:
    assert TOKENS.is_fresh(NOW + 539)
    assert not TOKENS.is_fresh(NOW + 540)
    assert TOKENS.is_valid(NOW + 599)
    assert not TOKENS.is_valid(NOW + 600)
    assert TOKENS.renew_at() == NOW + 480


def test_a_token_that_lives_shortly_can_be_used_for_half_of_its_life() -> None:
    short = TOKENS.renewed(TokenAnswer("x", "Bearer", 60.0), NOW)
    assert short.is_fresh(NOW + 29)
    assert not short.is_fresh(NOW + 30)
    assert short.renew_at() == NOW + 30


def test_a_token_without_an_end_is_fresh_for_good() -> None:
    endless = TOKENS.renewed(TokenAnswer("x", "Bearer", None), NOW)
    assert endless.is_fresh(NOW + 1e9)
    assert endless.is_valid(NOW + 1e9)
    assert endless.renew_at() is None


def test_a_clock_that_was_set_back_makes_a_token_suspect() -> None:
    assert TOKENS.is_fresh(NOW - 59)
    assert not TOKENS.is_fresh(NOW - 61)


def test_a_renewal_keeps_what_the_provider_does_not_say_again() -> None:
    same = TOKENS.renewed(TokenAnswer("new", "Bearer", 300.0), NOW + 500)
    assert (same.access_token, same.refresh_token) == ("new", "the-refresh-token")
    assert (same.issued_at, same.expires_at, same.scope) == (NOW + 500, NOW + 800, "openid")
    rotated = TOKENS.renewed(TokenAnswer("new", "Bearer", 300.0, "next", None, "x"), NOW)
    assert (rotated.refresh_token, rotated.scope) == ("next", "x")
