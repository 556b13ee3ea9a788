"""ZeroMQ between control plane and workers: the only door to it.

Control is ROUTER/DEALER (readiness, admission), reports are PUSH/PULL (counters). Both are unix
sockets in the runtime directory. Queues are bounded; a peer that is gone loses its messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
import zmq.asyncio

from toppy.wire.ipc_message import (
    MAX_MESSAGE_BYTES,
    FromWorker,
    IpcError,
    Report,
    ToWorker,
    encode_message,
    parse_from_worker,
    parse_report,
    parse_to_worker,
)

_QUEUE_MESSAGES = 10_000

Peer = bytes
"""ZeroMQ's name for one connected worker."""


def _socket(context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, _QUEUE_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


def _post(socket: zmq.asyncio.Socket, frames: list[bytes]) -> bool:
    """Queue one message without waiting; False when the queue is full."""
    # zmq's edge-triggered descriptor wants sends and receives to go through one object
    sent = socket.send_multipart(frames, zmq.NOBLOCK)
    assert isinstance(sent, asyncio.Future)
    return sent.exception() is None


def _single(frames: list[bytes]) -> bytes:
    """The frame of a message that must have one; raises ``IpcError``."""
    if len(frames) != 1:
        raise IpcError(f"an IPC message has one frame, not {len(frames)}")
    return frames[0]


class ControlServer:
    """The control plane's end of both channels."""

    def __init__(self, control_address: str, report_address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._control = _socket(self._context, zmq.ROUTER)
        self._reports = _socket(self._context, zmq.PULL)
        self._control.bind(control_address)
        self._reports.bind(report_address)

    async def serve(
        self,
        on_message: Callable[[Peer, FromWorker], None],
        on_report: Callable[[Report], None],
        on_garbage: Callable[[IpcError], None],
    ) -> None:
        """Hand every message on until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_control(on_message, on_garbage))
            group.create_task(self._serve_reports(on_report, on_garbage))

    async def _serve_control(
        self,
        on_message: Callable[[Peer, FromWorker], None],
        on_garbage: Callable[[IpcError], None],
    ) -> None:
        while True:
            peer, *frames = await self._control.recv_multipart()  # ROUTER: the peer's name first
            try:
                message = parse_from_worker(_single(frames))
            except IpcError as error:
                on_garbage(error)
                continue
            on_message(peer, message)
            await asyncio.sleep(0)  # pyzmq does not yield while messages wait

    async def _serve_reports(
        self, on_report: Callable[[Report], None], on_garbage: Callable[[IpcError], None]
    ) -> None:
        while True:
            frames = await self._reports.recv_multipart()
            try:
                report = parse_report(_single(frames))
            except IpcError as error:
                on_garbage(error)
                continue
            on_report(report)
            await asyncio.sleep(0)  # pyzmq does not yield while messages wait

    def send(self, peer: Peer, message: ToWorker) -> bool:
        """Queue one message; False when it is lost because the worker's queue is full."""
        return _post(self._control, [peer, encode_message(message)])

    def close(self) -> None:
        """Release sockets and threads."""
        self._context.destroy(linger=0)


class ControlClient:
    """A worker's end of both channels."""

    def __init__(self, control_address: str, report_address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._control = _socket(self._context, zmq.DEALER)
        self._reports = _socket(self._context, zmq.PUSH)
        self._control.connect(control_address)
        self._reports.connect(report_address)

    def send(self, message: FromWorker) -> bool:
        """Queue one message; False when it is lost because the queue is full."""
        return _post(self._control, [encode_message(message)])

    def report(self, report: Report) -> bool:
        """Queue one report; False when it is lost because the queue is full."""
        return _post(self._reports, [encode_message(report)])

    async def serve(
        self, on_message: Callable[[ToWorker], None], on_garbage: Callable[[IpcError], None]
    ) -> None:
        """Hand every message on until cancelled."""
        while True:
            frames = await self._control.recv_multipart()
            try:
                message = parse_to_worker(_single(frames))
            except IpcError as error:
                on_garbage(error)
                continue
            on_message(message)
            await asyncio.sleep(0)  # pyzmq does not yield while messages wait

    def close(self) -> None:
        """Release sockets and threads."""
        self._context.destroy(linger=0)
