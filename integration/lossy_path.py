"""A path with a rate, a delay, loss and a bounded queue, between UDP programs; no root needed.

``python -m integration.lossy_path JSON`` is a process that relays between whoever sends to its
port and one target. Each sender is a flow with a socket of its own towards the target, so that
answers find back. In each direction, as on a line between two routers:

1. A drop-tail queue of ``queue_bytes``: what finds it full is dropped.
2. The line takes one packet after the other at ``rate_bits``; a packet counts with its IP and UDP
   headers.
3. A packet that the line took is lost with probability ``loss`` (seeded), or arrives ``delay_s``
   later.

Why a relay and not two network namespaces with TAPs between them: it needs no privilege, leaves
nothing behind, and moves batches (GSO, GRO) where a TAP moves one frame per system call.

Every line on its standard input is answered by one line of JSON: what happened since the last
question. It ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from integration.path_process import PathProcess, running_path_process
from toppy.net.udp_socket import SendResult, UdpSocket, bind_udp, connect_udp
from toppy.quic.engine import Address, Buffer

IP_AND_UDP_BYTES = 28
"""IPv4's header and UDP's."""
TICK_S = 0.0005
"""What is due within one tick leaves together; so long may a packet be late by design."""
MAX_FLOWS = 64
_ROUNDING_S = 1e-9
_SOCKET_BUFFER_BYTES = 16 << 20
_RECEIVES_PER_WAKE_UP = 64


@dataclass(frozen=True, slots=True)
class PathSettings:
    """The same in both directions."""

    rate_bits: float
    """Bits per second, IP and UDP headers included."""
    delay_s: float
    """One way, without the queue."""
    loss: float = 0.0
    """Probability, 0 to 1, independent for each packet."""
    queue_bytes: int = 0
    """0: what the rate carries in a round trip (one bandwidth-delay product)."""
    seed: int = 1

    @property
    def round_trip_s(self) -> float:
        return 2 * self.delay_s

    @property
    def largest_queue_bytes(self) -> int:
        """The queue's bound."""
        return self.queue_bytes or int(self.rate_bits / 8 * self.round_trip_s)


@dataclass(slots=True)
class Counts:
    """What one direction did; all but ``waiting`` since the last question."""

    arrived: int = 0
    queue_full: int = 0
    lost: int = 0
    carried: int = 0
    waiting: int = 0
    """In the queue or on the line."""
    carried_bytes: int = 0
    """With IP and UDP headers."""
    queue_s: float = 0.0
    """Sum, over the packets that were not dropped, of the time that they waited in the queue."""
    sizes: dict[int, int] = field(default_factory=dict)
    """UDP payload bytes of what was carried: how often."""
    most_late_s: float = 0.0
    """The emulator's own fault: how much later than due a packet left."""


class Link:
    """One direction, without sockets and clock."""

    def __init__(self, settings: PathSettings, seed: int) -> None:
        self._byte_s = 8 / settings.rate_bits
        self._delay_s = settings.delay_s
        self._loss = settings.loss
        self._queue_s = settings.largest_queue_bytes * self._byte_s
        self._random = random.Random(seed).random
        self._free_at = 0.0
        """When the line has sent all that is in the queue."""
        self._line: deque[tuple[float, int, bytes]] = deque()
        self._counts = Counts()

    def take(self, flow: int, payloads: Buffer, segment_size: int, now: float) -> None:
        """Packets arrive: each ``segment_size`` long, the last may be shorter; 0: one packet."""
        counts = self._counts
        size = len(payloads)
        step = segment_size or max(1, size)
        for start in range(0, max(1, size), step):
            payload = bytes(payloads[start : start + step])
            counts.arrived += 1
            waits_s = max(0.0, self._free_at - now)
            takes_s = (len(payload) + IP_AND_UDP_BYTES) * self._byte_s
            if waits_s + takes_s > self._queue_s + _ROUNDING_S:
                counts.queue_full += 1
                continue
            counts.queue_s += waits_s
            self._free_at = now + waits_s + takes_s
            if self._random() < self._loss:
                counts.lost += 1
                continue
            self._line.append((self._free_at + self._delay_s, flow, payload))

    def next_due(self) -> float | None:
        """When ``release`` will have something."""
        return self._line[0][0] if self._line else None

    def release(self, now: float) -> Iterator[tuple[int, bytes, int]]:
        """What has come through by ``now``: (flow, payloads, segment size), joined where one send
        can take them.
        """
        line, counts = self._line, self._counts
        if line and now >= line[0][0]:
            counts.most_late_s = max(counts.most_late_s, now - line[0][0])
        while line and line[0][0] <= now:
            _, flow, payload = line.popleft()
            size = len(payload)
            run = [payload]
            while size and line and line[0][0] <= now and line[0][1] == flow:
                following = line[0][2]
                if not following or len(following) > size:
                    break
                run.append(following)
                line.popleft()
                if len(following) < size:  # only the last may be shorter
                    break
            payloads = b"".join(run)
            counts.carried += len(run)
            counts.carried_bytes += len(payloads) + len(run) * IP_AND_UDP_BYTES
            for each, count in ((size, len(run) - 1), (len(run[-1]), 1)):
                if count:
                    counts.sizes[each] = counts.sizes.get(each, 0) + count
            yield flow, payloads, size if len(run) > 1 else 0

    def take_counts(self) -> Counts:
        """Since the last time."""
        counts, self._counts = self._counts, Counts()
        counts.waiting = len(self._line)
        return counts


class _Relay:
    """The links and their sockets."""

    def __init__(self, host: str, port: int, target: Address, settings: PathSettings) -> None:
        self._target = target
        self._near = UdpSocket(bind_udp(host, port, buffer_bytes=_SOCKET_BUFFER_BYTES))
        self._to_target = Link(settings, settings.seed)
        self._to_sender = Link(settings, settings.seed + 1)
        self._flows: dict[Address, int] = {}
        self._far: list[tuple[UdpSocket, Address]] = []
        """By flow: towards the target, and the sender."""
        self._by_descriptor: dict[int, int] = {}
        self._refused = self._unsent = 0
        self._overflow_before = 0

    def run(self) -> None:
        """Until the standard input ends."""
        questions = sys.stdin.fileno()
        near = self._near.fileno()
        next_release = 0.0
        while True:
            due = self._next_due()
            wait_s = None
            if due is not None:
                wait_s = max(0.0, max(due, next_release) - time.monotonic())
            ready = select.select([questions, near, *self._by_descriptor], [], [], wait_s)[0]
            for descriptor in ready:
                if descriptor == questions:
                    if not os.read(questions, 4096):
                        return
                    print(json.dumps(self._take_counts()), flush=True)
                elif descriptor == near:
                    self._receive_from_senders()
                else:
                    self._receive_from_target(self._by_descriptor[descriptor])
            now = time.monotonic()
            if now >= next_release:
                next_release = now + TICK_S
                self._release(now)

    def _next_due(self) -> float | None:
        dues = [due for link in self._links() if (due := link.next_due()) is not None]
        return min(dues, default=None)

    def _links(self) -> tuple[Link, Link]:
        return self._to_target, self._to_sender

    def _receive_from_senders(self) -> None:
        for _ in range(_RECEIVES_PER_WAKE_UP):
            batch = self._near.receive()
            if batch is None:
                break
            flow = self._flows.get(batch[2])
            if flow is None:
                flow = self._add_flow(batch[2])
            if flow is not None:
                self._to_target.take(flow, batch[0], batch[1], time.monotonic())

    def _add_flow(self, sender: Address) -> int | None:
        if len(self._far) >= MAX_FLOWS:
            self._refused += 1
            return None
        far = connect_udp(*self._target, buffer_bytes=_SOCKET_BUFFER_BYTES, may_fragment=False)
        flow = self._flows[sender] = len(self._far)
        self._far.append((UdpSocket(far), sender))
        self._by_descriptor[far.fileno()] = flow
        return flow

    def _receive_from_target(self, flow: int) -> None:
        for _ in range(_RECEIVES_PER_WAKE_UP):
            batch = self._far[flow][0].receive()
            if batch is None:
                break
            self._to_sender.take(flow, batch[0], batch[1], time.monotonic())

    def _release(self, now: float) -> None:
        for flow, payloads, segment_size in self._to_target.release(now):
            if self._far[flow][0].send(payloads, segment_size) is not SendResult.SENT:
                self._unsent += 1
        for flow, payloads, segment_size in self._to_sender.release(now):
            if self._near.send(payloads, segment_size, self._far[flow][1]) is not SendResult.SENT:
                self._unsent += 1

    def _take_counts(self) -> dict[str, Any]:
        overflow = self._near.overflow + sum(far.overflow for far, _ in self._far)
        answer = {
            "to_target": asdict(self._to_target.take_counts()),
            "to_sender": asdict(self._to_sender.take_counts()),
            "failures": self._refused + self._unsent + overflow - self._overflow_before,
            "cpu_s": time.process_time(),
            "flows": len(self._far),
        }
        self._refused = self._unsent = 0
        self._overflow_before = overflow
        return answer


@dataclass(frozen=True, slots=True)
class PathReport:
    """What both directions did since the last question."""

    to_target: Counts
    to_sender: Counts
    failures: int
    """Packets, or batches, that the emulator itself could not receive or send: its figures are
    worth nothing then."""
    cpu_s: float
    """Of the emulator's process, since its start."""
    flows: int


@dataclass(frozen=True, slots=True)
class RunningPath:
    """A path in a process of its own: send to ``host`` and ``port``."""

    host: str
    port: int
    process: PathProcess

    def report(self) -> PathReport:
        """Ask it. Raises ``TimeoutError``, or ``RuntimeError`` when it has ended."""
        answer = self.process.ask()
        for direction in ("to_target", "to_sender"):
            counts = answer[direction]
            sizes = {int(size): count for size, count in counts.pop("sizes").items()}
            answer[direction] = Counts(**counts, sizes=sizes)
        return PathReport(**answer)


@contextlib.contextmanager
def running_path(
    port: int, target: Address, settings: PathSettings, *, host: str = "127.0.0.1"
) -> Iterator[RunningPath]:
    """A path from ``host`` and ``port`` to ``target``."""
    arguments = {"host": host, "port": port, "target": target, "settings": asdict(settings)}
    with running_path_process("integration.lossy_path", arguments) as process:
        path = RunningPath(host, port, process)
        path.report()  # it is there
        yield path


def main() -> None:
    """Entry point of the path's process."""
    arguments = json.loads(sys.argv[1])
    _Relay(
        arguments["host"],
        arguments["port"],
        tuple(arguments["target"]),
        PathSettings(**arguments["settings"]),
    ).run()


if __name__ == "__main__":
    main()
