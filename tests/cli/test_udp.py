"""``toppy udp``: its order of things, its texts, its exit codes and its signals."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.client.gateway import write_config
from toppy.cli import forward_entries, forwards
from toppy.cli.toppy import app
from toppy.quic import choose
from toppy.quic.choose import SLOW_ENGINE_NOTICE
from toppy.quic.engine import Address

DEADLINE_S = 20.0
POLICY = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53]\n'
ALLOWED = "10.0.0.1:53"


@pytest.fixture
def nobody() -> Iterator[Address]:
    """Where no gateway answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()


@pytest.fixture
def config(tmp_path: Path, nobody: Address) -> Path:
    return write_config(tmp_path, nobody, POLICY)


# inside this process


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(forward_entries, "bind_udp", refuse)


def invoke(config: Path, *, listen: str = "127.0.0.1:0", target: str = ALLOWED) -> tuple[int, str]:
    """Exit code and standard error; nothing is said on standard output."""
    arguments = ["udp", "--config", str(config), "--listen", listen, "--target", target]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("target", ["10.0.0.1:54", "11.0.0.1:53", "[2001:db8::1]:53"])
def test_a_denied_target_exits_with_2_before_a_socket_is_opened(config: Path, target: str) -> None:
    code, said = invoke(config, target=target)
    assert code == 2
    assert said.startswith(f"Policy denied: target {target} is not allowed")


@pytest.mark.usefixtures("no_sockets")
def test_the_policy_is_asked_before_the_ca_file_is_read(config: Path) -> None:
    (config.parent / "ca.pem").unlink()
    assert invoke(config, target="10.0.0.1:54")[0] == 2
    code, said = invoke(config)
    assert code == 1
    assert "ca_cert_path" in said


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"listen": "nonsense"}, "--listen"),
        ({"listen": "::1:53"}, "--listen"),
        ({"target": "10.0.0.1:0"}, "--target"),
        ({"target": "127.1:53"}, "--target"),
    ],
)
def test_a_bad_argument_is_named_and_exits_with_1(
    config: Path, changes: dict[str, str], part: str
) -> None:
    code, said = invoke(config, **changes)
    assert code == 1
    assert said.startswith(f"toppy udp: {part}")


@pytest.mark.usefixtures("no_sockets")
def test_a_bad_configuration_is_named_and_exits_with_1(config: Path) -> None:
    config.write_text("gateway = 1\nunknown = 2\n")
    code, said = invoke(config)
    assert code == 1
    assert said.startswith("toppy udp: ")
    assert "unknown" in said


@pytest.mark.usefixtures("no_sockets")
def test_an_engine_that_is_not_there_exits_with_1(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "has_native_engine", lambda: False)
    monkeypatch.setenv("TOPPY_QUIC_ENGINE", "native")
    code, said = invoke(config)
    assert code == 1
    assert "quic.engine" in said


def test_an_address_that_is_taken_or_not_ours_exits_with_1(config: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        code, said = invoke(config, listen=f"127.0.0.1:{port}")
        assert code == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    code, said = invoke(config, listen="192.0.2.1:5353")
    assert code == 1
    assert "cannot listen on 192.0.2.1:5353" in said


def test_warnings_and_the_slow_engine_are_told_on_standard_error(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Coroutine[Any, Any, int]) -> int:
        command.close()
        return 0

    monkeypatch.setattr("toppy.cli.forwards.uvloop.run", run)
    monkeypatch.setattr(forwards, "set_process_title", lambda _: None)
    monkeypatch.setattr(choose, "has_native_engine", lambda: False)
    monkeypatch.delenv("TOPPY_QUIC_ENGINE", raising=False)
    config.chmod(0o644)
    code, said = invoke(config)
    assert code == 0
    assert "chmod 600" in said
    assert SLOW_ENGINE_NOTICE in said
    assert "the-token" not in said


# as a process of its own


@contextmanager
def running(config: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """``toppy udp`` after its first line. Standard output and error are pipes."""
    program = "from toppy.cli.toppy import main; main()"
    arguments = ["udp", "--config", str(config), "--listen", "127.0.0.1:0", "--target", ALLOWED]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        **{"stderr": subprocess.PIPE, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], DEADLINE_S)[0], "said nothing"
    return process.stdout.readline()


def listening_at(line: str) -> Address:
    prefix, _, rest = line.partition(" 127.0.0.1:")
    port, _, target = rest.partition(" -> ")
    assert prefix == "toppy udp listening on"
    assert target == f"{ALLOWED}\n"
    return "127.0.0.1", int(port)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_it_listens_without_a_gateway_and_a_signal_ends_it_with_counts(
    config: Path, signal_number: signal.Signals
) -> None:
    with running(config) as process:
        listening_at(first_line(process))
        process.send_signal(signal_number)
        out, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert out == ""
    assert "0 peers, 0 datagrams (0 bytes) out, 0 datagrams (0 bytes) in" in said
    assert "Traceback" not in said


def test_a_second_signal_ends_it_at_once(config: Path) -> None:
    with running(config) as process:
        first_line(process)
        process.send_signal(signal.SIGSTOP)  # so that both are seen together
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE_S) == 130


def test_no_argument_and_no_secret_is_in_the_process_title(config: Path) -> None:
    with running(config) as process:
        host, port = listening_at(first_line(process))
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    assert shown == f"toppy udp: {host}:{port} -> {ALLOWED}"


def test_on_a_terminal_there_is_a_live_line_and_no_log(config: Path) -> None:
    master, slave = os.openpty()
    try:
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        with running(config, stderr=slave, env=environ) as process:
            first_line(process)
            shown = read_until(master, b" peers, out ")
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)
            assert process.returncode == 0
            shown += read_until(master, b"datagrams (0 bytes) in")
        assert b"connecting" in shown or b"waiting" in shown
        assert b'"event"' not in shown
    finally:
        os.close(slave)
        os.close(master)


def read_until(terminal: int, text: bytes) -> bytes:
    """What a terminal shows, until it has shown ``text``."""
    shown, end = b"", time.monotonic() + DEADLINE_S
    while text not in shown:
        left = end - time.monotonic()
        assert left > 0, shown
        if select.select([terminal], [], [], left)[0]:
            shown += os.read(terminal, 65536)
    return shown
