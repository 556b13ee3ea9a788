"""Numbered datagrams at a steady rate to an echo far away, and what came back in which order.

A process of its own, so that a test's process stays free: ``running_load`` starts it. It never
sends faster to make up for more than a few milliseconds: a machine that stands still costs rate,
not datagrams.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from toppy.net.udp_socket import SendResult, UdpSocket, connect_udp

MIN_SIZE = 16
_BUFFER_BYTES = 32 << 20
_HEAD = struct.Struct("=QQ")  # number, and nanoseconds when it was sent
_HELLO = 2**64 - 1
"""The number of datagrams that open the tunnel; they are not counted."""
_HELLO_INTERVAL_S = 0.2
_HELLO_DEADLINE_S = 20.0
_TICK_S = 0.001
"""Between two batches."""
_MAX_BATCHES_BEHIND = 5
_QUIET_S = 2.0
"""Nothing came back for so long after the last was sent: nothing will."""
_LAST_DEADLINE_S = 15.0
_ANSWER_DEADLINE_S = 20.0


@dataclass(slots=True)
class LoadReport:
    """What has happened since the start, ``gap_ms`` excepted."""

    sent: int = 0
    received: int = 0
    """Each number once."""
    lost: int = 0
    """While the load runs: those that are still under way, too."""
    duplicated: int = 0
    reordered: int = 0
    """Came after a later one."""
    gap_ms: float = 0.0
    """The longest time without an arrival, since the report before."""
    round_trip_ms: float = 0.0
    """The longest."""
    refused: int = 0
    """Batches that the local socket did not take; nothing of them was sent."""
    overflow: int = 0
    """Came back and did not fit into the receive buffer."""
    rate: float = 0.0
    """Datagrams per second that were sent."""

    @property
    def is_whole(self) -> bool:
        """Everything came back, once, in order."""
        return not (self.lost or self.duplicated or self.reordered)


class Order:
    """Compares numbers that arrive with 0, 1, 2, …"""

    def __init__(self) -> None:
        self.next = 0
        self.duplicated = 0
        self.reordered = 0
        self._missing: set[int] = set()

    @property
    def received(self) -> int:
        return self.next - len(self._missing)

    def take(self, numbers: list[int]) -> None:
        """Numbers in the order of their arrival."""
        if numbers == list(range(self.next, self.next + len(numbers))):
            self.next += len(numbers)
            return
        for number in numbers:
            if number >= self.next:
                self._missing.update(range(self.next, number))
                self.next = number + 1
            elif number in self._missing:
                self._missing.remove(number)
                self.reordered += 1
            else:
                self.duplicated += 1


class _Load:
    def __init__(self, port: int, rate: float, size: int) -> None:
        self._udp = UdpSocket(connect_udp("127.0.0.1", port, buffer_bytes=_BUFFER_BYTES))
        self._size = size
        self._per_tick = max(1, round(rate * _TICK_S))
        self._tick_s = self._per_tick / rate
        self._batch = bytearray(self._per_tick * size)
        self._cut = struct.Struct(f"=QQ{size - _HEAD.size}x")
        self._order = Order()
        self._report = LoadReport()
        self._arrived_at = 0
        self._began_at = self._ended_at = 0.0

    def say_hello(self) -> None:
        """Until the way is open. Raises ``TimeoutError``."""
        hello = _HELLO.to_bytes(8, sys.byteorder).ljust(self._size, b"\0")
        end = time.monotonic() + _HELLO_DEADLINE_S
        while time.monotonic() < end:
            self._udp.send(hello, 0)
            ready = select.select([self._udp.fileno()], [], [], _HELLO_INTERVAL_S)[0]
            if ready and self._udp.receive() is not None:
                return
        raise TimeoutError("no echo of the first datagram")

    def run(self) -> None:
        """Until standard input ends; each line on it asks for a report."""
        inputs = [self._udp.fileno(), sys.stdin.fileno()]
        due = self._began_at = time.monotonic()
        self._arrived_at = time.monotonic_ns()
        while True:
            now = time.monotonic()
            if now >= due:
                self._send()
                due = max(due + self._tick_s, now - _MAX_BATCHES_BEHIND * self._tick_s)
            ready = select.select(inputs, [], [], max(0.0, due - time.monotonic()))[0]
            if inputs[0] in ready:
                self._receive()
            if inputs[1] in ready:
                if not os.read(sys.stdin.fileno(), 64):
                    break
                self._say()
        self._ended_at = time.monotonic()
        self._receive_last()
        self._say()

    def _send(self) -> None:
        sent, size = self._report.sent, self._size
        now = time.monotonic_ns()
        for index in range(self._per_tick):
            _HEAD.pack_into(self._batch, index * size, sent + index, now)
        if self._udp.send(self._batch, size) is SendResult.SENT:
            self._report.sent += self._per_tick
        else:
            # the same numbers again in the next turn, but for those that went out
            self._report.sent += self._udp.sent_bytes // size
            self._report.refused += 1

    def _receive(self) -> None:
        report = self._report
        while (batch := self._udp.receive()) is not None:
            now = time.monotonic_ns()
            payloads = batch[0]
            heads = list(self._cut.iter_unpack(payloads))
            if heads[-1][0] == _HELLO:
                heads = [head for head in heads if head[0] != _HELLO]
                if not heads:
                    continue
            self._order.take([number for number, _ in heads])
            report.gap_ms = max(report.gap_ms, (now - self._arrived_at) / 1e6)
            report.round_trip_ms = max(report.round_trip_ms, (now - heads[0][1]) / 1e6)
            self._arrived_at = now

    def _receive_last(self) -> None:
        end = time.monotonic() + _LAST_DEADLINE_S
        while self._order.received < self._report.sent and time.monotonic() < end:
            if not select.select([self._udp.fileno()], [], [], _QUIET_S)[0]:
                break
            self._receive()

    def _say(self) -> None:
        report, order = self._report, self._order
        report.received = order.received
        report.lost = report.sent - order.received
        report.duplicated = order.duplicated
        report.reordered = order.reordered
        report.overflow = self._udp.overflow
        # what lasts until now is a gap, too
        lasting_ms = (time.monotonic_ns() - self._arrived_at) / 1e6
        if not self._ended_at:
            report.gap_ms = max(report.gap_ms, lasting_ms)
        report.rate = report.sent / ((self._ended_at or time.monotonic()) - self._began_at)
        print(json.dumps(asdict(report)), flush=True)
        report.gap_ms = 0.0


class RunningLoad:
    """The process; ``report`` asks it, ``stop`` ends it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def report(self) -> LoadReport:
        """What has happened so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> LoadReport:
        """What happened, once everything is back or nothing comes any more."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        report = self._read()
        assert self._process.wait(_ANSWER_DEADLINE_S) == 0
        return report

    def _read(self) -> LoadReport:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _ANSWER_DEADLINE_S)[0]:
            raise TimeoutError("the load does not answer")
        line = self._process.stdout.readline()
        assert line, "the load ended; its standard error says why"
        return LoadReport(**json.loads(line))


@contextlib.contextmanager
def running_load(
    port: int, rate: float, size: int = 200, *, enter: Sequence[str] = ()
) -> Iterator[RunningLoad]:
    """``rate`` datagrams/s of ``size`` bytes to a local UDP port behind which something echoes;
    the way is open, the first ones are back. ``enter`` is a command that starts another one in
    the network namespace where the port is.
    """
    assert size >= MIN_SIZE
    with subprocess.Popen(
        [*enter, sys.executable, "-m", "integration.load", str(port), str(rate), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            running = RunningLoad(process)
            running._read()
            while not running.report().received:
                time.sleep(0.02)
            yield running
        finally:
            process.kill()


def main() -> None:
    """Entry point of the load's process."""
    port, rate, size = sys.argv[1:]
    load = _Load(int(port), float(rate), int(size))
    load.say_hello()
    print(json.dumps(asdict(LoadReport())), flush=True)
    load.run()


if __name__ == "__main__":
    main()
