"""Thousands of connections and tunnels in one client process: one engine, one UDP socket.

``crowds`` starts such processes and is how the benchmark talks to them: one command at a time
each, a line of JSON, answered by another. ``python -m integration.bench.crowd`` is the process.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from integration.bench.figures import Figures
from integration.processes import Gateway
from toppy.net.udp_socket import SendResult, UdpSocket, bind_udp
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import (
    H3_ALPN,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.engine import ConnectionClosed, DatagramGroup, EngineConfig
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.connect_udp import FORWARD_PATH_PREFIX, request_headers

_BUFFER_BYTES = 32 << 20
_BATCHES_PER_TURN = 64
_TICK_S = 0.001
"""Datagrams that are due within a tick are sent together."""
_LAST_S = 0.4
"""For what is under way when the last datagram was sent."""
_HEAD = struct.Struct("=Q")  # nanoseconds when it was sent
_STARTUP_S = 20.0
_MARGIN_S = 30.0
"""Beyond what a command is to take."""
_MOST_SAMPLES = 20_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a crowd process is told at birth."""

    host: str
    port: int
    authority: str
    token: str
    ca: str
    target_host: str
    target_port: int
    keep_alive_s: float = 5.0
    """As ``toppy udp``; an idle client is heard so often."""
    idle_timeout_s: float = 20.0
    resumes_sessions: bool = False
    """Whether the handshakes after the first one may do without a certificate."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many are begun, and when."""

    count: int
    deadline_s: float
    rate: float | None = None
    """Per second, however long each takes; None: as fast as ``at_once`` lets."""
    at_once: int = 1
    """Under way at any time, where there is no rate."""
    after_s: float = 0.0
    """When the first is due."""


@dataclass(slots=True)
class _Work:
    """Things that are begun at a pace, or so many at once, and end one by one."""

    with_tunnel: bool = False
    """A connection counts when its first tunnel is open."""
    due: dict[Any, float] = field(default_factory=dict)
    """When each that is under way was due to begin."""
    ms: list[float] = field(default_factory=list)
    """How long each took, from when it was due."""
    connected_ms: list[float] = field(default_factory=list)
    """Of these, until the connection was there, with its SETTINGS."""
    failures: Counter[str] = field(default_factory=Counter)

    def end(self, key: object, now: float, failure: str = "") -> None:
        """One is over; how long it took counts when there was no failure."""
        due = self.due.pop(key, None)
        if due is None:
            return
        if failure:
            self.failures[failure] += 1
        else:
            self.ms.append(round((now - due) * 1e3, 3))


class Crowd:
    """Connections to one gateway, and tunnels on them, in a plain loop without ``asyncio``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._address = (plan.host, plan.port)
        self._engine = make_engine(
            "auto",
            EngineConfig(
                is_client=True,
                alpn_protocols=(H3_ALPN,),
                ca_certificates_pem=Path(plan.ca).read_bytes(),
                idle_timeout_s=plan.idle_timeout_s,
                keep_alive_s=plan.keep_alive_s,
                resumes_sessions=plan.resumes_sessions,
            ),
            now=time.monotonic(),
        )
        self._endpoint = Endpoint(self._engine, is_client=True)
        local = "::" if ":" in plan.host else "0.0.0.0"
        self._socket = UdpSocket(bind_udp(local, 0, buffer_bytes=_BUFFER_BYTES))
        target = f"{plan.target_host.replace(':', '%3A')}/{plan.target_port}/"
        self._headers = request_headers(plan.authority, FORWARD_PATH_PREFIX + target, plan.token)
        self._connections: list[int] = []
        self._tunnels: list[tuple[int, int]] = []
        """(connection, stream ID)."""
        self._waiting: list[tuple[int, float]] = []
        """Tunnels that no stream was free for: (connection, when they were due)."""
        self._lost: Counter[str] = Counter()
        """Connections and tunnels that ended without being told to, by reason."""
        self._work = _Work()
        self._round_trips_us: list[float] = []
        self._received = 0
        self._input = b""

    # the loop

    def serve(self) -> None:
        """Obey until standard input ends."""
        print(json.dumps({"engine": self._engine.name}), flush=True)
        stdin = sys.stdin.fileno()
        while True:
            self._turn(time.monotonic() + 1.0, stdin)
            line, found, rest = self._input.partition(b"\n")
            if found:
                self._input = rest
                print(json.dumps(self._obey(**json.loads(line))), flush=True)
            elif self._input.endswith(b"\0"):
                return

    def _obey(self, do: str, **details: Any) -> Figures:
        commands: dict[str, Callable[..., Figures]] = {
            "connect": self.connect,
            "open": self.open,
            "send": self.send,
            "close_tunnels": self.close_tunnels,
            "close": self.close,
            "count": self.count,
        }
        return commands[do](**details)

    def _turn(self, until: float, stdin: int | None = None) -> None:
        """Send what there is, wait for what comes, until a moment at most, and handle it."""
        self._flush()
        due = self._endpoint.next_timeout()
        wait = max(0.0, min(until, until if due is None else due) - time.monotonic())
        readers = [self._socket.fileno()] if stdin is None else [self._socket.fileno(), stdin]
        ready = select.select(readers, [], [], wait)[0]
        now = time.monotonic()
        if stdin in ready:
            # a zero byte, which JSON cannot have, stands for the end
            self._input += os.read(readers[1], 1 << 16) or b"\0"
        if readers[0] in ready:
            for _ in range(_BATCHES_PER_TURN):
                batch = self._socket.receive()
                if batch is None:
                    break
                self._endpoint.receive(*batch, now)
        due = self._endpoint.next_timeout()
        if due is not None and due <= now:
            self._endpoint.handle_timeout(now)
        for event in self._endpoint.poll_events(now):
            self._handle(event, now)
        groups = self._endpoint.poll_datagrams()
        if groups:
            self._receive(groups)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._ask(*each)
        self._flush()

    def _flush(self) -> None:
        for payloads, segment_size, address in self._endpoint.poll_transmits(time.monotonic()):
            unsent: bytes | memoryview = payloads
            while self._socket.send(unsent, segment_size, address) is SendResult.WOULD_BLOCK:
                unsent = memoryview(unsent)[self._socket.sent_bytes :]
                select.select([], [self._socket.fileno()], [], 1.0)

    def _handle(self, event: EndpointEvent, now: float) -> None:
        match event:
            case ConnectionOpened(connection=connection):
                self._connections.append(connection)
                due = self._work.due.get(connection)
                if due is None:
                    return
                self._work.connected_ms.append(round((now - due) * 1e3, 3))
                if self._work.with_tunnel:
                    del self._work.due[connection]
                    self._ask(connection, due)
                else:
                    self._work.end(connection, now)
            case HeadersReceived(connection=connection, stream_id=stream_id, headers=headers):
                status = dict(headers)[b":status"].decode()
                if status == "200":
                    self._tunnels.append((connection, stream_id))
                self._work.end(
                    (connection, stream_id), now, "" if status == "200" else f"status {status}"
                )
            case StreamAborted(connection=connection, stream_id=stream_id, error_code=code):
                self._work.end((connection, stream_id), now, f"stream aborted with {code:#x}")
            case ConnectionClosed(connection=connection, reason=reason):
                self._forget(connection, reason, now)
            case _:
                pass

    def _forget(self, connection: int, reason: str, now: float) -> None:
        self._work.end(connection, now, reason)
        for key in [each for each in self._work.due if self._is_on(each, connection)]:
            self._work.end(key, now, reason)
        if connection in self._connections:
            self._connections.remove(connection)
            self._tunnels = [each for each in self._tunnels if each[0] != connection]
            self._lost[reason] += 1

    @staticmethod
    def _is_on(key: object, connection: int) -> bool:
        return isinstance(key, tuple) and key[0] == connection

    # commands

    def connect(self, *, with_tunnel: bool = False, **pace: Any) -> Figures:
        """Open connections, at a ``Pace``."""
        self._work = _Work(with_tunnel=with_tunnel)

        def begin(due: float) -> None:
            now = time.monotonic()
            connection = self._endpoint.connect(self._address, "localhost", now)
            self._work.due[connection] = due

        return self._do(begin, Pace(**pace))

    def open(self, **pace: Any) -> Figures:
        """Open tunnels, in turn on each connection that there is, at a ``Pace``."""
        self._work = _Work()
        turn = len(self._tunnels)

        def begin(due: float) -> None:
            nonlocal turn
            self._ask(self._connections[turn % len(self._connections)], due)
            turn += 1

        return self._do(begin, Pace(**pace))

    def _ask(self, connection: int, due: float) -> None:
        stream_id = self._endpoint.send_request(connection, self._headers)
        if stream_id is None:
            self._waiting.append((connection, due))
        else:
            self._work.due[connection, stream_id] = due

    def _do(self, begin: Callable[[float], None], pace: Pace) -> Figures:
        work = self._work
        first = time.monotonic() + pace.after_s
        begun = 0
        while begun < pace.count or work.due or self._waiting:
            now = time.monotonic()
            if now - first > pace.deadline_s:
                unfinished = pace.count - begun + len(work.due) + len(self._waiting)
                work.failures["not in time"] += unfinished
                work.due.clear()
                self._waiting.clear()
                break
            if pace.rate is None:
                while begun < pace.count and len(work.due) < pace.at_once:
                    begin(now)
                    begun += 1
                until = now + 1.0
            else:
                while begun < pace.count and (due := first + begun / pace.rate) <= now:
                    begin(due)
                    begun += 1
                until = first + begun / pace.rate if begun < pace.count else now + 1.0
            self._turn(until)
        return {
            "done": len(work.ms),
            "seconds": time.monotonic() - first,
            "ms": work.ms,
            "connected_ms": work.connected_ms,
            "failures": dict(work.failures),
        }

    def send(self, *, rate: float, seconds: float, size: int) -> Figures:
        """Send stamped datagrams at a steady rate, each tunnel in its turn; count what returns."""
        self._received, self._round_trips_us = 0, []
        tunnels = len(self._tunnels)
        sent = turn = 0
        begin = time.monotonic()
        while tunnels and (now := time.monotonic()) < begin + seconds:
            due = int((now - begin) * rate) - sent
            if due > 0:
                sent += due
                payload = _HEAD.pack(time.perf_counter_ns()).ljust(size, b"\0")
                # what falls to one tunnel goes there as one batch
                share, more = divmod(due, tunnels)
                for index in range(min(due, tunnels)):
                    connection, stream_id = self._tunnels[turn % tunnels]
                    turn += 1
                    payloads = payload * (share + (index < more))
                    self._engine.send_datagrams(connection, stream_id // 4, payloads, size)
            tick_end = now + _TICK_S
            while time.monotonic() < tick_end:
                self._turn(tick_end)
        end = time.monotonic() + _LAST_S
        while (now := time.monotonic()) < end:
            self._turn(end)
        every = -(-len(self._round_trips_us) // _MOST_SAMPLES) or 1
        return {
            "sent": sent,
            "received": self._received,
            "seconds": seconds,
            "us": [round(each, 1) for each in self._round_trips_us[::every]],
        }

    def _receive(self, groups: list[DatagramGroup]) -> None:
        now = time.perf_counter_ns()
        for _, _, payloads, segment_size in groups:
            # one stamp for a batch: what one tunnel gets at once was sent at once
            self._received += -(-len(payloads) // segment_size) if segment_size else 1
            if len(payloads) >= _HEAD.size:
                self._round_trips_us.append((now - _HEAD.unpack_from(payloads)[0]) / 1e3)

    def close_tunnels(self, *, keep: int) -> Figures:
        """End the newest tunnels."""
        while len(self._tunnels) > keep:
            connection, stream_id = self._tunnels.pop()
            self._endpoint.send_body(connection, stream_id, b"", end=True)
            self._turn(0.0)
        return self.count()

    def close(self) -> Figures:
        """Say goodbye on every connection."""
        connections, self._connections, self._tunnels = self._connections, [], []
        for connection in connections:
            self._endpoint.close(connection, H3_NO_ERROR, "", time.monotonic())
            self._turn(0.0)
        return self.count()

    def count(self) -> Figures:
        """What there is."""
        return {
            "connections": len(self._connections),
            "tunnels": len(self._tunnels),
            "lost": dict(self._lost),
        }


class CrowdProcess:
    """A crowd in a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.bench.crowd"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process = psutil.Process(self._process.pid)
        self._pending = b""
        self._write({name: getattr(plan, name) for name in Plan.__slots__})

    def tell(self, do: str, **details: Any) -> None:
        """Begin a command; ``answer`` waits for its end."""
        self._write({"do": do, **details})

    def ask(self, do: str, **details: Any) -> Figures:
        """One command to its end."""
        return together([self], do, [details])[0]

    def _write(self, message: Figures) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, deadline_s: float) -> Figures:
        """The result of the command under way; ``TimeoutError`` when there is none in time."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + deadline_s
        while b"\n" not in self._pending:
            wait = end - time.monotonic()
            if wait <= 0 or not select.select([descriptor], [], [], wait)[0]:
                raise TimeoutError(f"a crowd has not answered within {deadline_s:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise AssertionError("a crowd process has ended")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        found: Figures = json.loads(line)
        return found

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def crowds(
    gateway: Gateway, target: tuple[str, int], *, count: int = 2, resumes_sessions: bool = False
) -> Iterator[list[CrowdProcess]]:
    """Client processes whose tunnels lead to ``target``."""
    plan = Plan(
        gateway.host,
        gateway.port,
        f"localhost:{gateway.port}",
        gateway.token,
        str(gateway.directory / "ca.pem"),
        *target,
        resumes_sessions=resumes_sessions,
    )
    started: list[CrowdProcess] = []
    try:
        for _ in range(count):
            started.append(CrowdProcess(plan))
        for each in started:
            each.answer(_STARTUP_S)
        yield started
    finally:
        for each in started:
            each.stop()


def together(members: Sequence[CrowdProcess], do: str, details: Sequence[Figures]) -> list[Figures]:
    """One command to each at the same time, with details of its own; all results."""
    for member, mine in zip(members, details, strict=True):
        member.tell(do, **mine)
    deadline_s = (
        max(float(each.get("deadline_s") or each.get("seconds") or 0.0) for each in details) + 60.0
    )
    return [member.answer(deadline_s) for member in members]


def shares(total: int, members: int) -> list[int]:
    """``total`` things among so many, as equal as can be."""
    return [total // members + (index < total % members) for index in range(members)]


def main() -> None:
    """Entry point of a crowd's process: the first line of standard input is its plan."""
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(sys.stdin.fileno(), 1)
        if not read:
            return
        line += read
    Crowd(Plan(**json.loads(line))).serve()


if __name__ == "__main__":
    main()
