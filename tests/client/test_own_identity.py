"""Whom the client's own policy takes this client for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jwt
import pytest

from toppy.auth.token_cache import CachedTokens, encode_plain
from toppy.client.own_identity import NOBODY
from toppy.client.policy import check_policy
from toppy.client.settings import LoadedClientConfig
from toppy.client.tokens import own_identity
from toppy.config.client import parse_client_config
from toppy.errors import DeniedError
from toppy.model.target import Target

ISSUER = "https://login.example"
PEOPLE = '[[policy.allow]]\nhost = "*"\nports = [53]\nsubjects = ["alice"]\n'
ANYBODY = '[[policy.allow]]\nhost = "*"\nports = [53]\n'
TARGET = Target("db.example", 53)


def token(**claims: object) -> str:
    return jwt.encode(claims, "nobody here knows the issuer" * 2, "HS256")


def loaded(
    folder: Path, policy: str, access_token: str | None, subject: str | None = None
) -> LoadedClientConfig:
    cache = folder / "token.json"
    if access_token is not None:
        tokens = CachedTokens(
            ISSUER, "toppy", None, access_token, None, "Bearer", None, 0.0, None, subject
        )
        cache.write_bytes(encode_plain(tokens))
        cache.chmod(0o600)
    text = (
        f'gateway = "gw.example"\n{policy}[auth]\nmode = "oidc_device_code"\n'
        f'issuer = "{ISSUER}"\nclient_id = "toppy"\ntoken_cache_path = "token.json"\n'
    )
    path = folder / "config.toml"
    return LoadedClientConfig(parse_client_config(text, str(path), {}), path, ())


def no_passphrase(_: Mapping[str, str]) -> str | None:
    raise AssertionError("asked for a passphrase")


def test_a_login_is_who_its_token_says(tmp_path: Path) -> None:
    config = loaded(tmp_path, PEOPLE, token(sub="alice", team="ops", groups=["users"]))
    who = own_identity(config, {}, no_passphrase)
    assert (who.subject, who.claims["team"], who.groups) == ("alice", "ops", ("users",))
    check_policy(config.config, TARGET, who)


def test_a_token_that_says_nothing_is_whom_the_provider_named(tmp_path: Path) -> None:
    who = own_identity(loaded(tmp_path, PEOPLE, "opaque", "alice"), {}, no_passphrase)
    assert (who.subject, dict(who.claims)) == ("alice", {})


def test_without_a_login_it_is_nobody(tmp_path: Path) -> None:
    config = loaded(tmp_path, PEOPLE, None)
    who = own_identity(config, {}, no_passphrase)
    assert who == NOBODY
    with pytest.raises(DeniedError, match="run toppy login"):
        check_policy(config.config, TARGET, who)


def test_where_no_rule_names_people_the_login_is_not_opened(tmp_path: Path) -> None:
    config = loaded(tmp_path, ANYBODY, token(sub="alice"))
    (tmp_path / "token.json").write_text("not even JSON")
    assert own_identity(config, {}, no_passphrase) == NOBODY
    check_policy(config.config, TARGET, NOBODY)


@pytest.mark.parametrize("subject", ["token", "anonymous", "jwt", "x" * 300])
def test_a_name_that_is_reserved_or_no_subject_makes_nobody_somebody(
    tmp_path: Path, subject: str
) -> None:
    who = own_identity(loaded(tmp_path, PEOPLE, token(sub=subject)), {}, no_passphrase)
    assert who.subject == ""
