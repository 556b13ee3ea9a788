"""The login's file: who may read it, what opens it, who writes it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from toppy.auth.token_cache import CachedTokens, Protection, TokenCacheError, encode_plain
from toppy.client import token_store
from toppy.client.token_store import Keyring, TokenStore

TOKENS = CachedTokens(
    "https://login.example", "toppy", None, "access", "refresh", "Bearer", "openid", 1.0, 2.0
)


class FakeKeyring:
    def __init__(self, *, is_locked: bool = False) -> None:
        self.value: str | None = None
        self.is_locked = is_locked

    def get(self) -> str | None:
        if self.is_locked:
            raise OSError("KeyringLocked")
        return self.value

    def set(self, value: str) -> None:
        self.value = value


def store(
    folder: Path, keyring: Keyring | None = None, passphrase: str | None = None
) -> TokenStore:
    return TokenStore(
        folder / "config" / "toppy" / "oidc-token.json",
        key_path=folder / "state" / "toppy" / "device-key",
        keyring=lambda: keyring,
    )


def test_what_is_saved_is_loaded_by_another_program(tmp_path: Path) -> None:
    assert store(tmp_path).load() is None
    store(tmp_path).save(TOKENS, Protection.DEVICE)
    other = store(tmp_path)
    assert other.load() == TOKENS
    assert other.protection is Protection.DEVICE


def test_every_file_and_folder_is_private(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.save(TOKENS, Protection.DEVICE)
    for path in (made.path, tmp_path / "state" / "toppy" / "device-key"):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in made.path.parent.iterdir()) == ["oidc-token.json"]


def test_no_token_is_on_the_disk_in_the_clear(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.save(TOKENS, Protection.DEVICE)
    assert b"refresh" not in made.path.read_bytes()
    assert "ciphertext" in json.loads(made.path.read_text())


def test_a_copied_file_is_of_no_use_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store(tmp_path)
    made.save(TOKENS, Protection.DEVICE)
    key = tmp_path / "state" / "toppy" / "device-key"
    machine = tmp_path / "machine-id"
    machine.write_text("another machine")
    monkeypatch.setattr(token_store, "_MACHINE_ID", (machine,))
    with pytest.raises(TokenCacheError, match="this machine"):
        made.load()
    key.unlink()
    with pytest.raises(TokenCacheError, match="device-key"):
        made.load()


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.path.parent.mkdir(parents=True)
    made.path.write_bytes(encode_plain(TOKENS))
    made.path.chmod(0o644)
    assert made.load() == TOKENS
    assert made.protection is None
    assert made.path.stat().st_mode & 0o777 == 0o600


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store(tmp_path)
    made.save(TOKENS, Protection.DEVICE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TokenCacheError, match="No space left"):
        made.save(TOKENS, Protection.DEVICE)
    assert made.load() == TOKENS
    assert [p.name for p in made.path.parent.iterdir()] == ["oidc-token.json"]


def test_the_keyring_keeps_the_key_where_there_is_one(tmp_path: Path) -> None:
    keyring = FakeKeyring()
    made = store(tmp_path, keyring)
    assert made.choose("auto") is Protection.KEYRING
    assert store(tmp_path).choose("auto") is Protection.DEVICE
    assert made.choose("device") is Protection.DEVICE
    made.save(TOKENS, Protection.KEYRING)
    assert not (tmp_path / "state").exists()
    assert made.load() == TOKENS
    assert keyring.value is not None
    assert "refresh" not in keyring.value


def test_without_its_keyring_a_cache_says_what_to_do(tmp_path: Path) -> None:
    store(tmp_path, FakeKeyring()).save(TOKENS, Protection.KEYRING)
    with pytest.raises(TokenCacheError, match=r"toppy\[keyring\]"):
        store(tmp_path).load()
    with pytest.raises(TokenCacheError, match="KeyringLocked"):
        store(tmp_path, FakeKeyring(is_locked=True)).load()
    with pytest.raises(TokenCacheError, match="no key"):
        store(tmp_path, FakeKeyring()).load()


def test_a_passphrase_is_needed_and_asked_for_once(tmp_path: Path) -> None:
    asked = []

    def ask() -> str:
        asked.append(1)
        return "correct horse"

    made = TokenStore(tmp_path / "t", key_path=tmp_path / "k", passphrase=ask)
    made.save(TOKENS, Protection.PASSPHRASE)
    assert made.load() == TOKENS
    assert len(asked) == 1
    with pytest.raises(TokenCacheError, match="TOPPY_TOKEN_PASSPHRASE"):
        TokenStore(tmp_path / "t", key_path=tmp_path / "k").load()


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"x" * 300_000])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, data: bytes) -> None:
    made = store(tmp_path)
    made.path.parent.mkdir(parents=True)
    made.path.write_bytes(data)
    with pytest.raises(TokenCacheError):
        made.load()


def test_removing_says_whether_there_was_something(tmp_path: Path) -> None:
    made = store(tmp_path)
    assert not made.remove()
    made.save(TOKENS, Protection.DEVICE)
    assert made.remove()
    assert made.load() is None


def test_only_one_program_holds_the_lock(tmp_path: Path) -> None:
    async def run() -> list[str]:
        said = []
        entered = asyncio.Event()

        async def first() -> None:
            async with store(tmp_path).locked():
                entered.set()
                await asyncio.sleep(0.1)
                said.append("first")

        async def second() -> None:
            await entered.wait()
            with pytest.raises(TokenCacheError, match="holds"):
                async with store(tmp_path).locked(timeout_s=0.0):
                    pass
            async with store(tmp_path).locked():
                said.append("second")

        await asyncio.gather(first(), second())
        return said

    assert asyncio.run(run()) == ["first", "second"]


def test_of_two_programs_that_make_the_machines_key_one_wins(tmp_path: Path) -> None:
    token_store._make_directory(tmp_path / "d")
    token_store._create(tmp_path / "d" / "key", b"one")
    token_store._create(tmp_path / "d" / "key", b"two")
    assert (tmp_path / "d" / "key").read_bytes() == b"one"
    assert len(list((tmp_path / "d").iterdir())) == 1
