"""``toppy login``, ``logout``, ``whoami``: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jwt
import pytest
from typer.testing import CliRunner

from toppy.auth.oidc import DeviceAuthorization
from toppy.auth.token_cache import CachedTokens, Protection
from toppy.cli.login import Terminal, run_login
from toppy.cli.toppy import app
from toppy.client.token_store import TokenStore

SECRET = "a secret of at least thirty-two bytes!"
DEVICE = """
gateway = "gw.example"
[auth]
mode = "oidc_device_code"
issuer = "http://127.0.0.1:1"
client_id = "toppy"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "TOPPY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def configure(home: Path, text: str) -> None:
    folder = home / ".config" / "toppy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    (folder / "config.toml").chmod(0o600)


def keep(home: Path, lifetime_s: float = 630) -> str:
    now = time.time()
    token = jwt.encode({"sub": "alice"}, SECRET, "HS256")
    store = TokenStore(
        home / ".config" / "toppy" / "oidc-token.json",
        key_path=home / ".local" / "state" / "toppy" / "device-key",
    )
    kept = CachedTokens(
        "http://127.0.0.1:1",
        "toppy",
        None,
        token,
        "refresh-secret",
        "Bearer",
        "openid",
        now,
        now + lifetime_s,
        "alice",
    )
    store.save(kept, Protection.DEVICE)
    return token


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.stdout, found.stderr


def test_without_a_configuration_or_a_token_nobody_is_logged_in(home: Path) -> None:
    for command in ("login", "logout", "whoami"):
        assert run(command)[0] == 1
    configure(home, 'gateway = "gw.example"\n')
    for command in ("login", "whoami"):
        code, out, said = run(command)
        assert (code, out) == (2, "")
        assert "there is no token" in said


def test_a_token_of_the_configuration_is_printed_only_when_asked_for(home: Path) -> None:
    configure(home, 'gateway = "gw.example"\nauth_token = "sesame"\n')
    code, out, said = run("login")
    assert (code, out) == (0, "")
    assert "sesame" not in said
    assert run("login", "--print-token")[:2] == (0, "sesame\n")


def test_a_provider_that_cannot_be_reached_is_exit_code_3(home: Path) -> None:
    configure(home, DEVICE)
    code, out, said = run("login")
    assert (code, out) == (3, "")
    assert "127.0.0.1:1 cannot be reached" in said


def test_a_login_that_fails_is_in_the_audit_log(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = home / "audit.jsonl"
    monkeypatch.setenv("TOPPY_AUDIT_LOG", str(log))
    configure(home, DEVICE)
    run("login")
    (entry,) = map(json.loads, log.read_text().splitlines())
    event = entry["event"]
    assert (event["action"], event["target"]) == ("login", "http://127.0.0.1:1")
    assert event["allowed"] is False
    assert "127.0.0.1:1" in event["reason"]


def test_an_issuer_without_tls_is_refused_before_anything_is_sent(home: Path) -> None:
    configure(home, DEVICE.replace("127.0.0.1:1", "login.example"))
    code, _, said = run("login")
    assert code == 3
    assert "https://" in said


def test_whoami_says_who_for_what_and_how_long(home: Path) -> None:
    configure(home, DEVICE)
    assert run("whoami")[0] == 2
    token = keep(home)
    code, out, said = run("whoami")
    assert code == 0
    assert out.splitlines()[0] == "alice"
    assert "ends in 10 min, is renewed by itself" in out
    assert "encrypted (device)" in out
    facts = json.loads(run("whoami", "--json")[1])
    assert (facts["subject"], facts["client_id"], facts["protection"]) == (
        "alice",
        "toppy",
        "device",
    )
    for text in (out, said, json.dumps(facts)):
        assert token not in text
        assert "refresh-secret" not in text


def test_whoami_knows_a_jwt_of_the_configuration(home: Path) -> None:
    token = jwt.encode({"sub": "bob", "exp": time.time() - 90}, SECRET, "HS256")
    configure(home, f'gateway = "gw.example"\nauth_token = "{token}"\n')
    code, out, _ = run("whoami")
    assert code == 0
    assert out.splitlines()[0] == "bob"
    assert "ended 1 min ago" in out
    configure(home, 'gateway = "gw.example"\nauth_token = "opaque"\n')
    assert "does not say" in run("whoami")[1]


def test_logging_out_works_without_the_provider(home: Path) -> None:
    configure(home, DEVICE)
    keep(home)
    code, _, said = run("logout")
    assert code == 0
    assert "the provider was not told" in said
    assert "Logged out." in said
    assert run("whoami")[0] == 2
    assert "Nobody was logged in." in run("logout")[2]


def test_a_cache_of_another_machine_can_still_be_left(home: Path) -> None:
    configure(home, DEVICE)
    keep(home)
    (home / ".local" / "state" / "toppy" / "device-key").unlink()
    code, _, said = run("whoami")
    assert code == 1
    assert "toppy login" in said
    assert run("logout")[0] == 0


def test_toppy_udp_says_that_nobody_is_logged_in(home: Path) -> None:
    rule = '[[policy.allow]]\ncidr = "127.0.0.0/8"\nports = [9]\n'
    configure(home, DEVICE + rule)
    code, _, said = run("udp", "--listen", "127.0.0.1:0", "--target", "127.0.0.1:9")
    assert code == 1
    assert "run toppy login" in said


def test_interrupting_a_login_is_no_traceback(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(home, DEVICE)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("toppy.cli.login.login_settings", interrupt)
    environ = {"HOME": str(home)}
    assert run_login(None, environ, prints_token=False, opens_browser=False) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_browser_is_opened_only_where_it_may_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def open_it(url: str) -> bool:
        opened.append(url)
        return True

    monkeypatch.setattr("webbrowser.open", open_it)
    Terminal(opens_browser=False).open_browser("https://a.example/")
    assert not opened
    Terminal(opens_browser=True).open_browser("https://b.example/")
    assert opened == ["https://b.example/"]
    said = capsys.readouterr().err
    assert "https://a.example/" in said
    assert "https://b.example/" in said


def test_a_code_is_shown_with_a_qr_code_where_somebody_can_scan_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = "https://login.example/device?user_code=ABCD"
    found = DeviceAuthorization(
        "secret", "ABCD", "https://login.example/device", complete, 600.0, 5.0
    )
    Terminal(opens_browser=True).show_code(found)
    plain = capsys.readouterr().err
    assert "ABCD" in plain
    assert "10 min" in plain
    assert "\u2588" not in plain
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    Terminal(opens_browser=True).show_code(found)
    shown = capsys.readouterr().err
    assert complete in shown
    assert "\u2588" in shown
    assert "secret" not in plain + shown
