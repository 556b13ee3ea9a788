"""Descriptors that outlive a process: handed over across a re-execution, or kept by systemd."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from toppy.system import descriptors
from toppy.system.descriptors import hand_over, inherited_sockets


@pytest.fixture
def pair() -> Iterator[list[socket.socket]]:
    """Two sockets that somebody else owns."""
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock in made:
        sock.bind(("127.0.0.1", 0))
    yield made
    for sock in made:
        sock.close()


def kept(monkeypatch: pytest.MonkeyPatch, socks: list[socket.socket]) -> list[int]:
    """Copies in a row, as the service manager gives them."""
    first = 300
    numbers = [os.dup2(sock.fileno(), first + index) for index, sock in enumerate(socks)]
    monkeypatch.setattr(descriptors, "_FIRST_DESCRIPTOR", first)
    return numbers


def close(sockets: dict[str, socket.socket]) -> None:
    for sock in sockets.values():
        sock.close()


def test_a_process_inherits_nothing_by_default() -> None:
    environ = {"PATH": "/usr/bin"}
    assert inherited_sockets(environ) == {}
    assert environ == {"PATH": "/usr/bin"}


def test_what_is_handed_over_is_found_again_by_name(pair: list[socket.socket]) -> None:
    copies = [sock.dup() for sock in pair]
    environ: dict[str, str] = {}
    hand_over({"quic.0.0": copies[0], "health": copies[1]}, environ)
    numbers = [copy.detach() for copy in copies]
    assert all(os.get_inheritable(number) for number in numbers)
    found = inherited_sockets(environ)
    assert {name: sock.getsockname() for name, sock in found.items()} == {
        "quic.0.0": pair[0].getsockname(),
        "health": pair[1].getsockname(),
    }
    close(found)


def test_what_is_handed_over_survives_a_re_execution(pair: list[socket.socket]) -> None:
    second = (
        "import os; from toppy.system.descriptors import inherited_sockets;"
        "found = inherited_sockets(os.environ);"
        "print({name: sock.getsockname() for name, sock in found.items()})"
    )
    first = (
        "import os, socket, sys; from toppy.system.descriptors import hand_over;"
        f"sock = socket.socket(fileno={pair[0].fileno()});"
        "os.set_inheritable(sock.fileno(), False);"
        "environ = dict(os.environ); hand_over({'quic.0.0': sock}, environ);"
        f"os.execve(sys.executable, [sys.executable, '-c', {second!r}], environ)"
    )
    said = subprocess.run(
        (sys.executable, "-c", first),
        pass_fds=(pair[0].fileno(),),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert said.strip() == str({"quic.0.0": pair[0].getsockname()})


def test_what_the_service_manager_kept_is_found_by_name(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket]
) -> None:
    kept(monkeypatch, pair)
    environ = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "quic.0.0:quic.0.1",
    }
    found = inherited_sockets(environ)
    assert {name: sock.getsockname() for name, sock in found.items()} == {
        "quic.0.0": pair[0].getsockname(),
        "quic.0.1": pair[1].getsockname(),
    }
    close(found)


def test_what_a_process_has_inherited_its_children_do_not(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket]
) -> None:
    kept(monkeypatch, pair)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    found = inherited_sockets(environ)
    assert environ == {}, "a child would take them for its own"
    assert not any(sock.get_inheritable() for sock in found.values())
    close(found)


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
    ],
)
def test_what_was_kept_for_another_process_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket], environ: dict[str, str]
) -> None:
    numbers = kept(monkeypatch, pair)
    assert inherited_sockets(environ) == {}
    for number in numbers:
        os.close(number)  # they are still open


def test_sockets_without_a_name_get_their_number(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket]
) -> None:
    kept(monkeypatch, pair)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "health"}
    found = inherited_sockets(environ)
    assert list(found) == ["health", "1"]
    close(found)


def test_a_re_execution_wins_over_what_the_service_manager_kept_at_the_first_start(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket]
) -> None:
    numbers = kept(monkeypatch, pair)
    copy = pair[0].dup()
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    hand_over({"quic.0.0": copy}, environ)
    copy.detach()
    found = inherited_sockets(environ)
    assert list(found) == ["quic.0.0"]
    assert environ == {}
    close(found)
    for number in numbers:
        os.close(number)


def test_descriptors_that_are_not_open_or_no_sockets_are_left_out(
    monkeypatch: pytest.MonkeyPatch, pair: list[socket.socket]
) -> None:
    numbers = kept(monkeypatch, pair)
    os.close(numbers[0])
    with open(os.devnull, "rb") as null:  # noqa: PTH123
        os.dup2(null.fileno(), numbers[0])
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:c"}
    found = inherited_sockets(environ)
    assert list(found) == ["b"]
    close(found)
    os.close(numbers[0])


def test_all_descriptors_that_the_hard_limit_allows_are_used() -> None:
    code = (
        "import resource; from toppy.system.descriptors import raise_descriptor_limit;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard));"
        "raise_descriptor_limit(); raise_descriptor_limit();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    said = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert int(said) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_closed_standard_descriptors_are_the_null_device() -> None:
    program = """
import os, sys
from toppy.system.descriptors import open_missing_standard_descriptors
open_missing_standard_descriptors()
null = os.stat(os.devnull).st_rdev
os.write(2, repr([os.stat(fd).st_rdev == null for fd in (0, 1, 2)]).encode())
assert os.dup(2) == 3
"""
    # the shell closes two of them
    line = 'exec "$0" -c "$1" <&- >&-'
    done = subprocess.run(
        ["/bin/sh", "-c", line, sys.executable, program], stderr=subprocess.PIPE, check=True
    )
    assert done.stderr == b"[True, True, False]"
