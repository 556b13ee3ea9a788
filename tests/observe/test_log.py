from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from toppy.observe.log import REDACTED, configure_logging, get_logger, redact

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLXNpZ25hdHVyZQ"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


class Captured:
    """Everything written to standard error in this test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Captured:
    return Captured(capsys)


def lines(stream: Captured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_json_has_event_fields_and_who_says_it(stderr: Captured) -> None:
    configure_logging("info", "json", process="worker")
    get_logger("router").info("tunnel opened", slot=1, rule="lan")
    (line,) = lines(stderr)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "tunnel opened",
        "level": "info",
        "logger": "router",
        "process": "worker",
        "rule": "lan",
        "slot": 1,
    }


def test_a_logger_made_before_configuration_follows_it(stderr: Captured) -> None:
    log = get_logger("early")
    configure_logging("warning", "json", process="control")
    log.info("hidden")
    log.warning("shown")
    assert [line["event"] for line in lines(stderr)] == ["shown"]


def test_bound_fields_are_on_every_line(stderr: Captured) -> None:
    configure_logging("info", "json", process="worker")
    log = get_logger("worker").bind(slot=1, generation=3)
    log.info("worker serves")
    (line,) = lines(stderr)
    assert (line["slot"], line["generation"]) == (1, 3)


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_what_is_below_the_level_is_not_shown(
    stderr: Captured, level: str, shown: list[str]
) -> None:
    configure_logging(level, "json", process="client")
    log = get_logger("x")
    for method in (log.debug, log.info, log.warning, log.error):
        method("said")
    assert [line["level"] for line in lines(stderr)] == shown


def test_auto_is_json_unless_standard_error_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stderr: Captured
) -> None:
    configure_logging("info", "auto", process="client")
    get_logger("x").info("said")
    assert lines(stderr)[0]["event"] == "said"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging("info", "auto", process="client")
    get_logger("x").info("said", slot=1)
    with pytest.raises(json.JSONDecodeError):
        json.loads(terminal.getvalue())
    assert "said" in terminal.getvalue()


def test_the_console_has_one_line_without_colours_when_it_is_a_file(stderr: Captured) -> None:
    configure_logging("info", "console", process="client")
    get_logger("session").info("connected", gateway="gw.test:4433")
    text = stderr.getvalue()
    assert text.count("\n") == 1
    assert "\x1b" not in text
    for part in ("connected", "gateway=gw.test:4433", "process=client", "[session]"):
        assert part in text


# secrets


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "auth_token",
        "Authorization",
        "secret",
        "client_secret",
        "password",
        "passwd",
        "cookie",
        "jwt",
        "private_key",
        "reset_key",
        "signing_key_pem",
    ],
)
@pytest.mark.parametrize("format_", ["json", "console"])
def test_the_value_of_a_secret_name_is_hidden(stderr: Captured, name: str, format_: str) -> None:
    configure_logging("info", format_, process="control")
    log = get_logger("x")
    log.info("said", **{name: "hunter2"})
    log.info("said", details={name: b"hunter2", "other": [{name: "hunter2"}]})
    assert "hunter2" not in stderr.getvalue()
    assert stderr.getvalue().count(REDACTED) == 3


@pytest.mark.parametrize(
    "text",
    [
        "header was Bearer hunter2",
        "header was bearer   hunter2, and more",
        b"Bearer hunter2",
        ["x", ("authorization: Bearer hunter2",)],
        {"headers": "Bearer hunter2"},
    ],
)
def test_a_secret_inside_a_text_is_hidden(stderr: Captured, text: object) -> None:
    configure_logging("info", "json", process="control")
    get_logger("x").info("said", reason=text)
    assert "hunter2" not in stderr.getvalue()


def test_a_jwt_is_hidden_wherever_it_stands(stderr: Captured) -> None:
    configure_logging("info", "json", process="control")
    get_logger("x").warning(f"bad token {JWT}", error=ValueError(f"cannot parse {JWT}"))
    logging.getLogger("library").error("refused %s", JWT)
    assert stderr.getvalue().count(REDACTED) == 3
    for part in JWT.split("."):
        assert part not in stderr.getvalue()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_traceback_shows_neither_variables_nor_secrets(stderr: Captured, format_: str) -> None:
    configure_logging("info", format_, process="control")
    local_variable = "-".join(["hunter", "2"])
    try:
        raise ValueError(f"cannot parse Bearer {JWT}")
    except ValueError:
        get_logger("x").exception("failed")
    text = stderr.getvalue()
    assert "ValueError" in text
    assert local_variable not in text
    assert JWT not in text


def test_flags_about_secrets_are_shown() -> None:
    event = redact(None, "info", {"event": "x", "has_token": True, "token": None})
    assert event == {"event": "x", "has_token": True, "token": None}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_any_value_can_be_redacted_and_logged(value: object) -> None:
    event = redact(None, "info", {"event": "x", "value": value, "token": "hunter2"})
    assert event["token"] == REDACTED
    json.dumps(event, default=str)


def test_a_value_that_contains_itself_ends() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert "…" in str(redact(None, "info", {"value": loop}))


# what a peer may have chosen


@pytest.mark.parametrize("format_", ["json", "console"])
def test_control_characters_reach_no_terminal_and_fake_no_line(
    stderr: Captured, format_: str
) -> None:
    configure_logging("info", format_, process="control")
    nasty = "x\x1b[2J\x9b31m\r\nfake line\x7f"
    get_logger("x").info("said", reason=nasty, details=[nasty], **{"na\x1bme": "y"})
    logging.getLogger("library").warning("%s", nasty)
    text = stderr.getvalue()
    assert text.count("\n") == 2
    assert not {"\x1b", "\x9b", "\r"} & set(text)


# libraries


def test_a_librarys_warnings_look_like_ours(stderr: Captured) -> None:
    configure_logging("debug", "json", process="control")
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("port %d is odd", 7)
    (line,) = lines(stderr)
    line.pop("time")
    assert line == {
        "event": "port 7 is odd",
        "level": "warning",
        "logger": "uvicorn.error",
        "process": "control",
    }


def test_a_librarys_traceback_is_a_field(stderr: Captured) -> None:
    configure_logging("info", "json", process="control")
    try:
        raise ValueError("oops")
    except ValueError:
        logging.getLogger("library").exception("failed")
    (line,) = lines(stderr)
    assert "ValueError: oops" in line["exception"]


def test_configuring_twice_does_not_say_things_twice(stderr: Captured) -> None:
    configure_logging("info", "json", process="control")
    configure_logging("info", "json", process="control")
    logging.getLogger("library").warning("once")
    get_logger("x").info("once")
    assert len(lines(stderr)) == 2


class Gone(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_reader_that_went_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    configure_logging("info", "json", process="control")
    get_logger("x").info("said")
    logging.getLogger("library").warning("said")


def test_a_closed_standard_error_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("info", "auto", process="control")
    get_logger("x").info("said")
