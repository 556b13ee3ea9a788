"""What differs between two configurations, and what it takes to apply it: for every setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toppy.config.changes import changed_settings, without_restart
from toppy.config.gateway import GatewayConfig, parse_gateway_config

TEXT = """
[auth]
token = "the-first-token"
"""

RESTART = {
    "runtime_dir",
    "listen.quic",
    "listen.health",
    "listen.steering",
    "listen.socket_buffer_bytes",
    "reload.generations",
}
HOT = {"insecure_no_auth", "policy.rules", "log.level", "resolver.nameservers"} | {
    "resolver.timeout_s",
    "auth.token",
    "auth.token_file",
}


def parse(text: str = TEXT) -> GatewayConfig:
    return parse_gateway_config(text, "gateway.toml", {}).config


def settings(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its key."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def with_other_value(model: BaseModel, key: str) -> Any:
    """The same configuration but for one setting."""
    name, _, rest = key.partition(".")
    value = with_other_value(getattr(model, name), rest) if rest else object()
    return model.model_copy(update={name: value})


KEYS = dict(settings(parse()))


def test_every_setting_says_what_it_takes_to_apply_it() -> None:
    for key, field in KEYS.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), key
        assert extra["applies"] in {"hot", "reload", "restart"}, key


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_that_changed_is_named_with_what_it_takes_to_apply_it(key: str) -> None:
    before = parse()
    extra = KEYS[key].json_schema_extra
    assert isinstance(extra, dict)
    assert changed_settings(before, with_other_value(before, key)) == {key: extra["applies"]}


@pytest.mark.parametrize("key", sorted(RESTART))
def test_what_is_bound_or_sized_at_the_start_needs_a_restart(key: str) -> None:
    before = parse()
    assert changed_settings(before, with_other_value(before, key)) == {key: "restart"}


@pytest.mark.parametrize("key", sorted(HOT))
def test_who_may_do_what_and_the_log_level_are_hot(key: str) -> None:
    before = parse()
    assert changed_settings(before, with_other_value(before, key)) == {key: "hot"}


def test_everything_that_workers_are_told_at_their_start_needs_a_reload_at_most() -> None:
    before = parse()
    for key in KEYS:
        if key.startswith(("quic.", "limits.", "tls.")) or key in ("workers", "name"):
            assert changed_settings(before, with_other_value(before, key)) == {key: "reload"}


@pytest.mark.parametrize("key", KEYS)
def test_what_takes_a_restart_stays_as_it_runs_and_all_else_is_as_wanted(key: str) -> None:
    running = parse()
    wanted = with_other_value(running, key)
    extra = KEYS[key].json_schema_extra
    assert isinstance(extra, dict)
    kept = running if extra["applies"] == "restart" else wanted
    assert changed_settings(kept, without_restart(running, wanted)) == {}


def test_the_same_text_is_no_change() -> None:
    assert changed_settings(parse(), parse()) == {}


def test_a_value_that_is_written_differently_is_no_change() -> None:
    written = TEXT + '[log]\nlevel = "INFO"\n[quic]\nidle_timeout_s = 30\n'
    assert changed_settings(parse(), parse(written)) == {}


def test_a_secret_that_changed_is_named_and_not_shown() -> None:
    changed = changed_settings(parse(), parse(TEXT.replace("first", "second")))
    assert changed == {"auth.token": "hot"}


def test_a_section_that_is_new_is_a_change_of_its_settings() -> None:
    added = TEXT + '[auth.jwt]\nsecret = "at least sixteen bytes"\nissuer = "me"\n'
    assert changed_settings(parse(), parse(added)) == {
        "auth.jwt.secret": "hot",
        "auth.jwt.issuer": "hot",
    }


def test_a_rule_that_changed_is_a_change_of_the_rules() -> None:
    rules = '[[policy.rules]]\naction = "allow"\ncidr = ["192.0.2.0/24"]\n'
    before = parse(TEXT + rules)
    assert changed_settings(before, parse(TEXT + rules)) == {}
    assert changed_settings(before, parse(TEXT + rules.replace("/24", "/25"))) == {
        "policy.rules": "hot"
    }


def test_several_changes_are_all_named() -> None:
    changed = parse('workers = 3\nruntime_dir = "elsewhere"\n[log]\nlevel = "debug"\n' + TEXT)
    assert changed_settings(parse(), changed) == {
        "workers": "reload",
        "runtime_dir": "restart",
        "log.level": "hot",
    }
