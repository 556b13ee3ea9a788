"""``toppy proxy``, ``ssh-proxy`` and ``exec``: arguments, texts, exit codes without a gateway."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.client.gateway import write_config
from toppy.cli.exec import proxy_variables
from toppy.cli.toppy import app
from toppy.config.client import parse_client_config
from toppy.errors import ConfigError
from toppy.wire.audit_entry import parse_entry

DEADLINE_S = 20.0
POLICY = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [22]\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return configured(tmp_path, "")


def configured(directory: Path, extra: str) -> Path:
    """No gateway answers there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return write_config(directory, sock.getsockname(), POLICY + extra)


def invoke(config: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error; nothing is said on standard output."""
    command, *rest = arguments
    result = CliRunner().invoke(app, [command, "--config", str(config), *rest])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


@contextmanager
def started(config: Path, *arguments: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
    program = "from toppy.cli.toppy import main; main()"
    command, *rest = arguments
    process = subprocess.Popen(
        [sys.executable, "-c", program, command, "--config", str(config), *rest],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **{"stdin": subprocess.DEVNULL, **how},
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


def actions(config: Path) -> list[str]:
    lines = (config.parent / "audit.jsonl").read_bytes().splitlines()
    return [parse_entry(line).event.action for line in lines]


# proxy


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_an_address_that_others_reach_needs_a_password(config: Path, host: str) -> None:
    code, said = invoke(config, "proxy", "--listen", f"{host}:1080")
    assert code == 1
    assert "could use your access" in said
    assert "proxy.password_file" in said


def test_an_address_without_a_host_is_refused(config: Path) -> None:
    code, said = invoke(config, "proxy", "--listen", ":1080")
    assert code == 1
    assert said.startswith("toppy proxy: --listen: ':1080' names no address; write 127.0.0.1:1080")


def test_a_name_is_no_address_to_listen_on(config: Path) -> None:
    code, said = invoke(config, "proxy", "--listen", "localhost:1080")
    assert code == 1
    assert "write 127.0.0.1 or [::1]" in said


def test_a_policy_that_allows_nothing_is_said_at_once(tmp_path: Path) -> None:
    config = configured(tmp_path, "")
    config.write_text(config.read_text().replace(POLICY, ""))
    for arguments in (("proxy",), ("exec", "true")):
        code, said = invoke(config, *arguments)
        assert code in (1, 125)
        assert "[[policy.allow]]" in said


def test_a_password_file_that_is_missing_or_no_password_is_named(tmp_path: Path) -> None:
    config = configured(tmp_path, '[proxy]\nuser = "me"\npassword_file = "secret"\n')
    code, said = invoke(config, "proxy")
    assert code == 1
    assert "proxy.password_file" in said
    (tmp_path / "secret").write_text("\n")
    code, said = invoke(config, "proxy")
    assert code == 1
    assert "password must be printable" in said


def test_a_password_file_that_others_can_read_is_warned_about(tmp_path: Path) -> None:
    config = configured(tmp_path, '[proxy]\nuser = "me"\npassword_file = "secret"\n')
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "secret").chmod(0o644)
    with started(config, "proxy", "--listen", "127.0.0.1:0") as process:
        first_line(process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert "proxy.password_file" in said
    assert "chmod 600" in said
    assert "s3cret" not in said


def test_an_address_that_is_taken_exits_with_1(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = invoke(config, "proxy", "--listen", f"127.0.0.1:{port}")
    assert code == 1
    assert "Address already in use" in said


def test_it_serves_until_a_signal_and_is_audited(config: Path) -> None:
    with started(config, "proxy", "--listen", "127.0.0.1:0") as process:
        host, _, port = first_line(process).removeprefix("toppy proxy listening on ").partition(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as program:
            program.sendall(b"CONNECT 192.0.2.1:22 HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while more := program.recv(65536):
                answer += more
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=DEADLINE_S)
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"target 192.0.2.1:22 is not allowed" in answer
    assert (process.returncode, out) == (0, "")
    assert "1 connections, 0 bytes out, 0 bytes in, 1 failed" in said
    assert actions(config) == ["proxy", "proxy.refused", "proxy.closed"]


# ssh-proxy


def test_ssh_proxy_says_a_denial_on_standard_error_and_exits_with_2(config: Path) -> None:
    code, said = invoke(config, "ssh-proxy", "10.0.0.1", "23")
    assert code == 2
    assert said.startswith("toppy ssh-proxy: policy denied: target 10.0.0.1:23 is not allowed")
    assert actions(config) == ["ssh-proxy"]


@pytest.mark.parametrize("host", ["127.1", "a b", "[::1]x"])
def test_ssh_proxy_names_a_bad_host_and_exits_with_1(config: Path, host: str) -> None:
    code, said = invoke(config, "ssh-proxy", host, "22")
    assert code == 1
    assert "HOST PORT" in said


@pytest.mark.parametrize("descriptor", [0, 1])
def test_ssh_proxy_does_without_a_standard_descriptor(config: Path, descriptor: int) -> None:
    """It must not be an engine's socket instead: the event loop dies of that."""

    def close() -> None:
        os.close(descriptor)

    with started(config, "ssh-proxy", "10.0.0.1", "22", preexec_fn=close) as process:
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], DEADLINE_S)[0], "no word of the gateway"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 1


def test_ssh_proxy_ends_by_a_signal(config: Path) -> None:
    with started(config, "ssh-proxy", "10.0.0.1", "22", stdin=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], DEADLINE_S)[0], "no word of the gateway"
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (1, "")
    assert actions(config) == ["ssh-proxy", "ssh-proxy.closed"]


# exec


def test_exec_sets_the_variables_that_programs_read() -> None:
    variables = proxy_variables(1234, "pw")
    assert variables["http_proxy"] == variables["HTTPS_PROXY"] == "http://toppy:pw@127.0.0.1:1234"
    assert variables["all_proxy"] == variables["ALL_PROXY"] == "socks5h://toppy:pw@127.0.0.1:1234"
    assert "localhost" in variables["no_proxy"]
    assert len(variables) == 8


def test_exec_passes_on_arguments_output_and_exit_code(config: Path) -> None:
    script = 'echo "$1 $http_proxy"; exit 7'
    with started(config, "exec", "--", "sh", "-c", script, "sh", "--config") as process:
        out, said = process.communicate(timeout=DEADLINE_S)
    assert out.startswith("--config http://toppy:")
    assert (process.returncode, said) == (7, "")
    assert actions(config) == ["exec", "exec.closed"]
    log = (config.parent / "audit.jsonl").read_text()
    assert "sh" in log
    assert script not in log


def test_exec_passes_signals_on_and_tells_which_ended_the_program(config: Path) -> None:
    script = 'trap "exit 3" TERM; echo ready; while :; do sleep 0.01; done'
    with started(config, "exec", "--", "sh", "-c", script) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 3
    with started(config, "exec", "--", "sh", "-c", "kill -KILL $$") as process:
        assert process.wait(DEADLINE_S) == 128 + 9


def test_exec_leaves_alone_what_it_was_told_to_ignore(config: Path) -> None:
    """As ``nohup`` does: the program would not hear of it without toppy, either."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    script = 'echo ready; read line; exit "$line"'
    how: dict[str, Any] = {"preexec_fn": ignore, "stdin": subprocess.PIPE}
    with started(config, "exec", "--", "sh", "-c", script, **how) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.communicate("5\n", timeout=DEADLINE_S)
    assert process.returncode == 5


def test_exec_says_what_cannot_be_run(config: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    for name, code in (("no-such-program", 127), (str(tmp_path / "data"), 126)):
        with started(config, "exec", "--", name) as process:
            out, said = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, out) == (code, "")
        assert said.startswith(f"toppy exec: {name}: ")


def test_exec_exits_with_125_where_toppy_itself_fails(config: Path) -> None:
    config.write_text("gateway = 1\n")
    code, said = invoke(config, "exec", "true")
    assert code == 125
    assert said.startswith("toppy exec: ")


def test_exec_without_a_command_is_wrong_usage(config: Path) -> None:
    assert invoke(config, "exec")[0] == 2


def test_exec_leaves_the_descriptor_limit_of_the_program_alone(config: Path) -> None:
    with started(config, "exec", "--", "sh", "-c", "ulimit -Sn") as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
    own = subprocess.run(
        ["sh", "-c", "ulimit -Sn"], capture_output=True, text=True, check=True
    ).stdout
    assert out == own


def test_a_password_is_never_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_client_config('gateway = "g"\n[proxy]\npassword = "s3cret"\n', "c.toml", {})
    assert "go together" in str(raised.value)
    assert "s3cret" not in str(raised.value)
