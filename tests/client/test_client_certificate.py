"""A client's own certificate: from its file to what the engine is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.certificate_samples import sample
from toppy.client.session import CERTIFICATE_REQUIRED, why_closed
from toppy.client.settings import gateway_settings, load_client_config
from toppy.errors import ConfigError
from toppy.quic.engine import ConnectionClosed
from toppy.system.certificate_authority import KeyPair


@pytest.fixture
def pair() -> KeyPair:
    return sample(usages=("client",))


def load(directory: Path, pair: KeyPair, extra: str = "", key_pem: bytes | None = None) -> Path:
    (directory / "me.pem").write_bytes(pair.certificate_pem)
    (directory / "me-key.pem").write_bytes(key_pem or pair.key_pem)
    (directory / "me-key.pem").chmod(0o600)
    path = directory / "config.toml"
    path.write_text(
        'gateway = "gw.example"\nclient_certificate = "me.pem"\nclient_key = "me-key.pem"\n' + extra
    )
    return path


def test_it_is_read_beside_the_configuration(tmp_path: Path, pair: KeyPair) -> None:
    loaded = load_client_config(str(load(tmp_path, pair)), {})
    assert loaded.warnings == ()
    settings = gateway_settings(loaded)
    assert settings.certificate_chain_pem == pair.certificate_pem
    assert settings.private_key_pem == pair.key_pem
    assert "PRIVATE KEY" not in repr(settings)


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path, pair: KeyPair) -> None:
    locked = pair.encrypted_key_pem(b"correct horse")
    (tmp_path / "passphrase").write_text("correct horse\n")
    (tmp_path / "passphrase").chmod(0o600)
    opened = 'client_key_passphrase_file = "passphrase"\n'
    loaded = load_client_config(str(load(tmp_path, pair, opened, locked)), {})
    assert gateway_settings(loaded).private_key_pem == pair.key_pem
    loaded = load_client_config(str(load(tmp_path, pair, "", locked)), {})
    with pytest.raises(ConfigError, match="set client_key_passphrase_file"):
        gateway_settings(loaded)
    (tmp_path / "passphrase").write_text("donkey\n")
    loaded = load_client_config(str(load(tmp_path, pair, opened, locked)), {})
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        gateway_settings(loaded)


def test_an_expired_one_says_so_before_anything_is_dialled(tmp_path: Path) -> None:
    path = load(tmp_path, sample(begin_days=-9, end_days=-1))
    with pytest.raises(ConfigError, match=r"expired on .*toppy-gw cert client"):
        gateway_settings(load_client_config(str(path), {}))


def test_a_key_that_others_can_read_is_a_warning(tmp_path: Path, pair: KeyPair) -> None:
    path = load(tmp_path, pair)
    (tmp_path / "me-key.pem").chmod(0o640)
    (warning,) = load_client_config(str(path), {}).warnings
    assert f"chmod 600 {tmp_path / 'me-key.pem'}" in warning


@pytest.mark.parametrize("line", ['client_key = "k"', 'client_certificate = "c"'])
def test_half_a_pair_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'gateway = "gw.example"\n{line}\n')
    with pytest.raises(ConfigError, match="go together"):
        load_client_config(str(path), {})


def test_a_gateway_that_wants_a_certificate_is_told_with_the_settings() -> None:
    wanted = ConnectionClosed(1, CERTIFICATE_REQUIRED, "it is required", by_peer=True)
    assert why_closed(wanted) == "it is required: set client_certificate and client_key"
    other = ConnectionClosed(1, 0x12A, "it is bad", by_peer=True)
    assert why_closed(other) == "it is bad"


@pytest.mark.parametrize(
    "said", ["invalid peer certificate: UnknownIssuer", "unable to get local issuer certificate"]
)
def test_an_issuer_that_is_not_known_is_told_with_the_setting_where_it_is_not_set(
    said: str,
) -> None:
    closed = ConnectionClosed(1, 0x130, said, by_peer=False)
    told = f"{said}: set ca_cert_path to the gateway's ca.pem"
    assert why_closed(closed, has_ca=False) == told
    assert why_closed(closed) == said
