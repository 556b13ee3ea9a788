"""``toppy up``: its order of things, its texts, its exit codes and its signals."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from toppy.cli import forward_entries as up_module
from toppy.cli.output import TcpTraffic, describe_tcp, summarize_tcp
from toppy.cli.session_shell import always_rate
from toppy.cli.toppy import app
from toppy.config.client import parse_client_config
from toppy.model.audit_event import AuditEvent, parse_facts
from toppy.model.rate import UNLIMITED, DirectionLimits, Rate
from toppy.wire.audit_entry import parse_entry

DEADLINE_S = 20.0
POLICY = """
[[policy.allow]]
cidr = ["127.0.0.0/8", "10.0.0.0/8"]
ports = ["1024-65535"]
protocol = "tcp"
"""
ALLOWED = "10.0.0.1:3389"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(f'gateway = "gw.example"\n{POLICY}')
    return path


# inside this process


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(up_module, "listen_tcp", refuse)


def invoke(
    config: Path, *options: str, listen: str = "127.0.0.1:0", target: str = ALLOWED
) -> tuple[int, str]:
    """Exit code and standard error; nothing is said on standard output."""
    arguments = ["up", "--config", str(config), "--listen", listen, "--target", target]
    result = CliRunner().invoke(app, [*arguments, *(options or ("--direct",))])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("target", ["10.0.0.1:1023", "11.0.0.1:3389", "[2001:db8::1]:3389"])
def test_a_denied_target_exits_with_2_before_a_socket_is_opened(config: Path, target: str) -> None:
    code, said = invoke(config, target=target)
    assert code == 2
    assert said.startswith(f"Policy denied: target {target} is not allowed")


@pytest.mark.usefixtures("no_sockets")
def test_a_rule_for_udp_allows_no_tcp(config: Path) -> None:
    config.write_text(config.read_text().replace('"tcp"', '"udp"'))
    code, said = invoke(config)
    assert code == 2
    assert "is not allowed" in said


@pytest.mark.usefixtures("no_sockets")
def test_a_denial_is_in_the_audit_log(config: Path, tmp_path: Path) -> None:
    invoke(config, target="11.0.0.1:3389")
    (entry,) = audit_events(tmp_path / "audit.jsonl")
    assert (entry.action, entry.target, entry.allowed) == ("up", "11.0.0.1:3389", False)
    assert "not allowed" in (entry.reason or "")


def audit_events(path: Path) -> list[AuditEvent]:
    return [parse_entry(line).event for line in path.read_bytes().splitlines()]


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"listen": "nonsense"}, "--listen"),
        ({"listen": "::1:53"}, "--listen"),
        ({"listen": ":5353"}, "--listen: ':5353' names no address; write 127.0.0.1:5353"),
        ({"listen": " :0"}, "--listen: ' :0' names no address"),
        ({"target": "10.0.0.1:0"}, "--target"),
        ({"target": "127.1:53"}, "--target"),
    ],
)
def test_a_bad_argument_is_named_and_exits_with_1(
    config: Path, changes: dict[str, str], part: str
) -> None:
    code, said = invoke(config, **changes)
    assert code == 1
    assert said.startswith(f"toppy up: {part}")


@pytest.mark.usefixtures("no_sockets")
def test_a_port_that_would_lead_to_itself_is_refused(config: Path) -> None:
    code, said = invoke(config, listen="127.0.0.1:3389", target="127.0.0.1:3389")
    assert code == 1
    assert "is where this listens" in said


@pytest.mark.usefixtures("no_sockets")
def test_a_bad_configuration_is_named_and_exits_with_1(config: Path) -> None:
    config.write_text("gateway = 1\nunknown = 2\n")
    code, said = invoke(config)
    assert code == 1
    assert said.startswith("toppy up: ")
    assert "unknown" in said


def test_an_address_that_is_taken_or_not_ours_exits_with_1(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = invoke(config, listen=f"127.0.0.1:{port}")
        assert code == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    code, said = invoke(config, listen="192.0.2.1:5353")
    assert code == 1
    assert "cannot listen on 192.0.2.1:5353" in said


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ("", Rate(10 << 20, 10 << 20)),
        ("[rate]\nbytes_per_sec = 1000", Rate(1000, 1000)),
        ("[rate]\nbytes_per_sec = 1000\nburst_bytes = 5", Rate(1000, 5)),
        ("[rate]\nbytes_per_sec = 0\nburst_bytes = 0", UNLIMITED),
        ("[rate]\nbytes_per_sec = 0", UNLIMITED),
    ],
)
def test_the_rate_is_the_configurations(rate: str, expected: Rate) -> None:
    config = parse_client_config(f'gateway = "gw"\n{rate}', "c.toml", {})
    assert always_rate(config) == DirectionLimits(bytes=expected)


def test_traffic_is_told_in_one_line() -> None:
    before = TcpTraffic(1, 1, 0, 0, 0)
    traffic = TcpTraffic(open=2, connections=3, failures=1, out_bytes=1000, back_bytes=2_000_000)
    assert summarize_tcp(before) == "1 connections, 0 bytes out, 0 bytes in"
    assert summarize_tcp(traffic) == "3 connections, 1000 bytes out, 2000000 bytes in, 1 failed"
    assert (
        describe_tcp(traffic, before, 0.5, "refused")
        == "2 open, out 16 kbit/s, in 32 Mbit/s, 1 failed · refused"
    )


# as a process of its own


@contextmanager
def echo_target() -> Iterator[int]:
    """Echoes every connection to its end; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo(sock: socket.socket) -> None:
            with sock, suppress(ConnectionResetError):
                while data := sock.recv(65536):
                    sock.sendall(data)

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(sock,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(
    config: Path, target: str, *options: str, **how: Any
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``toppy up --direct`` after its first line, and its port."""
    program = "from toppy.cli.toppy import main; main()"
    arguments = ["up", "--config", str(config), "--listen", "127.0.0.1:0", "--target", target]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--direct", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        **{"stderr": subprocess.PIPE, **how},
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], DEADLINE_S)[0], "said nothing"
        line = process.stdout.readline()
        prefix, _, rest = line.partition(" 127.0.0.1:")
        port, _, shown = rest.partition(" -> ")
        assert prefix == "toppy up listening on"
        assert shown == f"{target}\n"
        yield process, int(port)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def talk(port: int, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_connections_are_carried_until_a_signal_ends_it_with_counts(
    config: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    with echo_target() as target, running(config, f"127.0.0.1:{target}") as (process, port):
        for number in range(3):
            assert talk(port, b"hello %d" % number) == b"hello %d" % number
        process.send_signal(signal_number)
        out, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert out == ""
    assert "3 connections, 21 bytes out, 21 bytes in" in said
    assert "Traceback" not in said
    began, ended = audit_events(tmp_path / "audit.jsonl")
    assert (began.action, began.allowed) == ("up", True)
    assert parse_facts(f"; {began.reason}")[1] == {"listen": f"127.0.0.1:{port}"}
    assert ended.action == "up.closed"
    sentence, facts = parse_facts(ended.reason or "")
    assert sentence == "told to stop"
    assert (facts["connections"], facts["bytes_out"], facts["bytes_in"]) == ("3", "21", "21")


def test_a_connection_that_is_open_at_the_end_is_reset(config: Path) -> None:
    with echo_target() as target, running(config, f"127.0.0.1:{target}") as (process, port):
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                sock.recv(5)
        assert process.wait(DEADLINE_S) == 0


def test_once_serves_one_connection_and_exits_with_0(config: Path) -> None:
    with (
        echo_target() as target,
        running(config, f"127.0.0.1:{target}", "--once") as (process, port),
    ):
        assert talk(port, b"hello") == b"hello"
        assert process.wait(DEADLINE_S) == 0


def test_once_without_a_target_exits_with_1_and_says_why(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = f"127.0.0.1:{gone.getsockname()[1]}"
    with running(config, target, "--once") as (process, port):
        with pytest.raises(ConnectionResetError):
            talk(port, b"hello")
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "the target refused the connection" in said


def test_a_second_signal_ends_it_at_once(config: Path) -> None:
    with running(config, ALLOWED) as (process, _):
        process.send_signal(signal.SIGSTOP)  # so that both are seen together
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE_S) == 130


def test_the_process_title_says_what_it_does(config: Path) -> None:
    with running(config, ALLOWED) as (process, port):
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    assert shown == f"toppy up: 127.0.0.1:{port} -> {ALLOWED}"


def test_on_a_terminal_there_is_a_live_line_and_no_log(config: Path) -> None:
    master, slave = os.openpty()
    try:
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        with running(config, ALLOWED, stderr=slave, env=environ) as (process, _):
            shown = read_until(master, b" open, out ")
            process.send_signal(signal.SIGINT)
            process.wait(DEADLINE_S)
            assert process.returncode == 0
            shown += read_until(master, b"0 bytes in")
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
