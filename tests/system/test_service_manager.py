from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toppy.system.service_manager import ServiceManager

Call = Callable[[ServiceManager], None]


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path.replace("@", "\0", 1) if path.startswith("@") else path)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        got = []
        while True:
            try:
                got.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return got


@pytest.fixture(autouse=True)
def no_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["file", "abstract"])
def systemd(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Systemd]:
    path = str(tmp_path / "notify") if request.param == "file" else f"@toppy-{uuid.uuid4()}"
    listening = Systemd(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    yield listening
    listening.socket.close()


@pytest.fixture
def manager(systemd: Systemd) -> Iterator[ServiceManager]:
    made = ServiceManager(clock=lambda: 12.5)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (ServiceManager.ready, "READY=1"),
        (ServiceManager.reloading, "RELOADING=1\nMONOTONIC_USEC=12500000"),
        (ServiceManager.stopping, "STOPPING=1"),
        (ServiceManager.watchdog, "WATCHDOG=1"),
    ],
)
def test_each_call_is_one_message(
    manager: ServiceManager, systemd: Systemd, call: Call, message: str
) -> None:
    call(manager)
    assert systemd.heard() == [message]


def test_a_status_is_one_line_of_ascii(manager: ServiceManager, systemd: Systemd) -> None:
    manager.status("2 workers\nREADY=1\r\n… 3 tunnels")
    assert systemd.heard() == ["STATUS=2 workers READY=1 ? 3 tunnels"]


def test_without_a_service_manager_everything_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    manager = ServiceManager()
    assert not manager.is_present
    assert manager.watchdog_interval_s() is None
    for call in (manager.ready, manager.reloading, manager.stopping, manager.watchdog):
        call()
    manager.status("serving")
    manager.close()


def test_a_service_manager_that_is_gone_is_no_error(
    manager: ServiceManager, systemd: Systemd
) -> None:
    systemd.socket.close()
    manager.ready()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_is_not_there_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    manager = ServiceManager()
    assert not manager.is_present
    manager.ready()


def test_after_close_nothing_is_said(manager: ServiceManager, systemd: Systemd) -> None:
    manager.close()
    manager.ready()
    assert systemd.heard() == []
    assert not manager.is_present


@pytest.mark.parametrize(
    ("microseconds", "meant_for", "interval_s"),
    [
        ("10000000", None, 5.0),
        ("10000000", "this process", 5.0),
        ("10000000", "1", None),
        ("10000000", "nonsense", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_the_manager_asks(
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
    microseconds: str | None,
    meant_for: str | None,
    interval_s: float | None,
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", meant_for)):
        if value is not None:
            monkeypatch.setenv(name, str(os.getpid()) if value == "this process" else value)
    manager = ServiceManager()
    assert manager.watchdog_interval_s() == interval_s
    manager.close()
