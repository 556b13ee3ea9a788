"""Workers that nobody can take over are found by their sockets and ended; nothing else is."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toppy.control import leftovers
from toppy.control.leftovers import end_leftovers, usable_state
from toppy.ipc.worker_sockets import stray_path, takeover_path

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="this system does not say who listens"
)

LISTEN = """
import signal, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(4)
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("listens", flush=True)
sys.stdin.read()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix socket paths are limited to 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="left-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    """A process that listens as the worker of a slot does; ``how``: ``deaf`` to SIGTERM."""
    with contextlib.ExitStack() as stack:

        def start_worker(slot: int, how: str = "") -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", LISTEN, takeover_path(str(directory), slot), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            Path(stray_path(str(directory), slot)).touch()
            assert process.stdout is not None
            assert process.stdout.readline() == "listens\n"
            return process

        yield start_worker


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
def test_workers_that_are_left_are_ended_and_their_sockets_removed(
    directory: Path, start: Start
) -> None:
    workers = [start(0), start(12)]
    assert sorted(end_leftovers(directory)) == sorted(worker.pid for worker in workers)
    for worker in workers:
        # it has been waited for
        assert not Path(f"/proc/{worker.pid}").exists()
    assert names(directory) == []


def test_one_that_does_not_listen_to_reason_is_killed(
    directory: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_PATIENCE_S", 0.05)
    deaf, still = start(1, "deaf"), start(2)
    os.kill(still.pid, signal.SIGSTOP)
    assert sorted(end_leftovers(directory)) == sorted((deaf.pid, still.pid))
    assert not Path(f"/proc/{deaf.pid}").exists()
    assert not Path(f"/proc/{still.pid}").exists()


def test_those_that_were_taken_over_go_on(directory: Path, start: Start) -> None:
    taken, left = start(3), start(4)
    assert end_leftovers(directory, except_slots={3}) == [left.pid]
    assert taken.poll() is None
    assert names(directory) == ["stray-3.sock", "worker-3.sock"]


def test_a_socket_without_a_process_names_nobody(directory: Path, start: Start) -> None:
    worker = start(5)
    worker.kill()
    worker.wait()
    assert end_leftovers(directory) == []


def test_other_files_are_left_alone(directory: Path) -> None:
    for name in ("state", "lock", "worker-x.sock", "worker-1.sock.old", "worker-7.sock"):
        (directory / name).touch()
    before = names(directory)
    assert end_leftovers(directory) == []
    assert names(directory) == before


def test_where_the_directory_was_removed_nobody_is_found(directory: Path) -> None:
    assert end_leftovers(directory / "run") == []


def test_a_state_that_cannot_be_read_is_no_reason_not_to_start(directory: Path) -> None:
    assert usable_state(directory) is None
    (directory / "state").write_bytes(b"half a st")
    assert usable_state(directory) is None
