"""``toppy-gw cert``: what it writes, shows and finds."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner, Result

from tests.system.certificate_samples import authority, sample
from toppy.auth.client_certificate import parse_client_certificate, subject_of
from toppy.cli.toppy_gw import app
from toppy.control import certificates
from toppy.control.init import write_development_files
from toppy.system.certificate_authority import issue_server_certificate
from toppy.system.certificate_files import describe_certificate, parse_certificates

PASSPHRASE = "correct horse battery"


def cert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["cert", *map(str, arguments)])


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    assert cert("ca", tmp_path).exit_code == 0
    return tmp_path


def test_a_ca_signs_a_server_and_a_client_that_pass_their_checks(pki: Path) -> None:
    assert cert("server", pki, "--name", "GW.example.", "--name", "192.0.2.1").exit_code == 0
    assert cert("client", pki, "alice").exit_code == 0
    for name, more in (
        ("server", ["--name", "gw.example", "--name", "192.0.2.1", "--name", "localhost"]),
        ("alice", ["--client"]),
    ):
        key, ca = pki / f"{name}-key.pem", pki / "ca.pem"
        checked = cert("check", pki / f"{name}.pem", "--key", key, "--ca", ca, *more)
        assert checked.exit_code == 0, checked.output
        assert "[fail]" not in checked.stdout


def test_keys_are_the_owners_alone_and_of_the_kind_that_was_asked_for(tmp_path: Path) -> None:
    made = cert("ca", tmp_path / "new", "--key-type", "ecdsa-p384", "--days", "7", "--name", "CA X")
    assert made.exit_code == 0
    assert (tmp_path / "new" / "ca-key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (certificate,) = parse_certificates((tmp_path / "new" / "ca.pem").read_bytes())
    facts = describe_certificate(certificate)
    assert (facts.subject, facts.key_type) == ("CN=CA X", "ECDSA P-384")
    assert (facts.not_after - facts.not_before).days == 7


@pytest.mark.parametrize("what", [("ca",), ("server",), ("client", "alice")])
def test_nothing_is_overwritten_without_force(pki: Path, what: tuple[str, ...]) -> None:
    command, *more = what
    if command != "ca":
        assert cert(command, pki, *more).exit_code == 0
    before = {path.name: path.read_bytes() for path in pki.iterdir()}
    refused = cert(command, pki, *more)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert {path.name: path.read_bytes() for path in pki.iterdir()} == before
    assert cert(command, pki, *more, "--force").exit_code == 0
    assert {path.name: path.read_bytes() for path in pki.iterdir()} != before


def test_of_two_commands_at_once_one_writes_and_the_other_says_so(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_slowly(*arguments: object, **options: object) -> object:
        (pki / "server-key.pem").write_text("of the other command")
        return issue_server_certificate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(certificates, "issue_server_certificate", make_slowly)
    refused = cert("server", pki)
    assert refused.exit_code == 1
    assert "server-key.pem has just been written by somebody else" in refused.stderr
    assert (pki / "server-key.pem").read_text() == "of the other command"
    assert not (pki / "server.pem").exists()


@pytest.mark.parametrize(
    ("name", "subject"),
    [("Alice", "cert:alice"), ("b.example", "cert:b.example"), ("A@b.example", "cert:A@b.example")],
)
def test_rules_call_a_client_what_the_command_says(pki: Path, name: str, subject: str) -> None:
    made = cert("client", pki, name)
    assert f'subjects = ["{subject}"]' in made.stdout
    chain = [parse_certificates((pki / f"{name}.pem").read_bytes())[0].public_bytes(Encoding.DER)]
    found = parse_client_certificate(chain, parse_certificates((pki / "ca.pem").read_bytes()))
    assert found is not None
    assert subject_of(found, "san") == subject


def test_an_encrypted_ca_signs_with_its_passphrase_alone(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text(f"{PASSPHRASE}\n")
    (tmp_path / "wrong").write_text("another passphrase\n")
    file = ("--passphrase-file", tmp_path / "passphrase")
    assert cert("ca", tmp_path, *file).exit_code == 0
    assert b"ENCRYPTED" in (tmp_path / "ca-key.pem").read_bytes()
    asked = cert("server", tmp_path)
    assert asked.exit_code == 1
    assert "no terminal" in asked.stderr
    wrong = cert("server", tmp_path, "--ca-passphrase-file", tmp_path / "wrong")
    assert "passphrase is wrong" in wrong.stderr
    signed = cert("server", tmp_path, "--ca-passphrase-file", tmp_path / "passphrase", *file)
    assert signed.exit_code == 0, signed.output
    key = ("--key", tmp_path / "server-key.pem")
    checked = cert("check", tmp_path / "server.pem", *key, *file)
    assert checked.exit_code == 0, checked.output


def test_a_passphrase_is_asked_for_twice_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([PASSPHRASE, PASSPHRASE, PASSPHRASE, "a typing mistake"])
    monkeypatch.setattr(getpass, "getpass", lambda _: next(answers))
    # CliRunner has its own standard input
    monkeypatch.setattr("toppy.cli.cert.has_terminal", lambda: True)
    made = cert("ca", tmp_path, "--encrypt")
    assert made.exit_code == 0, made.output
    assert PASSPHRASE not in made.output
    differ = cert("ca", tmp_path, "--encrypt", "--force")
    assert differ.exit_code == 1
    assert "differ" in differ.stderr
    assert sys.stdin is not None


def test_a_short_passphrase_protects_nothing(tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("short\n")
    refused = cert("ca", tmp_path, "--passphrase-file", tmp_path / "passphrase")
    assert refused.exit_code == 1
    assert "too short" in refused.stderr
    assert not (tmp_path / "ca.pem").exists()


@pytest.mark.parametrize("name", ["ca", "server", "ca-key", "../alice", "", "a b", "-x", "a/b"])
def test_a_clients_name_is_no_other_files(pki: Path, name: str) -> None:
    before = sorted(path.name for path in pki.iterdir())
    refused = cert("client", pki, "--force", "--", name)
    assert refused.exit_code == 1
    assert "name" in refused.stderr
    assert sorted(path.name for path in pki.iterdir()) == before


def test_without_a_ca_the_command_for_one_is_named(tmp_path: Path) -> None:
    refused = cert("server", tmp_path)
    assert refused.exit_code == 1
    assert "toppy-gw cert ca" in refused.stderr


@pytest.mark.parametrize("days", ["0", "40000", "x"])
def test_days_have_bounds(tmp_path: Path, days: str) -> None:
    assert cert("ca", tmp_path, "--days", days).exit_code == 2


def test_a_bad_server_name_is_refused(pki: Path) -> None:
    assert "neither a host name" in cert("server", pki, "--name", "a_b c").stderr
    assert not (pki / "server.pem").exists()


def test_show_says_what_a_person_asks_for(tmp_path: Path) -> None:
    pair = sample(end_days=12.5)
    chain = tmp_path / "chain.pem"
    chain.write_bytes(pair.certificate_pem + authority().certificate_pem)
    shown = cert("show", chain).stdout
    for text in (
        "CN=sample",
        "gw.example",
        "CN=sample CA",
        "ECDSA P-256",
        "12 days left",
        "itself",
    ):
        assert text in shown
    facts = json.loads(cert("show", "--json", chain).stdout)["certificates"]
    assert [each["subject"] for each in facts] == ["CN=sample", "CN=sample CA"]
    assert facts[0]["days_left"] == 12
    assert facts[0]["serial"] == f"{pair.certificate.serial_number:x}"
    assert cert("show", tmp_path / "none.pem").exit_code == 1


def test_a_strangers_name_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "odd.pem"
    path.write_bytes(sample(common_name="a\x1b[31mb").certificate_pem)
    assert "\x1b" not in cert("show", path).stdout
    assert "\x1b" not in cert("check", path).stdout


def test_check_finds_and_says_what_to_do(tmp_path: Path) -> None:
    pair = sample(begin_days=-9, end_days=-1)
    path, key = tmp_path / "c.pem", tmp_path / "k.pem"
    path.write_bytes(pair.certificate_pem)
    key.write_bytes(sample().key_pem)
    key.chmod(0o644)
    checked = cert("check", path, "--key", key, "--name", "other.example", "--json")
    assert checked.exit_code == 1
    facts = json.loads(checked.stdout)
    assert not facts["ok"]
    by_id = {finding["id"]: finding for finding in facts["findings"]}
    failed = {name for name, finding in by_id.items() if finding["status"] == "fail"}
    assert failed == {"key", "dates", "names"}
    assert by_id["key-mode"]["status"] == "warn"
    assert all(finding["remedy"] for finding in by_id.values() if finding["status"] != "pass")


def test_check_looks_at_the_configured_pair(tmp_path: Path) -> None:
    write_development_files(
        tmp_path, listen="127.0.0.1:4433", health="127.0.0.1:8080", names=(), force=False
    )
    config = ("--config", tmp_path / "gateway.toml")
    assert cert("check", *config, "--ca", tmp_path / "ca.pem").exit_code == 0
    (tmp_path / "server.pem").write_bytes(sample().certificate_pem)
    assert cert("check", *config).exit_code == 1
    (tmp_path / "other.toml").write_text('[auth]\ntoken_file = "token"\n')
    refused = cert("check", "--config", tmp_path / "other.toml")
    assert "names no certificate" in refused.stderr
