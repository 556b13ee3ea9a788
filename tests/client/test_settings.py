"""From the client's file to how it reaches its gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quic.certificates import certificates
from toppy.client.settings import gateway_settings, load_client_config
from toppy.errors import ConfigError

BASE = 'gateway = "gw.example"\nport = 4434\n'


def write(directory: Path, text: str, mode: int = 0o600) -> str:
    path = directory / "config.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_without_more_the_gateway_is_asked_by_its_own_template(tmp_path: Path) -> None:
    settings = gateway_settings(load_client_config(write(tmp_path, BASE), {}))
    assert (settings.host, settings.port, settings.server_name) == (
        "gw.example",
        4434,
        "gw.example",
    )
    assert settings.template == (
        "https://gw.example:4434/.well-known/masque/udp-forward/{target_host}/{target_port}/"
    )
    assert settings.authorization is None
    assert settings.ca_certificates_pem is None
    assert settings.initial_packet_bytes == 1350


def test_an_ipv6_gateway_has_brackets_in_the_authority(tmp_path: Path) -> None:
    settings = gateway_settings(load_client_config(write(tmp_path, 'gateway = "::1"'), {}))
    assert settings.host == "::1"
    assert settings.template.startswith("https://[::1]:4433/")


def test_another_proxys_template_is_used_as_it_is(tmp_path: Path) -> None:
    template = "https://proxy.example/masque{?target_host,target_port}"
    text = BASE + f'gateway_template = "{template}"\n'
    assert gateway_settings(load_client_config(write(tmp_path, text), {})).template == template


@pytest.mark.parametrize(
    "text", ['auth_token = "the-token"\n', '[auth]\nmode = "token"\ntoken = "the-token"\n']
)
def test_the_token_comes_from_either_place(tmp_path: Path, text: str) -> None:
    settings = gateway_settings(load_client_config(write(tmp_path, BASE + text), {}))
    assert settings.authorization == "the-token"
    assert "the-token" not in repr(settings)


def test_the_ca_file_is_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(certificates().ca_pem)
    path = write(tmp_path, BASE + 'ca_cert_path = "ca.pem"\n')
    assert gateway_settings(load_client_config(path, {})).ca_certificates_pem == (
        certificates().ca_pem
    )


def test_a_ca_file_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + 'ca_cert_path = "/nowhere/ca.pem"\n')
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem does not exist; copy") as refused:
        gateway_settings(load_client_config(path, {}))
    assert str(refused.value).startswith(f"{path}: ca_cert_path: ")
    assert refused.value.key == "ca_cert_path"


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pytest.param(certificates().key_pem, id="private key")]
)
def test_a_ca_file_without_a_certificate_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ca.pem").write_bytes(content)
    path = write(tmp_path, BASE + 'ca_cert_path = "ca.pem"\n')
    with pytest.raises(ConfigError, match=r"ca_cert_path: .*ca\.pem has no certificate"):
        gateway_settings(load_client_config(path, {}))


@pytest.mark.parametrize(
    "text",
    [
        'auth_token = "a-secret"\n',
        '[auth]\nmode = "token"\ntoken = "a-secret"\n',
        'audit_signing_key = "a-secret"\n',
    ],
)
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_file_with_a_secret_that_others_can_read_is_a_warning(
    tmp_path: Path, text: str, mode: int
) -> None:
    loaded = load_client_config(write(tmp_path, BASE + text, mode), {})
    (warning,) = loaded.warnings
    assert "chmod 600" in warning
    assert "a-secret" not in warning


def test_a_file_without_a_secret_may_be_read_by_all(tmp_path: Path) -> None:
    assert load_client_config(write(tmp_path, BASE, 0o644), {}).warnings == ()


def test_a_file_of_ones_own_is_no_warning(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + 'auth_token = "a-secret"\n')
    assert load_client_config(path, {}).warnings == ()


def test_a_logins_token_is_sent_where_the_file_has_none(tmp_path: Path) -> None:
    text = '[auth]\nmode = "oidc_device_code"\nissuer = "https://i.example"\nclient_id = "c"\n'
    loaded = load_client_config(write(tmp_path, BASE + text), {})
    assert loaded.warnings == ()
    assert gateway_settings(loaded).authorization is None
    assert gateway_settings(loaded, "from the login").authorization == "from the login"


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path / "config.toml" / "below-a-file"):
        write(tmp_path, BASE)
        with pytest.raises(ConfigError, match=r"no configuration at .*toppy-gw init"):
            load_client_config(str(path), {})


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_client_config(str(tmp_path), {})


def test_a_file_that_may_not_be_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        load_client_config(str(tmp_path / "config.toml"), {})


def test_the_file_is_found_by_flag_environment_or_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for directory in (home / ".config" / "toppy", tmp_path / "environment", tmp_path / "flag"):
        directory.mkdir(parents=True)
        write(directory, BASE)
    environ = {"HOME": str(home)}
    assert load_client_config(None, environ).path == home / ".config/toppy/config.toml"
    environ["TOPPY_CONFIG"] = str(tmp_path / "environment" / "config.toml")
    assert load_client_config(None, environ).path == tmp_path / "environment/config.toml"
    flag = tmp_path / "flag" / "config.toml"
    assert load_client_config(str(flag), environ).path == flag


def test_a_small_mtu_does_not_make_initial_packets_too_small(tmp_path: Path) -> None:
    settings = gateway_settings(load_client_config(write(tmp_path, BASE + "mtu = 600\n"), {}))
    assert settings.initial_packet_bytes == 1200
