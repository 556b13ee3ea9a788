"""``toppy audit`` and ``toppy-gw audit``: what they print and how they exit."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.observe.audit_place import KEY, Place
from toppy.cli import audit_log, toppy, toppy_gw
from toppy.model.audit_event import AuditEvent

runner = CliRunner()
SIGNING_KEY = KEY.key.decode()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The client's own log."""
    for name in ("TOPPY_CONFIG", "HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    place = Place(tmp_path / "own")
    monkeypatch.setenv("TOPPY_AUDIT_LOG", str(place.path))
    monkeypatch.setenv("TOPPY_AUDIT_SIGNING_KEY", SIGNING_KEY)
    monkeypatch.setenv("USER", "alice")
    return place


def audit(*arguments: str) -> Result:
    return runner.invoke(toppy.app, ["audit", *arguments])


def gateway_config(tmp_path: Path, extra: str = "") -> str:
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[auth]\ntoken = "long-enough"\n[audit]\npath = "audit.jsonl"\n'
        f'signing_key = "{SIGNING_KEY}"\n{extra}'
    )
    return str(path)


def test_verify_says_ok_and_is_recorded_itself(place: Place) -> None:
    place.write([1, 2])
    result = audit("verify")
    assert (result.exit_code, result.stdout) == (0, f"audit ok: {place.path}\n")
    assert place.entries()[-1].event == AuditEvent("alice", "audit.verify", str(place.path), True)
    assert audit("verify").exit_code == 0


def test_verify_says_line_and_cause(place: Place) -> None:
    place.write([1, 2, 3])
    place.path.write_bytes(place.path.read_bytes().replace(b"192.0.2.1:2", b"192.0.2.1:4"))
    result = audit("verify")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"audit invalid: {place.path}: line 2: hash mismatch")
    facts = json.loads(audit("verify", "--json").stdout)
    assert facts["ok"] is False
    assert facts["error"].startswith("line 2: hash mismatch")


def test_verify_of_no_log_fails_and_makes_none(place: Place) -> None:
    result = audit("verify")
    assert (result.exit_code, result.stdout) == (
        1,
        f"audit invalid: {place.path}: there is no such log\n",
    )
    assert not place.path.exists()


def test_verify_takes_another_path_and_another_key(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    other.write([1])
    path = str(other.path)
    assert audit("verify", "--path", path).exit_code == 0
    result = audit("verify", "--path", path, "--signing-key", "wrong")
    assert result.exit_code == 1
    assert "line 1: signature mismatch" in result.stdout
    assert len(other.entries()) == 1
    assert not place.path.exists()


def test_unsigned_entries_are_accepted_when_asked(place: Place) -> None:
    place.set(signer=None)
    place.write([1])
    assert "signature missing" in audit("verify").stdout
    place.set(signer=None)
    result = audit("verify", "--allow-unsigned")
    assert result.exit_code == 0, result.output


def test_a_public_key_verifies_without_a_secret(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.wire.test_audit_entry import ED25519

    monkeypatch.delenv("TOPPY_AUDIT_SIGNING_KEY")
    place.set(signer=ED25519)
    place.write([1, 2])
    pem = tmp_path / "public.pem"
    pem.write_text(ED25519.verifier.pem())
    assert "no key was given" in audit("verify", "--path", str(place.path)).stdout
    path = str(place.path)
    result = audit("verify", "--path", path, "--public-key", str(pem), "--every-signature")
    assert result.exit_code == 0, result.output
    pem.write_text("not a key")
    assert audit("verify", "--public-key", str(pem)).exit_code == 1


def test_tail_shows_the_last_entries_across_files(place: Place) -> None:
    place.set(rotate_bytes=800)
    place.write(range(6))
    shown = audit("tail", "-n", "4").stdout.splitlines()
    assert [line.split()[1] for line in shown] == ["3", "4", "5", "6"]
    assert shown[-1].endswith("udp  allowed  192.0.2.1:5  by alice")
    assert shown[-1].startswith("2023-11-14T22:13:20.000Z")
    raw = audit("tail", "-n", "2", "--json").stdout.encode().splitlines()
    assert raw == place.path.read_bytes().splitlines()[-2:]


def test_tail_sends_no_control_characters_to_a_terminal(place: Place) -> None:
    log = place.open()
    log.append([(0, AuditEvent("a", "udp", "t", False, "s", "\x1b[2J\nfake"))])
    log.close()
    assert audit("tail").stdout.endswith("DENIED  t  by a (s): \\x1b[2J\\x0afake\n")


def test_export_is_a_table_with_the_facts_apart(place: Place) -> None:
    log = place.open()
    log.append([(0, AuditEvent("=1+1", "udp", "t", True, None, "told to stop; peers=2 drops=0"))])
    log.close()
    (row,) = csv.DictReader(io.StringIO(audit("export").stdout))
    assert (row["reason"], row["facts"]) == ("told to stop", "peers=2 drops=0")
    assert row["actor"] == "'=1+1"  # no formula
    (found,) = json.loads(audit("export", "--format", "json").stdout)
    assert found["facts"] == {"peers": "2", "drops": "0"}
    assert found["actor"] == "=1+1"
    assert json.loads(audit("export", "-f", "jsonl").stdout) == found


def test_export_takes_a_part(place: Place, tmp_path: Path) -> None:
    log = place.open()
    for day in (1, 2, 3):
        ms = 1_700_000_000_000 + day * 86_400_000
        log.append([(ms, AuditEvent("a", f"action.{day}", "t", day != 2))])
    log.close()

    def seqs(*options: str) -> list[int]:
        result = audit("export", "-f", "json", *options)
        assert result.exit_code == 0, result.output
        return [row["seq"] for row in json.loads(result.stdout)]

    assert seqs() == [1, 2, 3]
    assert seqs("--since", "2023-11-16") == [2, 3]
    assert seqs("--until", "2023-11-16T22:13:20+00:00") == [1]
    assert seqs("--action", "action.1", "--action", "action.3") == [1, 3]
    assert seqs("--denied") == [2]
    assert seqs("--since", "2030-01-01") == []
    assert audit("export", "--since", "yesterday").exit_code == 2
    target = tmp_path / "out.csv"
    assert audit("export", "--output", str(target)).exit_code == 0
    assert len(target.read_text().splitlines()) == 4


def test_ship_and_remote_verify_need_to_know_where(place: Place) -> None:
    place.write([1])
    for command in ("ship", "remote-verify"):
        result = audit(command)
        assert result.exit_code == 1
        assert "--url" in result.stderr


def test_ship_says_what_is_wrong_with_the_collector(place: Place) -> None:
    place.write([1])
    result = audit("ship", "--url", "http://127.0.0.1:1/")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr


def test_the_gateway_has_the_same_commands_on_its_own_log(tmp_path: Path) -> None:
    config = gateway_config(tmp_path)
    place = Place(tmp_path)
    place.write([1, 2])
    verified = runner.invoke(toppy_gw.app, ["audit", "verify", "--config", config])
    assert (verified.exit_code, verified.stdout) == (0, f"audit ok: {place.path}\n")
    assert len(place.entries()) == 2  # one writer: the control plane
    tail = runner.invoke(toppy_gw.app, ["audit", "tail", "--config", config])
    assert len(tail.stdout.splitlines()) == 2
    path = str(place.path)
    by_path = runner.invoke(toppy_gw.app, ["audit", "verify", "--path", path, "--config", config])
    assert by_path.exit_code == 0


def test_checkpoints_elsewhere_are_found(tmp_path: Path) -> None:
    config = gateway_config(tmp_path, 'checkpoint_path = "elsewhere/marks"\n')
    place = Place(tmp_path)
    place.set(checkpoints=tmp_path / "elsewhere" / "marks")
    place.write([1, 2])
    place.path.write_bytes(place.path.read_bytes().splitlines(keepends=True)[0])
    result = runner.invoke(toppy_gw.app, ["audit", "verify", "--config", config])
    assert "truncated" in result.stdout


def test_a_gateway_without_a_log_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    path = tmp_path / "gateway.toml"
    path.write_text('[auth]\ntoken = "long-enough"\n')
    result = runner.invoke(toppy_gw.app, ["audit", "tail", "--config", str(path)])
    assert result.exit_code == 1
    assert "audit.path" in result.stderr
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    Place(tmp_path / "state").write([1])
    result = runner.invoke(toppy_gw.app, ["audit", "tail", "--config", str(path)])
    assert result.exit_code == 0, result.stderr


def test_the_services_log_is_found_without_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text('[auth]\ntoken = "long-enough"\n')
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setattr(audit_log, "SYSTEM_STATE_DIRECTORY", str(tmp_path / "state"))
    for system, code in ((tmp_path / "another.toml", 1), (config, 1)):
        monkeypatch.setattr(audit_log, "SYSTEM_CONFIG", str(system))
        result = runner.invoke(toppy_gw.app, ["audit", "verify", "--config", str(config)])
        assert result.exit_code == code
        assert "has no audit log" in result.stderr
    place = Place(tmp_path / "state")
    place.write([1])
    result = runner.invoke(
        toppy_gw.app,
        ["audit", "verify", "--signing-key", SIGNING_KEY, "--config", str(config)],
    )
    assert (result.exit_code, result.stdout) == (0, f"audit ok: {place.path}\n")


def test_a_hundred_thousand_entries_verify_with_a_progress_bar_on_a_terminal(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.set(rotate_bytes=16 << 20, fsync="never")
    log = place.open()
    for first in range(0, 100_000, 1000):
        place.append(log, *range(first, first + 1000))
    log.close()
    assert len(place.names()) > 1
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "w") as stderr:
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
        done = subprocess.run(
            [sys.executable, "-c", "from toppy.cli.toppy import main; main()", "audit", "verify"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "TERM": "xterm"},
        )
        shown = os.read(terminal.fileno(), 1 << 20).decode("utf-8", "replace")
    assert (done.returncode, done.stdout) == (0, f"audit ok: {place.path}\n")
    assert "verifying" in shown
    assert "%" in shown
    # one entry is wrong, far from both ends
    file = place.directory / place.names()[0]
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"192.0.2.1:40000"', b'"192.0.2.1:40001"', 1))
    result = audit("verify")
    assert result.exit_code == 1
    assert "line 40001: hash mismatch" in result.stdout
