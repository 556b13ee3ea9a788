"""Certificate, key and CA of clients, from the configuration to what workers are given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.system.certificate_samples import authority, sample
from toppy.control.init import write_development_files
from toppy.control.settings import GatewaySettings, load_settings
from toppy.errors import ConfigError
from toppy.system import files
from toppy.system.certificate_authority import KeyPair

PASSPHRASE = "correct horse battery"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What ``toppy-gw init`` writes."""
    write_development_files(
        tmp_path, listen="127.0.0.1:4433", health="127.0.0.1:8080", names=(), force=False
    )
    return tmp_path


def load(directory: Path, tls: str = "", **variables: str) -> GatewaySettings:
    path = directory / "gateway.toml"
    text = path.read_text().replace("[tls]\n", f"[tls]\n{tls}\n", 1)
    path.write_text(text)
    return load_settings(path, variables)


def put(directory: Path, pair: KeyPair, key_pem: bytes | None = None) -> None:
    (directory / "server.pem").write_bytes(pair.certificate_pem)
    (directory / "server-key.pem").write_bytes(key_pem or pair.key_pem)


class TestPassphrase:
    @pytest.fixture
    def locked(self, directory: Path) -> Path:
        pair = sample()
        put(directory, pair, pair.encrypted_key_pem(PASSPHRASE.encode()))
        (directory / "passphrase").write_text(f"{PASSPHRASE}\n")
        (directory / "passphrase").chmod(0o600)
        return directory

    def test_a_file_opens_the_key(self, locked: Path) -> None:
        settings = load(locked, 'private_key_passphrase_file = "passphrase"')
        assert settings.private_key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
        assert settings.warnings == ()
        assert PASSPHRASE not in repr(settings)
        assert "PRIVATE KEY" not in repr(settings)

    def test_a_variable_opens_the_key(self, locked: Path) -> None:
        settings = load(locked, TOPPY_GW_TLS_PASSPHRASE=PASSPHRASE)
        assert settings.private_key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
        path = str(locked / "passphrase")
        assert load(locked, TOPPY_GW_TLS_KEY_PASSPHRASE_FILE=path).private_key_pem

    def test_without_one_the_setting_is_named(self, locked: Path) -> None:
        with pytest.raises(ConfigError, match="private_key_passphrase_file"):
            load(locked)

    def test_a_wrong_one_is_said_and_not_shown(self, locked: Path) -> None:
        with pytest.raises(ConfigError, match="passphrase is wrong") as error:
            load(locked, TOPPY_GW_TLS_PASSPHRASE="battery horse")
        assert "battery horse" not in str(error.value)

    def test_an_empty_file_is_said(self, locked: Path) -> None:
        (locked / "passphrase").write_text("\n")
        with pytest.raises(ConfigError, match="empty"):
            load(locked, 'private_key_passphrase_file = "passphrase"')

    def test_a_key_that_needs_none_was_perhaps_exchanged(self, directory: Path) -> None:
        with pytest.raises(ConfigError, match="was it replaced"):
            load(directory, TOPPY_GW_TLS_PASSPHRASE=PASSPHRASE)


class TestPair:
    @pytest.mark.parametrize(
        ("begin_days", "end_days", "reason"), [(-9, -1, "expired on"), (1, 9, "not valid before")]
    )
    def test_a_certificate_out_of_its_time_is_refused(
        self, directory: Path, begin_days: int, end_days: int, reason: str
    ) -> None:
        put(directory, sample(begin_days=begin_days, end_days=end_days))
        with pytest.raises(ConfigError, match=reason) as error:
            load(directory)
        assert "toppy-gw cert check" in str(error.value)

    def test_when_it_ends_is_known(self, directory: Path) -> None:
        pair = sample(end_days=5)
        put(directory, pair)
        ends = pair.certificate.not_valid_after_utc.timestamp()
        assert load(directory).certificate_ends_at == ends


class TestModes:
    def test_a_key_that_everybody_reads_is_refused_unless_allowed(self, directory: Path) -> None:
        (directory / "server-key.pem").chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            load(directory)
        (warning,) = load(directory, "allow_open_private_key = true").warnings
        assert "chmod 600" in warning

    def test_a_key_that_a_group_reads_is_a_warning(self, directory: Path) -> None:
        (directory / "server-key.pem").chmod(0o640)
        (warning,) = load(directory).warnings
        assert "tls.private_key" in warning

    def test_a_containers_secret_is_as_it_is(
        self, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        monkeypatch.setattr(files, "_CLOSED_DIRECTORIES", (secrets,))
        shutil.move(directory / "server-key.pem", secrets / "key")
        (secrets / "key").chmod(0o444)
        pair = {"TOPPY_GW_CERT": str(directory / "server.pem")}
        settings = load(directory, **pair, TOPPY_GW_KEY=str(secrets / "key"))
        assert settings.warnings == ()

    @pytest.mark.parametrize("mode", [0o640, 0o604])
    def test_a_configuration_with_a_secret_that_others_read_is_a_warning(
        self, directory: Path, mode: int
    ) -> None:
        path = directory / "gateway.toml"
        text = path.read_text().replace('token_file = "token"', 'token = "a-token-for-tests"')
        path.write_text(text)
        path.chmod(mode)
        (warning,) = load(directory).warnings
        assert f"chmod 600 {path}" in warning
        path.chmod(0o600)
        assert load(directory).warnings == ()

    def test_a_secret_of_the_environment_is_not_the_files(self, directory: Path) -> None:
        assert load(directory, TOPPY_GW_TOKEN="a-token-for-tests").warnings == ()


class TestClientCa:
    def test_it_is_read_and_trusted(self, directory: Path) -> None:
        settings = load(directory, 'client_ca = "ca.pem"')
        assert settings.client_ca_pem == (directory / "ca.pem").read_bytes()
        assert settings.authenticator.trust.is_required
        assert len(settings.authenticator.trust.authorities) == 1

    def test_without_one_no_certificate_counts(self, directory: Path) -> None:
        settings = load(directory)
        assert settings.client_ca_pem == b""
        assert not settings.authenticator.trust.authorities

    @pytest.mark.parametrize(("name", "reason"), [("server.pem", "is no CA"), ("token", "PEM")])
    def test_what_is_no_ca_is_refused(self, directory: Path, name: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            load(directory, f'client_ca = "{name}"')

    def test_one_that_has_ended_is_a_warning(self, directory: Path) -> None:
        old = sample(begin_days=-9, end_days=-1, is_ca=True, usages=())
        pem = old.certificate_pem + authority().certificate_pem
        (directory / "clients.pem").write_bytes(pem)
        (warning,) = load(directory, 'client_ca = "clients.pem"').warnings
        assert "expired" in warning

    def test_one_that_is_not_asked_for_is_a_warning(self, directory: Path) -> None:
        tls = 'client_ca = "ca.pem"\nclient_certificates = "none"'
        (warning,) = load(directory, tls).warnings
        assert "no effect" in warning

    def test_a_push_of_the_policy_leaves_it_as_it_is(self, directory: Path) -> None:
        running = load(directory)
        other = load(directory, 'client_ca = "ca.pem"')
        assert not running.with_hot(other).authenticator.trust.authorities
        assert other.with_hot(running).authenticator.trust.is_required

    def test_a_push_that_needs_certificates_waits_for_a_reload(self, directory: Path) -> None:
        running = load(directory)
        path = directory / "gateway.toml"
        path.write_text(f"{path.read_text()}\n[auth.client_certificate]\naccept = true\n")
        other = load(directory, 'client_ca = "ca.pem"')
        with pytest.raises(ConfigError, match="takes a whole reload"):
            running.with_hot(other)
