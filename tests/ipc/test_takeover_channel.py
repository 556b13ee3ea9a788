"""Taking over a worker of a control plane that died: who may, what is handed over, what ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path

import pytest

from toppy.ipc import takeover_channel
from toppy.ipc.takeover_channel import TakeoverListener, take_over
from toppy.ipc.worker_sockets import remove_sockets, stray_path, takeover_path

SECRET = "5ec2e7" * 10 + "beef"
DEADLINE_S = 10.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix socket paths are limited to 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="take-"))
    yield path
    shutil.rmtree(path)


class Worker:
    """A worker that can be taken over, and what it noticed."""

    def __init__(self, path: Path, descriptors: list[int]) -> None:
        self.path = str(path)
        self.taken = 0
        self.lost = 0
        self._news = asyncio.Event()
        self.troubles: list[OSError] = []
        self.listener = TakeoverListener(
            self.path,
            SECRET,
            descriptors,
            self._take,
            self._lose,
            on_trouble=self.troubles.append,
        )

    def _take(self) -> None:
        self.taken += 1
        self._news.set()

    def _lose(self) -> None:
        self.lost += 1
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def take_over(self, secret: str = SECRET) -> tuple[socket.socket, list[int]]:
        """As another process does it: it blocks."""
        return await asyncio.to_thread(take_over, self.path, secret)

    async def line(self) -> socket.socket:
        """The same, without the descriptors."""
        line, descriptors = await self.take_over()
        close_all(descriptors)
        return line


def with_worker(
    directory: Path,
    scenario: Callable[[Worker], Coroutine[None, None, None]],
    descriptors: Sequence[int] = (),
) -> None:
    """Without ``descriptors`` the worker has one, of no further interest."""

    async def whole() -> None:
        with tempfile.TemporaryFile() as file:
            worker = Worker(directory / "worker-0.sock", list(descriptors) or [file.fileno()])
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await scenario(worker)
            finally:
                worker.listener.close()

    asyncio.run(whole())


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("count", [1, 250, 251, 600])
def test_every_descriptor_is_handed_over_in_order(directory: Path, count: int) -> None:
    files = [tempfile.TemporaryFile(dir=directory) for _ in range(count)]  # noqa: SIM115

    async def scenario(worker: Worker) -> None:
        line, descriptors = await worker.take_over()
        inodes = [os.fstat(descriptor).st_ino for descriptor in descriptors]
        assert inodes == [os.fstat(file.fileno()).st_ino for file in files]
        assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
        close_all(descriptors)
        line.close()

    try:
        with_worker(directory, scenario, [file.fileno() for file in files])
    finally:
        for file in files:
            file.close()


def test_what_is_handed_over_is_the_same_socket(directory: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        async def scenario(worker: Worker) -> None:
            line, (descriptor,) = await worker.take_over()
            with line, socket.socket(fileno=descriptor) as copy:
                assert copy.getsockname() == sock.getsockname()

        with_worker(directory, scenario, [sock.fileno()])


def test_the_worker_hears_that_it_has_a_new_control_plane(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        assert worker.lost == 0
        line.close()

    with_worker(directory, scenario)


def test_the_end_of_the_line_is_the_end_of_the_control_plane(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        line.close()
        await worker.until(lambda: worker.lost == 1)

    with_worker(directory, scenario)


def test_what_is_said_on_the_line_is_ignored(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        line.sendall(b"anything" * 100)
        line.close()
        await worker.until(lambda: worker.lost == 1)
        assert worker.taken == 1

    with_worker(directory, scenario)


@pytest.mark.parametrize("secret", ["", "x", SECRET[:-1], SECRET[:-1] + "e", "0" * 64, "ä" * 32])
def test_with_a_wrong_secret_nothing_is_handed_over(directory: Path, secret: str) -> None:
    async def scenario(worker: Worker) -> None:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            stranger.connect(worker.path)
            stranger.send(secret.encode())
            stranger.shutdown(socket.SHUT_WR)
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(stranger, 10) == b""
        assert (worker.taken, worker.lost) == (0, 0)
        line = await worker.line()  # who is right is served after that
        line.close()

    with tempfile.TemporaryFile(dir=directory) as file:
        with_worker(directory, scenario, [file.fileno()])


def test_a_wrong_secret_is_an_os_error_for_who_asks(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        with pytest.raises(OSError, match="hung up"):
            await worker.take_over("0" * 64)

    with_worker(directory, scenario)


def test_strangers_do_not_disturb_the_control_plane_that_there_is(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        with pytest.raises(OSError, match="hung up"):
            await worker.take_over("0" * 64)
        assert (worker.taken, worker.lost) == (1, 0)
        line.close()
        await worker.until(lambda: worker.lost == 1)

    with_worker(directory, scenario)


def test_who_says_nothing_holds_nobody_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover_channel, "_DEADLINE_S", 3600.0)

    async def scenario(worker: Worker) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.connect(worker.path)
            line = await worker.line()
            line.close()

    with_worker(directory, scenario)


def test_a_worker_that_cannot_accept_now_can_be_found_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: Worker) -> None:
        # as a hook in accept itself: the limit of this process would hurt the test, too
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, [OSError(errno.EMFILE, "Too many open files")] * 2

        async def accept_or_fail(listener: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", accept_or_fail)
        (await worker.line()).close()  # what was being accepted before the hook
        line = await worker.line()
        assert failures == []
        assert [error.errno for error in worker.troubles] == [errno.EMFILE] * 2
        line.close()

    with_worker(directory, scenario)


def test_a_second_taker_replaces_the_first_whose_end_is_no_loss(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        first = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        second = await worker.line()
        await worker.until(lambda: worker.taken == 2)
        assert first.recv(10) == b"", "the worker has left it"
        first.close()
        await asyncio.sleep(0)
        assert worker.lost == 0
        second.close()
        await worker.until(lambda: worker.lost == 1)

    with_worker(directory, scenario)


def test_after_the_loss_of_one_another_may_take_over(directory: Path) -> None:
    async def scenario(worker: Worker) -> None:
        for number in range(1, 4):
            line = await worker.line()
            await worker.until(lambda: worker.taken == number)  # noqa: B023
            line.close()
            await worker.until(lambda: worker.lost == number)  # noqa: B023

    with_worker(directory, scenario)


def test_a_worker_that_is_gone_cannot_be_taken_over(directory: Path) -> None:
    path = directory / "worker-0.sock"
    with pytest.raises(FileNotFoundError):
        take_over(str(path), SECRET)
    with socket.socket(socket.AF_UNIX) as sock:  # killed: its socket file is left
        sock.bind(str(path))
    with pytest.raises(ConnectionRefusedError):
        take_over(str(path), SECRET)


def test_a_worker_that_hangs_is_not_waited_for_long(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover_channel, "_DEADLINE_S", 0.05)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(directory / "worker-0.sock"))
        hanging.listen()
        with pytest.raises(TimeoutError):
            take_over(str(directory / "worker-0.sock"), SECRET)


def test_a_socket_file_that_was_left_is_replaced(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "worker-0.sock"))

    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        line.close()

    with_worker(directory, scenario)


def test_nothing_is_left_when_the_worker_ends(directory: Path) -> None:
    before = open_descriptors()

    async def scenario(worker: Worker) -> None:
        line = await worker.line()
        await worker.until(lambda: worker.taken == 1)
        line.close()

    with_worker(directory, scenario)
    assert list(directory.iterdir()) == []
    assert open_descriptors() == before


def test_the_sockets_of_a_slot_are_removed_and_no_others(directory: Path) -> None:
    for slot in (1, 11):
        for path in (takeover_path(str(directory), slot), stray_path(str(directory), slot)):
            Path(path).touch()
    remove_sockets(str(directory), 1)
    remove_sockets(str(directory), 1)
    assert sorted(path.name for path in directory.iterdir()) == ["stray-11.sock", "worker-11.sock"]
