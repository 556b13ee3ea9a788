"""Worker processes: started, watched, adopted, ended; real ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from toppy.system import processes
from toppy.system.processes import Process, adopt, spawn, start_time

DEADLINE_S = 30.0
SLEEP = "import time; time.sleep(600)"
ECHO_INPUT = "import sys; sys.stdout.write(sys.stdin.read())"

needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfd")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario

    asyncio.run(whole())


@pytest.fixture(params=["pidfd", "polling"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a pidfd, and as where there is none."""
    name: str = request.param
    if name == "polling":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.setattr(processes, "_POLL_INTERVAL_S", 0.01)
    elif not hasattr(os, "pidfd_open"):
        pytest.skip("this system has no pidfd")
    return name


def start(code: str, said: bytes = b"", **options: Any) -> Process:
    defaults = {"descriptors": (), "environ": dict(os.environ)}
    return spawn((sys.executable, "-S", "-c", code), said, **(defaults | options))


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_for_end(pid: int) -> None:
    """Of a child; it stays a zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


@contextlib.asynccontextmanager
async def running(code: str, said: bytes = b"", **options: Any) -> AsyncIterator[Process]:
    """A child that is ended afterwards."""
    process = start(code, said, **options)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


@contextlib.contextmanager
def stranger() -> Iterator[int]:
    """A process that is not our child: its parent is, and waits for it. Its number."""
    inner = "import sys; sys.stdin.read()"
    outer = (
        "import subprocess, sys;"
        f"process = subprocess.Popen([sys.executable, '-S', '-c', {inner!r}]);"
        "print(process.pid, flush=True); process.wait()"
    )
    with subprocess.Popen(
        (sys.executable, "-S", "-c", outer), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        yield int(parent.stdout.readline())
        assert parent.stdin is not None
        parent.stdin.close()


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_of_a_child_is_known(how: str, code: int) -> None:
    async def scenario() -> None:
        process = start(f"import sys; sys.exit({code})")
        assert await process.wait() == code
        assert process.has_ended

    run(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_that_ends_a_child_is_known(how: str, number: int) -> None:
    async def scenario() -> None:
        async with running(SLEEP) as process:
            process.send_signal(number)
            assert await process.wait() == -number

    run(scenario())


def test_a_child_that_has_ended_is_no_zombie(how: str) -> None:
    async def scenario() -> None:
        process = start("")
        await process.wait()
        assert start_time(process.pid) == 0

    run(scenario())


def test_everybody_who_waits_hears_of_the_end(how: str) -> None:
    async def scenario() -> None:
        process = start("")
        assert await asyncio.gather(*(process.wait() for _ in range(3))) == [0] * 3
        assert await process.wait() == 0

    run(scenario())


def test_a_signal_after_the_end_reaches_nobody(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the number may be another process's by now")

    async def scenario() -> None:
        process = start("")
        await process.wait()
        monkeypatch.setattr(os, "kill", refuse)
        if hasattr(signal, "pidfd_send_signal"):
            monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
        process.send_signal(signal.SIGTERM)
        process.kill()

    run(scenario())


def test_a_signal_to_a_child_that_nobody_has_waited_for_is_no_error(how: str) -> None:
    async def scenario() -> None:
        process = start("")
        wait_for_end(process.pid)
        process.kill()
        assert await process.wait() == 0

    run(scenario())


@pytest.mark.parametrize("size", [0, 1, 65_536, 300_000])
def test_what_is_said_goes_through_the_pipe(size: int) -> None:
    said = bytes(range(256)) * (size // 256) + bytes(size % 256)
    reader = (
        f"import sys, os\nleft = {size}\ndata = b''\n"
        f"while len(data) < {size}: data += sys.stdin.buffer.raw.read({size} - len(data))\n"
        f"sys.exit(0 if data == bytes(range(256)) * {size // 256} + bytes({size % 256}) else 9)"
    )

    async def scenario() -> None:
        process = start(reader, said)
        assert await process.wait() == 0

    run(scenario())


def test_nobody_waits_for_a_child_that_does_not_read() -> None:
    async def scenario() -> None:
        async with running(SLEEP, bytes(200_000)) as process:
            assert not process.has_ended

    run(scenario())


def test_a_child_that_ended_at_once_is_no_error() -> None:
    async def scenario() -> None:
        process = start("", bytes(100))
        assert await process.wait() == 0

    run(scenario())


@needs_pidfd
def test_the_pipe_stays_open_until_we_forget_the_child() -> None:
    code = "import sys; sys.stdin.read(); sys.exit(7)"

    async def scenario() -> None:
        child = start(code)
        watching = adopt(child.pid, child.started)
        assert watching is not None
        await asyncio.sleep(0.05)
        assert not watching.has_ended
        child.forget()
        assert await watching.wait() == 7

    run(scenario())


def test_a_child_gets_the_descriptors_that_it_is_given_and_no_others() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as given,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kept,
    ):
        code = (
            "import os, sys\n"
            "def is_open(d):\n"
            "    try: os.fstat(d)\n"
            "    except OSError: return False\n"
            "    return True\n"
            f"sys.exit(10 * is_open({given.fileno()}) + is_open({kept.fileno()}))"
        )

        async def scenario() -> None:
            process = start(code, descriptors=(given.fileno(),))
            assert await process.wait() == 10

        run(scenario())


def test_a_child_gets_the_environment_that_it_is_given_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOPPY_GW_TOKEN", "secret")
    code = "import os, sys; sys.exit('TOPPY_GW_TOKEN' in os.environ or os.environ['A'] != 'b')"

    async def scenario() -> None:
        process = start(code, environ={"A": "b"})
        assert await process.wait() == 0

    run(scenario())


def test_a_program_that_is_not_there_is_an_os_error() -> None:
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError):
            spawn(("/nowhere/python",), b"", descriptors=(), environ={})

    run(scenario())


def test_watching_and_its_end_leave_no_descriptor(how: str) -> None:
    async def scenario() -> None:
        before = open_descriptors()
        for _ in range(3):
            await start("").wait()
        async with running(SLEEP) as child:
            watching = adopt(child.pid, child.started)
            assert watching is not None
            watching.forget()
            watching.forget()
        await child.wait()
        assert open_descriptors() == before

    run(scenario())


# those of others


def test_a_process_of_others_can_be_watched_and_ended(how: str) -> None:
    async def scenario() -> None:
        with stranger() as pid:
            process = adopt(pid, start_time(pid))
            assert process is not None
            assert process.pid == pid
            assert not process.has_ended
            process.kill()
            assert await process.wait() is None, "only its parent knows how it ended"

    run(scenario())


def test_a_process_that_is_forgotten_runs_on() -> None:
    async def scenario() -> None:
        with stranger() as pid:
            process = adopt(pid, start_time(pid))
            assert process is not None
            process.forget()
            assert start_time(pid) == process.started

    run(scenario())


def test_a_process_that_has_ended_is_not_adopted(how: str) -> None:
    async def scenario() -> None:
        child = start("")
        started = child.started
        await child.wait()
        assert adopt(child.pid, started) is None

    run(scenario())


@needs_pidfd
def test_a_zombie_is_not_adopted() -> None:
    with subprocess.Popen((sys.executable, "-S", "-c", "")) as zombie:
        wait_for_end(zombie.pid)

        async def scenario() -> None:
            assert adopt(zombie.pid, start_time(zombie.pid)) is None

        run(scenario())


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_process_with_the_same_number_is_not_adopted(how: str, difference: int) -> None:
    async def scenario() -> None:
        with stranger() as pid:
            before = open_descriptors()
            assert adopt(pid, start_time(pid) + difference) is None
            assert open_descriptors() == before

    run(scenario())


def test_a_process_keeps_its_start_time_whatever_its_name() -> None:
    code = "open('/proc/self/comm', 'w').write(') 1 2 (3'); print(flush=True); input()"
    with subprocess.Popen(
        (sys.executable, "-S", "-c", code), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        started = start_time(process.pid)
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        assert start_time(process.pid) == started > 0
        process.stdin.write(b"\n")
        process.stdin.flush()


def test_a_number_that_nobody_has_has_no_start_time() -> None:
    assert start_time(2**22 + 1) == 0


@needs_pidfd
def test_the_end_of_a_process_can_be_waited_for_without_the_event_loop() -> None:
    async def scenario() -> None:
        with stranger() as pid:
            process = adopt(pid, start_time(pid))
            assert process is not None
            assert not process.wait_blocking(0.01)
            process.kill()
            assert process.wait_blocking(DEADLINE_S)
            await process.wait()

    run(scenario())
