"""``[[forward]]`` entries: which are started by which command, and what keeps them from it."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.client.gateway import write_config
from toppy.cli.output import (
    TcpTraffic,
    Traffic,
    add_tcp_traffic,
    add_traffic,
)
from toppy.cli.toppy import app
from toppy.wire.audit_entry import parse_entry

DEADLINE_S = 20.0
POLICY = """
[[policy.allow]]
cidr = "127.0.0.0/8"
ports = ["1024-65535"]
"""
TCP = '[[forward]]\nlisten = "127.0.0.1:0"\ntarget = "127.0.0.1:5432"\n'
UDP = '[[forward]]\nprotocol = "udp"\nlisten = "127.0.0.1:0"\ntarget = "127.0.0.1:5353"\n'
DIRECT = '[[forward]]\nlisten = "127.0.0.1:0"\ntarget = "127.0.0.1:5433"\ndirect = true\n'


def configured(directory: Path, entries: str) -> Path:
    """No gateway answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return write_config(directory, sock.getsockname(), POLICY + entries)


def invoke(config: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error."""
    result = CliRunner().invoke(app, [*arguments, "--config", str(config)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


def run(config: Path, command: str, lines: int) -> tuple[list[str], str]:
    """Its first lines, then, after SIGTERM, its standard error."""
    program = "from toppy.cli.toppy import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, command, "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], DEADLINE_S)[0], "said nothing"
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, rest) == (0, "")
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    return said, errors


def test_up_starts_every_entry_in_one_process(tmp_path: Path) -> None:
    said, errors = run(configured(tmp_path, TCP + UDP + DIRECT), "up", 3)
    for line, (kind, target) in zip(
        said,
        [("up", "127.0.0.1:5432"), ("udp", "127.0.0.1:5353"), ("up", "127.0.0.1:5433")],
        strict=True,
    ):
        assert line.startswith(f"toppy {kind} listening on 127.0.0.1:")
        assert line.endswith(f" -> {target}\n")
    assert "-> 127.0.0.1:5432: 0 connections, 0 bytes out, 0 bytes in\n" in errors
    assert "-> 127.0.0.1:5353: 0 peers, " in errors
    assert "Traceback" not in errors
    entries = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    actions = [parse_entry(line).event.action for line in entries]
    assert actions == ["up", "udp", "up", "up.closed", "udp.closed", "up.closed"]


def test_udp_starts_those_of_udp(tmp_path: Path) -> None:
    said, errors = run(configured(tmp_path, TCP + UDP), "udp", 1)
    assert said[0].endswith(" -> 127.0.0.1:5353\n")
    assert "0 peers, 0 datagrams (0 bytes) out, 0 datagrams (0 bytes) in" in errors


def test_entries_without_the_gateway_need_no_way_to_it(tmp_path: Path) -> None:
    config = configured(tmp_path, DIRECT)
    (tmp_path / "ca.pem").unlink()
    said, _ = run(config, "up", 1)
    assert said[0].endswith(" -> 127.0.0.1:5433\n")


def test_a_port_that_others_can_reach_is_warned_about(tmp_path: Path) -> None:
    everywhere = DIRECT.replace("127.0.0.1:0", "0.0.0.0:0")
    (line, _), errors = run(configured(tmp_path, everywhere + UDP), "up", 2)
    assert line.startswith("toppy up listening on 0.0.0.0:")
    assert errors.count("everybody who reaches this port uses your credential") == 1
    assert line.split()[4] in errors


@pytest.mark.parametrize(
    ("command", "entries", "part"),
    [
        ("up", "", "[[forward]]"),
        ("udp", TCP, 'protocol = "udp"'),
    ],
)
def test_without_entries_it_says_what_to_write(
    tmp_path: Path, command: str, entries: str, part: str
) -> None:
    code, said = invoke(configured(tmp_path, entries), command)
    assert code == 1
    assert said.startswith(f"toppy {command}: give --listen and --target; ")
    assert part in said


def test_one_that_is_denied_keeps_all_from_starting(tmp_path: Path) -> None:
    code, said = invoke(configured(tmp_path, TCP + TCP.replace("5432", "22")), "up")
    assert code == 2
    assert said.startswith("Policy denied: target 127.0.0.1:22 is not allowed")
    assert f"this client's policy, {tmp_path}" in said
    assert "add a [[policy.allow]] there" in said
    (line,) = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    event = parse_entry(line).event
    assert (event.action, event.target, event.allowed) == ("up", "127.0.0.1:22", False)


def test_a_port_that_is_taken_frees_the_others(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = TCP.replace("127.0.0.1:0", f"127.0.0.1:{port}")
        code, said = invoke(configured(tmp_path, TCP + other), "up")
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--once"),
        ("up", "--direct"),
        ("up", "--listen", "127.0.0.1:0"),
        ("up", "--target", "127.0.0.1:22"),
        ("udp", "--listen", "127.0.0.1:0"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, said = invoke(configured(tmp_path, TCP + UDP), *arguments)
    assert code == (1 if "--once" in arguments else 2)
    assert "--listen" in said


def test_an_entry_that_would_lead_to_itself_is_refused(tmp_path: Path) -> None:
    entry = DIRECT.replace("127.0.0.1:0", "127.0.0.1:5433")
    code, said = invoke(configured(tmp_path, entry), "up")
    assert code == 1
    assert "is where this listens" in said


def test_traffic_of_several_ports_adds_up() -> None:
    udp = Traffic(1, 2, 3, 4, 5, 6, {"queue_full": 7})
    assert add_traffic([udp, udp]) == Traffic(2, 4, 6, 8, 10, 12, {"queue_full": 14})
    tcp = TcpTraffic(1, 2, 3, 4, 5)
    assert add_tcp_traffic([tcp, tcp, TcpTraffic()]) == TcpTraffic(2, 4, 6, 8, 10)
