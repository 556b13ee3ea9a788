"""From a configuration file to what the control plane works with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from toppy.config.gateway import GatewayConfig
from toppy.control import settings as settings_module
from toppy.control.init import write_development_files
from toppy.control.settings import config_path, load_settings, runtime_directory
from toppy.errors import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What ``toppy-gw init`` writes."""
    write_development_files(
        tmp_path, listen="127.0.0.1:4433", health="127.0.0.1:8080", names=("gw.test",), force=False
    )
    return tmp_path


def test_what_init_writes_can_be_used(directory: Path) -> None:
    settings = load_settings(directory / "gateway.toml", {})
    assert settings.warnings == ()
    assert settings.runtime_dir == directory / "run"
    assert settings.source == str(directory / "gateway.toml")
    assert {"localhost", "gw.test", "127.0.0.1", "::1"} <= set(settings.names)
    token = (directory / "token").read_text().strip()
    assert settings.authenticator.authenticate(f"Bearer {token}", 0.0).identity.subject == "token"


def test_no_secret_is_in_its_repr(directory: Path) -> None:
    settings = load_settings(directory / "gateway.toml", {"TOPPY_GW_TOKEN": "the-secret-token"})
    shown = repr(settings)
    assert "the-secret-token" not in shown
    assert "PRIVATE KEY" not in shown
    assert repr(settings.reset_key) not in shown
    assert repr(settings.token_key) not in shown


def test_keys_differ_from_start_to_start(directory: Path) -> None:
    first = load_settings(directory / "gateway.toml", {})
    second = load_settings(directory / "gateway.toml", {})
    assert first.reset_key != second.reset_key
    assert first.token_key != second.token_key
    assert len(first.reset_key) == len(first.token_key) == 64


@pytest.mark.parametrize("name", ["token", "server-key.pem"])
def test_a_secret_that_others_can_read_is_a_warning(directory: Path, name: str) -> None:
    (directory / name).chmod(0o640)
    (warning,) = load_settings(directory / "gateway.toml", {}).warnings
    assert f"chmod 600 {directory / name}" in warning


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("token", b"\xff\xfe not text \xff", "no UTF-8"),
        ("token", b"short", "too short"),
        ("token", b"\n", "too short"),
        ("server.pem", b"", "tls.certificate"),
        ("server.pem", bytes(2 << 20), "1 MiB"),
        ("server-key.pem", b"", "tls.private_key"),
    ],
)
def test_a_file_with_something_else_in_it_is_an_error(
    directory: Path, name: str, content: bytes, expected: str
) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_settings(directory / "gateway.toml", {})


def test_without_a_certificate_one_is_made_and_said(directory: Path) -> None:
    text = (directory / "gateway.toml").read_text()
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("cert", "priv")))
    (directory / "gateway.toml").write_text(text)
    settings = load_settings(directory / "gateway.toml", {})
    assert "localhost" in settings.names
    assert any("self-signed" in warning for warning in settings.warnings)


def test_the_flag_wins_over_the_environment() -> None:
    assert config_path("/a.toml", {"TOPPY_GW_CONFIG": "/b.toml"}) == Path("/a.toml")
    assert config_path(None, {"TOPPY_GW_CONFIG": "/b.toml"}) == Path("/b.toml")


def test_without_a_file_and_environment_it_says_how_to_begin() -> None:
    with pytest.raises(
        ConfigError, match=r"gateway\.toml does not exist; .*toppy-gw init.*--config"
    ):
        load_settings(None, {"HOME": "/root"})
    with pytest.raises(ConfigError, match="no authentication"):
        load_settings(None, {"TOPPY_GW_WORKERS": "1"})


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path / "nothing.toml", {})


def test_the_runtime_directory_is_relative_to_the_file(directory: Path) -> None:
    assert runtime_directory(directory / "gateway.toml", {}) == directory / "run"
    elsewhere = {"TOPPY_GW_RUNTIME_DIR": "/run/other"}
    assert runtime_directory(directory / "gateway.toml", elsewhere) == Path("/run/other")


def hot_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from hot_keys(kind, f"{prefix}{name}.")
        elif field.json_schema_extra == {"applies": "hot"}:
            yield f"{prefix}{name}"


def test_every_hot_setting_is_taken_over_by_a_push_of_the_policy(tmp_path: Path) -> None:
    for key in hot_keys(GatewayConfig):
        assert key.partition(".")[0] in settings_module._HOT or key == "log.level"
    path = tmp_path / "gateway.toml"
    path.write_text("workers = 2\n[auth]\ntoken = 'a-first-token'\n")
    old = load_settings(path, {})
    path.write_text("workers = 3\n[auth]\ntoken = 'another-token'\n[log]\nlevel = 'debug'\n")
    new = load_settings(path, {})
    pushed = old.with_hot(new)
    assert pushed.authenticator is new.authenticator
    assert pushed.config.log.level == "debug"
    assert pushed.config.workers == old.config.workers


def test_what_takes_a_restart_stays_as_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text("workers = 2\n[auth]\ntoken = 'a-first-token'\n")
    running = load_settings(path, {})
    path.write_text(
        "workers = 3\nruntime_dir = 'elsewhere'\n[auth]\ntoken = 'another-token'\n"
        "[listen]\nquic = ['127.0.0.1:9']\n[audit]\npath = 'elsewhere.jsonl'\n"
    )
    wanted = load_settings(path, {})
    mixed = wanted.with_running(running)
    assert (mixed.config.workers, mixed.authenticator) == (3, wanted.authenticator)
    assert mixed.config.listen == running.config.listen
    assert (mixed.runtime_dir, mixed.config.runtime_dir) == (
        running.runtime_dir,
        running.config.runtime_dir,
    )
    assert (mixed.audit, mixed.config.audit) == (running.audit, running.config.audit)


def test_no_authentication_on_loopback_is_not_mixed_with_addresses_that_are_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text("[auth]\ntoken = 'a-first-token'\n[listen]\nquic = ['0.0.0.0:9']\n")
    running = load_settings(path, {})
    path.write_text("insecure_no_auth = true\n[listen]\nquic = ['127.0.0.1:9']\n")
    wanted = load_settings(path, {})
    for mix, other in ((wanted.with_running, running), (running.with_hot, wanted)):
        with pytest.raises(ConfigError, match=r"refused on 0\.0\.0\.0:9"):
            mix(other)


def test_a_missing_file_is_reported_with_where_a_first_one_comes_from(directory: Path) -> None:
    (directory / "server.pem").unlink()
    with pytest.raises(ConfigError, match=f"toppy-gw init {directory}$") as refused:
        load_settings(directory / "gateway.toml", {})
    assert refused.value.key == "tls.certificate"


def test_the_mode_of_a_credential_is_systemds_affair(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "token").chmod(0o440)
    (warning,) = load_settings(directory / "gateway.toml", {}).warnings
    assert "can be read by others" in warning
    monkeypatch.setattr("toppy.system.files._CLOSED_DIRECTORIES", (directory,))
    assert load_settings(directory / "gateway.toml", {}).warnings == ()
