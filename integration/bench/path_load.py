"""Several tunnels' applications and their target in one process, with one clock, so that delays
one way can be measured, too.

``python -m integration.bench.path_load JSON`` prints one JSON object on standard output. Rates
here are those of slow paths, some 10,000 datagrams/s: one process does it all with time to spare.
"""

from __future__ import annotations

import json
import select
import struct
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from toppy.net.udp_socket import MAX_GSO_BYTES, SendResult, UdpSocket, bind_udp, connect_udp
from toppy.quic.engine import Address

_HOST = "127.0.0.1"
_BUFFER_BYTES = 16 << 20
_HEAD = struct.Struct("=IQ")  # stream, and nanoseconds when it was sent; 0: it opens the tunnel
_TICK_S = 0.001
_MOST_DEBT_S = 0.02
"""What a machine that stood still has missed beyond this is not made up for."""
_OPENING_DEADLINE_S = 15.0
_HELLO_INTERVAL_S = 0.3
_LAST_S = 0.7
"""For what is under way at the end."""
_SPARE_S = 30.0


@dataclass(frozen=True, slots=True)
class Stream:
    """Datagrams of one application."""

    name: str
    kind: Literal["up", "down", "echo"]
    """To the target, from the target, or there and back."""
    rate: float
    """Datagrams per second."""
    port: int
    """Where the application sends; that arrives at the target."""
    size: int = 1200


@dataclass(slots=True)
class Delivered:
    """What became of a stream's datagrams in the measured time."""

    name: str
    sent: int = 0
    received: int = 0
    """Of those that were sent in the measured time."""
    rate: float = 0.0
    """Arrivals per second in the measured time."""
    goodput_bits: float = 0.0
    """The same as payload bits per second."""
    p50_ms: float = 0.0
    """One way, or there and back for an echo."""
    p99_ms: float = 0.0
    most_ms: float = 0.0
    bins_bits: list[float] = field(default_factory=list)
    """Goodput in each ``BIN_S`` of the measured time."""


BIN_S = 0.25


class _Application:
    """A stream under way."""

    def __init__(self, index: int, stream: Stream) -> None:
        self.index = index
        self.stream = stream
        self.sock = UdpSocket(connect_udp(_HOST, stream.port, buffer_bytes=_BUFFER_BYTES))
        self.is_open = False
        self.tunnel: Address | None = None
        """Where the target sees it."""
        self.padding = bytes(stream.size - _HEAD.size)
        self.most = max(1, min(64, MAX_GSO_BYTES // stream.size))
        self.due = self.sent = self.arrived = 0
        self.delays_ns = array("Q")
        self.bins: dict[int, int] = {}


class _Load:
    def __init__(
        self, streams: Sequence[Stream], target_port: int, warm_up_s: float, seconds: float
    ) -> None:
        self._target = UdpSocket(bind_udp(_HOST, target_port, buffer_bytes=_BUFFER_BYTES))
        self._applications = [_Application(*each) for each in enumerate(streams)]
        self._by_descriptor = {each.sock.fileno(): each for each in self._applications}
        self._warm_up_s = warm_up_s
        self._seconds = seconds
        self._begin_ns = self._end_ns = 0

    def run(self) -> list[Delivered]:
        self._open()
        begin = time.monotonic_ns()
        self._begin_ns = begin + int(self._warm_up_s * 1e9)
        self._end_ns = self._begin_ns + int(self._seconds * 1e9)
        turns = deque(self._applications)
        while (now := time.monotonic_ns()) < self._end_ns:
            turns.rotate(1)  # nobody is always the last of a burst, where a queue is full
            for application in turns:
                self._send_due(application, (now - begin) / 1e9, now)
            self._receive((now + int(_TICK_S * 1e9) - time.monotonic_ns()) / 1e9)
        end = now + int(_LAST_S * 1e9)
        while time.monotonic_ns() < end:
            self._receive(0.05)
        return [self._delivered(application) for application in self._applications]

    def _open(self) -> None:
        deadline = time.monotonic() + _OPENING_DEADLINE_S
        while waiting := [each for each in self._applications if not each.is_open]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no way to the target for {waiting[0].stream.name}")
            for application in waiting:
                application.sock.send(_HEAD.pack(application.index, 0) + application.padding, 0)
            until = time.monotonic() + _HELLO_INTERVAL_S
            while time.monotonic() < until and not all(each.is_open for each in waiting):
                self._receive(0.01)

    def _send_due(self, application: _Application, elapsed_s: float, now: int) -> None:
        stream = application.stream
        due = int(stream.rate * elapsed_s)
        application.due = max(application.due, due - int(stream.rate * _MOST_DEBT_S) - 1)
        head = _HEAD.pack(application.index, now)
        while application.due < due:
            count = min(due - application.due, application.most)
            application.due += count
            payloads = (head + application.padding) * count
            if stream.kind == "down":
                result = self._target.send(payloads, stream.size, application.tunnel)
            else:
                result = application.sock.send(payloads, stream.size)
            if result is SendResult.SENT and now >= self._begin_ns:
                application.sent += count

    def _receive(self, wait_s: float) -> None:
        target = self._target.fileno()
        for ready in select.select([target, *self._by_descriptor], [], [], max(0.0, wait_s))[0]:
            if ready == target:
                while (batch := self._target.receive()) is not None:
                    self._take_at_target(bytes(batch[0]), *batch[1:])
            else:
                application = self._by_descriptor[ready]
                while (batch := application.sock.receive()) is not None:
                    self._take_at_application(application, bytes(batch[0]))

    def _take_at_target(self, payloads: bytes, segment_size: int, source: Address) -> None:
        index, stamp = _HEAD.unpack_from(payloads)
        application = self._applications[index]
        if not stamp:
            application.tunnel = source
            self._target.send(payloads, segment_size, source)
        elif application.stream.kind == "echo":
            self._target.send(payloads, segment_size, source)
        else:
            self._count(application, payloads)

    def _take_at_application(self, application: _Application, payloads: bytes) -> None:
        if _HEAD.unpack_from(payloads)[1]:
            self._count(application, payloads)
        else:
            application.is_open = True

    def _count(self, application: _Application, payloads: bytes) -> None:
        now = time.monotonic_ns()
        size = application.stream.size
        count = len(payloads) // size
        if self._begin_ns <= now < self._end_ns:
            application.arrived += count
            place = int((now - self._begin_ns) / 1e9 / BIN_S)
            application.bins[place] = application.bins.get(place, 0) + count
        for start in range(0, len(payloads), size):
            stamp = _HEAD.unpack_from(payloads, start)[1]
            if stamp >= self._begin_ns:
                application.delays_ns.append(now - stamp)

    def _delivered(self, application: _Application) -> Delivered:
        delays = sorted(application.delays_ns)
        count = len(delays)
        bits = application.stream.size * 8
        delivered = Delivered(
            application.stream.name,
            sent=application.sent,
            received=count,
            rate=application.arrived / self._seconds,
            goodput_bits=application.arrived * bits / self._seconds,
            bins_bits=[
                application.bins.get(place, 0) * bits / BIN_S
                for place in range(int(self._seconds / BIN_S))
            ],
        )
        if count:
            delivered.p50_ms = delays[count // 2] / 1e6
            delivered.p99_ms = delays[min(count - 1, int(count * 0.99))] / 1e6
            delivered.most_ms = delays[-1] / 1e6
        return delivered


def carry(
    streams: Sequence[Stream], target_port: int, *, warm_up_s: float, seconds: float
) -> list[Delivered]:
    """Run the streams in a process of their own; what became of each, in their order."""
    arguments: dict[str, Any] = {
        "streams": [asdict(stream) for stream in streams],
        "target_port": target_port,
        "warm_up_s": warm_up_s,
        "seconds": seconds,
    }
    done = subprocess.run(
        [sys.executable, "-m", "integration.bench.path_load", json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=_OPENING_DEADLINE_S + warm_up_s + seconds + _SPARE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the load failed:\n{done.stderr}")
    return [Delivered(**each) for each in json.loads(done.stdout)]


def main() -> None:
    """Entry point of the load's process."""
    arguments = json.loads(sys.argv[1])
    streams = [Stream(**each) for each in arguments.pop("streams")]
    print(json.dumps([asdict(each) for each in _Load(streams, **arguments).run()]), flush=True)


if __name__ == "__main__":
    main()
