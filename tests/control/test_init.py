"""``toppy-gw init``: safe files that work together, all or none."""

from __future__ import annotations

import errno
import ipaddress
import os
import pwd
import shutil
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from toppy.client.settings import gateway_settings, load_client_config
from toppy.config.client import ClientConfig, parse_client_config
from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.control.init import write_development_files
from toppy.control.settings import load_settings
from toppy.errors import ConfigError
from toppy.model.identity import Identity
from toppy.model.target import Protocol, Target
from toppy.policy.ruleset import Ruleset
from toppy.system.certificate_files import names_of

NAMES = [
    "ca.pem",
    "ca-key.pem",
    "server.pem",
    "server-key.pem",
    "token",
    "gateway.toml",
    "client.toml",
]
SECRET_NAMES = {"ca-key.pem", "server-key.pem", "token", "client.toml"}


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Every permission bit that is asked for is given."""
    before = os.umask(0)
    yield
    os.umask(before)


def write(
    directory: Path,
    *,
    listen: str = "127.0.0.1:4433",
    names: tuple[str, ...] = (),
    force: bool = False,
) -> list[Path]:
    return write_development_files(
        directory, listen=listen, health="127.0.0.1:8080", names=names, force=force
    )


def gateway_of(directory: Path) -> GatewayConfig:
    loaded = parse_gateway_config((directory / "gateway.toml").read_text(), "gateway.toml", {})
    assert loaded.warnings == ()
    return loaded.config


def client_of(directory: Path) -> ClientConfig:
    return parse_client_config((directory / "client.toml").read_text(), "client.toml", {})


def test_every_file_is_written_and_named(tmp_path: Path) -> None:
    assert write(tmp_path / "gw") == [tmp_path / "gw" / name for name in NAMES]
    assert sorted(path.name for path in (tmp_path / "gw").iterdir()) == sorted(NAMES)


@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_can_read_keys_token_and_directory(tmp_path: Path) -> None:
    directory = tmp_path / "gw"
    for path in write(directory):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if path.name in SECRET_NAMES else 0o644), path.name
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.usefixtures("open_umask")
def test_a_secret_is_never_created_with_wider_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open
    asked: dict[str, set[int]] = {}

    def spy(path: Path, flags: int, mode: int = 0o777) -> int:
        assert flags & os.O_EXCL
        asked.setdefault(Path(path).name.lstrip(".").split(".")[0], set()).add(mode)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)
    write(tmp_path / "gw")
    for name in SECRET_NAMES:
        assert asked[name.split(".")[0]] == {0o600}, name


def test_an_existing_directory_keeps_its_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_both_configurations_are_read_back_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path, listen="127.0.0.1:5000")
    gateway, client = gateway_of(tmp_path), client_of(tmp_path)
    assert gateway.listen.quic == ("127.0.0.1:5000",)
    assert (client.gateway, client.port, client.server_name) == ("127.0.0.1", 5000, "localhost")
    assert client.ca_cert_path == "ca.pem"
    assert client.mtu == 1350
    assert client.token is not None
    assert client.token.get_secret_value() == (tmp_path / "token").read_text().strip()


def test_the_gateway_can_load_every_file_that_it_names(tmp_path: Path) -> None:
    write(tmp_path)
    settings = load_settings(tmp_path / "gateway.toml", {})
    assert settings.warnings == ()
    assert settings.runtime_dir == tmp_path / "run"
    token = (tmp_path / "token").read_text().strip()
    found = settings.authenticator.authenticate(f"Bearer {token}", 0.0)
    assert found.identity.method == "static"


def test_the_certificate_has_localhost_and_every_name(tmp_path: Path) -> None:
    write(tmp_path, listen="192.0.2.7:1", names=("GW.example.", "*.gw.example", "192.0.2.9"))
    assert set(names_of((tmp_path / "server.pem").read_bytes())) == {
        "localhost",
        "127.0.0.1",
        "::1",
        "192.0.2.7",
        "gw.example",
        "*.gw.example",
        "192.0.2.9",
    }
    assert client_of(tmp_path).gateway == "192.0.2.7"
    assert client_of(tmp_path).server_name == "gw.example"


@pytest.mark.parametrize(
    ("listen", "names", "gateway", "server_name"),
    [
        ("0.0.0.0:1", (), "127.0.0.1", "localhost"),
        ("[::]:1", (), "::1", "localhost"),
        ("[::1]:1", (), "::1", "localhost"),
        ("0.0.0.0:1", ("gw.example",), "gw.example", "gw.example"),
        ("0.0.0.0:1", ("*.gw.example", "gw.example"), "gw.example", "gw.example"),
        ("0.0.0.0:1", ("*.gw.example",), "127.0.0.1", "localhost"),
        ("0.0.0.0:1", ("192.0.2.1",), "192.0.2.1", "192.0.2.1"),
    ],
)
def test_the_client_is_told_a_name_that_can_be_reached_and_verified(
    tmp_path: Path, listen: str, names: tuple[str, ...], gateway: str, server_name: str
) -> None:
    write(tmp_path, listen=listen, names=names)
    client = client_of(tmp_path)
    assert (client.gateway, client.server_name) == (gateway, server_name)
    certificate = names_of((tmp_path / "server.pem").read_bytes())
    assert server_name in certificate


def test_client_and_ca_go_together_wherever_they_are_copied(tmp_path: Path) -> None:
    write(tmp_path / "gw")
    endpoint = tmp_path / "endpoint"
    endpoint.mkdir()
    shutil.copy(tmp_path / "gw" / "ca.pem", endpoint)
    shutil.copy(tmp_path / "gw" / "client.toml", endpoint / "config.toml")
    shutil.rmtree(tmp_path / "gw")
    assert gateway_settings(load_client_config(str(endpoint / "config.toml"), {}))


def test_the_audit_log_is_on_and_beside_the_configuration(tmp_path: Path) -> None:
    write(tmp_path)
    assert load_settings(tmp_path / "gateway.toml", {}).audit.path == tmp_path / "audit.jsonl"


@pytest.mark.parametrize(
    ("user", "path"), [("nobody", ""), ("no-such-user", "/var/lib/toppy-gw/audit.jsonl")]
)
def test_in_the_system_directory_the_services_state_directory_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, path: str
) -> None:
    monkeypatch.setattr("toppy.control.init._SYSTEM_DIRECTORY", tmp_path)
    monkeypatch.setattr("toppy.control.service_files.SYSTEM_DIRECTORY", tmp_path)
    monkeypatch.setattr("toppy.control.service_files._SERVICE_USER", user)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    write(tmp_path)
    assert gateway_of(tmp_path).audit.path == path


def decide(directory: Path, address: str, port: int = 53, protocol: Protocol = "udp") -> bool:
    rules = Ruleset(gateway_of(directory).policy.rules)
    target = Target(str(ipaddress.ip_address(address)), port, protocol)
    return rules.decide(Identity("token", "static"), target, [address], now=0).is_allowed


def test_a_gateway_on_loopback_allows_loopback_targets_only(tmp_path: Path) -> None:
    write(tmp_path)
    assert decide(tmp_path, "127.0.0.1")
    assert decide(tmp_path, "::1")
    assert decide(tmp_path, "127.0.0.1", protocol="tcp")
    assert not decide(tmp_path, "10.0.0.1")
    assert not decide(tmp_path, "8.8.8.8")


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "192.0.2.1:1", "[::]:1"])
def test_a_gateway_that_others_can_reach_allows_nothing(tmp_path: Path, listen: str) -> None:
    write(tmp_path, listen=listen)
    assert gateway_of(tmp_path).policy.rules == ()
    assert not decide(tmp_path, "127.0.0.1")


def test_the_examples_in_the_comments_are_right(tmp_path: Path) -> None:
    write(tmp_path, listen="0.0.0.0:1")
    text = (tmp_path / "gateway.toml").read_text()
    start = text.index("# [[policy.rules]]")
    example = text[start:].replace("# ", "")
    rules = parse_gateway_config(text[:start] + example, "gateway.toml", {}).config.policy.rules
    assert [rule.name for rule in rules] == ["office DNS"]


def test_the_clients_policy_allows_this_machine(tmp_path: Path) -> None:
    write(tmp_path)
    policy = client_of(tmp_path).policy
    assert policy is not None
    rules = Ruleset(policy.allow, guards_special=False)
    someone = Identity("anonymous", "none")
    assert rules.decide(someone, Target("127.0.0.1", 53), ["127.0.0.1"], now=0).is_allowed
    assert not rules.decide(someone, Target("10.0.0.1", 53), ["10.0.0.1"], now=0).is_allowed


@pytest.mark.parametrize("name", ['q"uote', "back\\slash", "line\nbreak", "ünïcode", "a#b = [c]"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    write(directory)
    assert gateway_settings(load_client_config(str(directory / "client.toml"), {}))
    assert tomllib.loads((directory / "gateway.toml").read_text())["workers"] == "auto"


def test_a_directory_name_that_toml_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no UTF-8"):
        write(tmp_path / "\udcff")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_when_one_file_exists(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"already has {name};"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "token").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="already has token"):
        write(tmp_path)


def test_force_replaces_everything_and_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    directory = tmp_path / "gw"
    write(directory)
    before = {name: (directory / name).read_bytes() for name in NAMES}
    (directory / "token").unlink()
    (directory / "token").symlink_to(outside)
    write(directory, force=True)
    after = {name: (directory / name).read_bytes() for name in NAMES}
    assert {name for name in NAMES if before[name] != after[name]} >= {"ca.pem", "token"}
    assert outside.read_text() == "mine"
    ca = x509.load_pem_x509_certificate(after["ca.pem"])
    server = x509.load_pem_x509_certificate(after["server.pem"])
    server.verify_directly_issued_by(ca)


@pytest.mark.parametrize("failing_call", range(1, len(NAMES) + 1))
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = os.fchmod, 0

    def fail(descriptor: int, mode: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", fail)
    with pytest.raises(ConfigError, match=r"cannot write .*No space left"):
        write(tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_in_the_place_of_a_file_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "token").mkdir()
    with pytest.raises(ConfigError, match="token: Is a directory"):
        write(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gw").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write"):
        write(tmp_path / "gw")
    assert (tmp_path / "gw").read_text() == "mine"


@pytest.mark.parametrize("listen", ["localhost:1", "127.0.0.1", "127.0.0.1:65536", "::1:1", ""])
def test_a_listen_address_that_is_none_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        write(tmp_path / "gw", listen=listen)
    assert not (tmp_path / "gw").exists()


@pytest.mark.parametrize("name", ["", "two words", "a..b", "-/x", "a" * 64 + ".example", "*"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        write(tmp_path / "gw", names=(name,))
    assert not (tmp_path / "gw").exists()


def test_an_example_that_nobody_has_changed_is_replaced(tmp_path: Path) -> None:
    for name in ("gateway.toml", "gateway.toml.example"):
        (tmp_path / name).write_text("# an example")
    write(tmp_path)
    assert gateway_of(tmp_path).tls.certificate == "server.pem"
    assert (tmp_path / "gateway.toml.example").read_text() == "# an example"


def test_an_example_that_was_changed_is_kept(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml.example").write_text("# an example")
    (tmp_path / "gateway.toml").write_text("# mine")
    with pytest.raises(ConfigError, match=r"already has gateway\.toml"):
        write(tmp_path)
    assert (tmp_path / "gateway.toml").read_text() == "# mine"
    assert not (tmp_path / "token").exists()


def test_in_the_system_directory_the_service_owns_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr("toppy.control.init._SYSTEM_DIRECTORY", tmp_path)
    monkeypatch.setattr("toppy.control.service_files.SYSTEM_DIRECTORY", tmp_path)
    monkeypatch.setattr("toppy.control.service_files._SERVICE_USER", "nobody")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda file, *owner: given.append(owner))
    write(tmp_path)
    assert given == [(nobody.pw_uid, nobody.pw_gid)] * 2
    # and its sockets are where the service has its runtime directory
    assert gateway_of(tmp_path).runtime_dir == "/run/toppy-gw"


def test_without_the_services_user_every_file_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toppy.control.service_files.SYSTEM_DIRECTORY", tmp_path)
    monkeypatch.setattr("toppy.control.service_files._SERVICE_USER", "no-such-user")
    assert {path.stat().st_uid for path in write(tmp_path)} == {os.geteuid()}
