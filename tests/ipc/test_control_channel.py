"""The ZeroMQ channels between control plane and workers, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from toppy.ipc.control_channel import ControlClient, ControlServer, Peer
from toppy.model.counters import WorkerCounters
from toppy.model.grant import Denial, Grant
from toppy.wire.ipc_message import (
    MAX_MESSAGE_BYTES,
    AdmissionRequest,
    Admitted,
    FromWorker,
    Hello,
    IpcError,
    Ready,
    Report,
    Stop,
    TokenAnswer,
    TokenRequest,
    ToWorker,
    encode_message,
)

DEADLINE_S = 10.0
HELLO = Hello(slot=0, generation=1, pid=42, secret="s" * 64)
REQUEST = AdmissionRequest(
    request=7,
    authorization="Bearer x",
    host="dns.example",
    port=53,
    protocol="udp",
    is_echo=False,
    source="192.0.2.1",
)
GRANT = Grant(("192.0.2.53",), 53, "token", "dns", 1, expires_at=1.5)


@dataclass
class Channel:
    """Both addresses, the server, and what it has heard."""

    directory: Path
    server: ControlServer
    messages: list[tuple[Peer, FromWorker]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    garbage: list[IpcError] = field(default_factory=list)

    @property
    def addresses(self) -> tuple[str, str]:
        return f"ipc://{self.directory}/control", f"ipc://{self.directory}/reports"

    def client(self) -> ControlClient:
        return ControlClient(*self.addresses)

    async def serve(self) -> None:
        await self.server.serve(
            lambda peer, message: self.messages.append((peer, message)),
            self.reports.append,
            self.garbage.append,
        )


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: unix socket paths are limited to 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ipc-"))
    yield path
    shutil.rmtree(path)


def run(directory: Path, scenario: Callable[[Channel], Coroutine[None, None, None]]) -> None:
    """A scenario beside a server that serves."""

    async def whole() -> None:
        addresses = f"ipc://{directory}/control", f"ipc://{directory}/reports"
        channel = Channel(directory, ControlServer(*addresses))
        serving = asyncio.create_task(channel.serve())
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(channel)
            assert not serving.done(), "the server gave up"
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            channel.server.close()

    asyncio.run(whole())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # what it waits for sets no event
        await asyncio.sleep(0.005)


def test_messages_arrive_in_order_with_their_senders_name(directory: Path) -> None:
    async def scenario(channel: Channel) -> None:
        client = channel.client()
        sent: list[FromWorker] = [HELLO, Ready("native"), REQUEST, TokenRequest(8, None)]
        for message in sent:
            assert client.send(message)
        await until(lambda: len(channel.messages) == 4)
        assert [message for _, message in channel.messages] == sent
        assert len({peer for peer, _ in channel.messages}) == 1
        client.close()

    run(directory, scenario)


def test_answers_reach_the_worker_that_asked_and_no_other(directory: Path) -> None:
    async def scenario(channel: Channel) -> None:
        clients = [channel.client() for _ in range(2)]
        heard: list[list[ToWorker]] = [[], []]
        serving = [
            asyncio.create_task(client.serve(into.append, lambda _: None))
            for client, into in zip(clients, heard, strict=True)
        ]
        for number, client in enumerate(clients):
            client.send(TokenRequest(number, None))
        await until(lambda: len(channel.messages) == 2)
        for peer, message in channel.messages:
            assert isinstance(message, TokenRequest)
            assert channel.server.send(peer, TokenAnswer(message.request, True))
        await until(lambda: all(heard))
        assert heard == [[TokenAnswer(0, True)], [TokenAnswer(1, True)]]
        for task, client in zip(serving, clients, strict=True):
            task.cancel()
            client.close()
        await asyncio.gather(*serving, return_exceptions=True)

    run(directory, scenario)


@pytest.mark.parametrize(
    "answer",
    [
        Admitted(7, GRANT, None),
        Admitted(7, None, Denial(403, "http_request_denied", "no", "default")),
        TokenAnswer(7, False),
        Stop(4.0),
    ],
)
def test_every_answer_arrives_as_it_was_sent(directory: Path, answer: ToWorker) -> None:
    async def scenario(channel: Channel) -> None:
        client = channel.client()
        heard: list[ToWorker] = []
        serving = asyncio.create_task(client.serve(heard.append, lambda _: None))
        client.send(HELLO)
        await until(lambda: channel.messages)
        channel.server.send(channel.messages[0][0], answer)
        await until(lambda: heard)
        assert heard == [answer]
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        client.close()

    run(directory, scenario)


def test_reports_arrive_with_every_counter(directory: Path) -> None:
    counters = WorkerCounters(tunnels_open=3, drops={"queue_full": 2}, admissions={"granted": 9})

    async def scenario(channel: Channel) -> None:
        client = channel.client()
        assert client.report(Report(1, 2, "secret", counters))
        await until(lambda: channel.reports)
        (report,) = channel.reports
        assert (report.slot, report.generation, report.secret) == (1, 2, "secret")
        assert report.counters == counters
        client.close()

    run(directory, scenario)


async def shout(address: str, kind: int, *frames: bytes) -> None:
    """A stranger says one message."""
    with zmq.asyncio.Context() as context, context.socket(kind) as sock:
        sock.setsockopt(zmq.LINGER, 500)
        sock.connect(address)
        await sock.send_multipart(list(frames))


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"\xff" * 100,),
        (os.urandom(1000),),
        (b"two", b"frames"),
        (b"", b"", b"", b""),
        (encode_message(Stop(1.0)),),
        (encode_message(HELLO), encode_message(HELLO)),
    ],
)
def test_garbage_is_told_and_the_next_message_is_heard(
    directory: Path, frames: tuple[bytes, ...]
) -> None:
    async def scenario(channel: Channel) -> None:
        control, reports = channel.addresses
        await shout(control, zmq.DEALER, *frames)
        await until(lambda: channel.garbage)
        await shout(reports, zmq.PUSH, *frames)
        await until(lambda: len(channel.garbage) == 2)
        client = channel.client()
        client.send(HELLO)
        client.report(Report(0, 1, "", WorkerCounters()))
        await until(lambda: channel.messages and channel.reports)
        client.close()

    run(directory, scenario)


def test_a_message_that_is_too_large_is_never_received(directory: Path) -> None:
    async def scenario(channel: Channel) -> None:
        control, reports = channel.addresses
        await shout(control, zmq.DEALER, bytes(MAX_MESSAGE_BYTES + 1))
        await shout(reports, zmq.PUSH, bytes(MAX_MESSAGE_BYTES + 1))
        client = channel.client()
        client.send(HELLO)
        await until(lambda: channel.messages)
        assert len(channel.messages) == 1
        client.close()

    run(directory, scenario)


def test_a_message_to_a_worker_that_is_gone_is_lost_without_harm(directory: Path) -> None:
    async def scenario(channel: Channel) -> None:
        client = channel.client()
        client.send(HELLO)
        await until(lambda: channel.messages)
        client.close()
        await asyncio.sleep(0.05)
        channel.server.send(channel.messages[0][0], Stop(1.0))
        channel.server.send(b"nobody's name", Stop(1.0))
        another = channel.client()
        another.send(HELLO)
        await until(lambda: len(channel.messages) == 2)
        another.close()

    run(directory, scenario)


def test_a_worker_whose_control_plane_does_not_listen_is_told_when_its_queue_is_full(
    directory: Path,
) -> None:
    async def scenario() -> None:
        client = ControlClient(f"ipc://{directory}/nobody", f"ipc://{directory}/nobody2")
        answers = [client.send(Ready("native")) for _ in range(20_000)]
        assert answers[0]
        assert not answers[-1]
        assert answers.index(False) <= 10_001
        client.close()

    asyncio.run(scenario())


def test_a_worker_hears_garbage_from_its_control_plane_as_such(directory: Path) -> None:
    async def scenario() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(f"ipc://{directory}/control")
            client = ControlClient(f"ipc://{directory}/control", f"ipc://{directory}/reports")
            heard: list[ToWorker] = []
            garbage: list[IpcError] = []
            serving = asyncio.create_task(client.serve(heard.append, garbage.append))
            client.send(HELLO)
            peer, _ = await router.recv_multipart()
            for frames in ([b"nonsense"], [b"two", b"frames"], [encode_message(HELLO)]):
                await router.send_multipart([peer, *frames])
            await router.send_multipart([peer, encode_message(Stop(1.0))])
            async with asyncio.timeout(DEADLINE_S):
                await until(lambda: heard)
            assert len(garbage) == 3
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            client.close()

    asyncio.run(scenario())
