"""What the commands of a session tell of what goes wrong."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from toppy.cli import session_shell
from toppy.cli.forward_entries import TcpEntry, Wanted
from toppy.cli.session_shell import Notices
from toppy.client.audit import ClientAudit
from toppy.errors import ConfigError, DeniedError, TargetError, ToppyError
from toppy.model.target import Target


@pytest.fixture
def notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notices:
    # an hour: no line is due again during a test
    monkeypatch.setattr(session_shell, "_PROBLEM_INTERVAL_S", 3600.0)
    return Notices(ClientAudit(tmp_path / "audit.jsonl", "ann", None, None), is_quiet=False)


def test_each_target_and_reason_is_logged_once_in_an_interval(notices: Notices) -> None:
    with capture_logs() as lines:
        for _ in range(3):
            notices.on_refused("a:1", "no route", peer="127.0.0.1:5", status=502)
            notices.on_refused("b:1", "no route", status=502)
            notices.on_refused("a:1", "denied")
    said = [(line["target"], line["reason"]) for line in lines]
    assert said == [("a:1", "no route"), ("b:1", "no route"), ("a:1", "denied")]


def test_what_is_not_known_has_no_field(notices: Notices) -> None:
    with capture_logs() as lines:
        notices.on_refused("a:1", "denied")
        notices.on_refused("b:1", "no route", peer="127.0.0.1:5", status=502)
        notices.on_reset("", "too many")
    event, level = "event", "log_level"
    assert set(lines[0]) == {event, level, "target", "reason"}
    assert set(lines[1]) == {event, level, "target", "reason", "address", "status"}
    assert set(lines[2]) == {event, level, "reason"}


def test_more_targets_than_the_table_holds_share_one_line(notices: Notices) -> None:
    with capture_logs() as lines:
        for number in range(300):
            notices.on_refused(f"a:{number}", "denied")
    assert len(lines) == session_shell._MOST_PROBLEMS + 1
    assert len(notices._next_lines) == session_shell._MOST_PROBLEMS


@pytest.mark.parametrize(
    ("error", "is_direct", "status"),
    [
        (TargetError("it is off", status=504), False, 504),
        (DeniedError("no rule"), False, 403),
        (TargetError("it is off", status=504), True, None),
        (ConfigError("what is this"), False, None),
    ],
)
def test_a_refused_connection_is_logged_with_the_gateways_status(
    notices: Notices, error: ToppyError, is_direct: bool, status: int | None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as local, capture_logs() as lines:
        entry = TcpEntry(Wanted(("127.0.0.1", 0), Target("10.0.0.1", 22, "tcp"), is_direct), local)
        entry._notices = notices
        entry._on_refused("127.0.0.1:5", error)
    (line,) = lines
    assert line.get("status") == status
