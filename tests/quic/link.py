"""A network of engines in virtual time: deterministic, with loss, delay, reordering and rebinding.

A test makes engines with ``server_engine`` and ``client_engine``, attaches them to a ``Link`` at an
address, and lets time pass with ``run_until`` and ``run_for``. What the engines report is
collected in each ``End``.
"""

from __future__ import annotations

import heapq
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from tests.quic.certificates import SERVER_NAME, certificates
from toppy.model.drop_reason import DropReason
from toppy.quic.engine import (
    Address,
    Admission,
    ConnectionClosed,
    Engine,
    EngineConfig,
    Event,
    Gate,
    HandshakeCompleted,
    StreamDataReceived,
)

START = 1000.0
"""When the virtual clock starts."""
SERVER: Address = ("192.0.2.1", 4433)
CLIENT: Address = ("198.51.100.7", 50000)
NOBODY: Address = ("203.0.113.9", 999)
E = TypeVar("E")


def make_engine(
    name: str, config: EngineConfig, *, gate: Gate | None = None, now: float = START
) -> Engine:
    """The engine called ``name``; skips the test when the native one is not built."""
    if name == "aioquic":
        module = importlib.import_module("toppy.quic.aioquic_engine")
        engine: Engine = module.AioquicEngine(config, gate=gate, now=now)
        return engine
    try:
        importlib.import_module("toppy.quic._native")
    except ImportError:
        pytest.skip("the native engine is not built here")
    module = importlib.import_module("toppy.quic.native_engine")
    native: Engine = module.NativeEngine(config, gate=gate, now=now)
    return native


def server_config(**changes: Any) -> EngineConfig:
    """A server's settings: the test certificate, ALPN ``h3``, fixed keys."""
    pki = certificates()
    config = EngineConfig(
        is_client=False,
        alpn_protocols=("h3",),
        certificate_chain_pem=pki.chain_pem,
        private_key_pem=pki.key_pem,
        connection_id_bytes=10,
        reset_key=b"r" * 64,
        token_key=b"t" * 64,
    )
    return replace(config, **changes)


def client_config(**changes: Any) -> EngineConfig:
    """A client's settings: trusts the test root, ALPN ``h3``."""
    config = EngineConfig(
        is_client=True, alpn_protocols=("h3",), ca_certificates_pem=certificates().ca_pem
    )
    return replace(config, **changes)


@dataclass(slots=True)
class End:
    """One engine on the link, and what it has reported so far."""

    engine: Engine
    address: Address
    events: list[Event] = field(default_factory=list)
    groups: list[tuple[int, int, bytes, int]] = field(default_factory=list)
    """Datagram groups as the engine gave them."""
    drops: dict[DropReason, int] = field(default_factory=dict)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def payloads(self, quarter_stream_id: int = 0) -> list[bytes]:
        """UDP payloads that arrived for one tunnel, in order."""
        found = []
        for _, quarter, data, size in self.groups:
            if quarter == quarter_stream_id:
                found += split(data, size)
        return found

    def stream(self, stream_id: int) -> bytes:
        """What arrived on one stream."""
        return b"".join(e.data for e in self.of(StreamDataReceived) if e.stream_id == stream_id)

    def has_ended(self, stream_id: int) -> bool:
        """Whether the FIN of a stream arrived."""
        return any(e.ended for e in self.of(StreamDataReceived) if e.stream_id == stream_id)

    @property
    def closed(self) -> ConnectionClosed | None:
        """The first connection's end, if it came."""
        found = self.of(ConnectionClosed)
        return found[0] if found else None

    @property
    def is_ready(self) -> bool:
        """Whether a handshake was completed."""
        return bool(self.of(HandshakeCompleted))


def split(data: bytes, segment_size: int) -> list[bytes]:
    """The segments of a group or transmit."""
    if segment_size == 0:
        return [data]
    return [data[i : i + segment_size] for i in range(0, len(data), segment_size)]


class Link:
    """Carries UDP datagrams between ends; time moves only in ``run_until`` and ``run_for``.

    On a clean link a transmit of many segments arrives as one buffer, as with GSO and GRO. With
    ``loss``, ``jitter_s`` or ``duplicate`` every datagram goes its own way. With ``bytes_per_s``
    they queue up in front of a bottleneck, one each way, which drops what would wait ``queue_s``.
    """

    def __init__(
        self,
        *,
        delay_s: float = 0.01,
        loss: float = 0.0,
        jitter_s: float = 0.0,
        duplicate: float = 0.0,
        bytes_per_s: float | None = None,
        queue_s: float = 0.03,
        seed: int = 1,
    ) -> None:
        self.now = START
        self.ends: dict[Address, End] = {}
        self.delay_s = delay_s
        self.loss = loss
        self.jitter_s = jitter_s
        self.duplicate = duplicate
        self.bytes_per_s = bytes_per_s
        self.queue_s = queue_s
        self._busy_until: dict[Address, float] = {}
        self.packets: list[tuple[Address, Address, bytes]] = []
        """Every datagram sent: (source, destination, UDP payload)."""
        self.transmits: list[tuple[Address, bytes, int]] = []
        """The same as the engines gave it: (source, UDP payloads, segment size)."""
        self.is_cut = False
        """While true, everything sent is lost."""
        self._random = random.Random(seed)
        self._flying: list[tuple[float, int, Address, Address, bytes, int]] = []
        self._count = 0

    def attach(self, engine: Engine, address: Address) -> End:
        """Put an engine on the link; an engine that was there before is gone."""
        end = self.ends[address] = End(engine, address)
        return end

    def rebind(self, end: End, address: Address) -> None:
        """A NAT gives the end a new address; packets to the old one are lost."""
        del self.ends[end.address]
        end.address = address
        self.ends[address] = end

    def send(self, source: Address, destination: Address, data: bytes) -> None:
        """Inject a datagram."""
        self._launch(source, destination, data, 0)

    def drain(self, end: End) -> None:
        """Collect what an engine has to say, and send what it has to send."""
        engine = end.engine
        end.events += engine.poll_events()
        end.groups += engine.poll_datagrams()
        for data, segment_size, destination in engine.poll_transmits(self.now):
            check_transmit(data, segment_size)
            self.transmits.append((end.address, data, segment_size))
            self.packets += [
                (end.address, destination, segment) for segment in split(data, segment_size)
            ]
            self._launch(end.address, destination, data, segment_size)
        end.events += engine.poll_events()
        end.groups += engine.poll_datagrams()
        for reason, count in engine.take_drops().items():
            end.drops[reason] = end.drops.get(reason, 0) + count

    def run_until(self, condition: Callable[[], object], limit_s: float = 10.0) -> None:
        """Let time pass until ``condition`` holds; fails after ``limit_s``."""
        self._run(self.now + limit_s, condition)
        if not condition():
            seen = {end.address: str(end.events[-5:])[:2000] for end in self.ends.values()}
            pytest.fail(f"not reached within {limit_s} s of virtual time; last events: {seen}")

    def run_for(self, duration_s: float) -> None:
        """Let ``duration_s`` pass."""
        until = self.now + duration_s
        self._run(until, lambda: False)
        self.now = until

    def _run(self, until: float, condition: Callable[[], object]) -> None:
        for _ in range(1_000_000):
            for end in list(self.ends.values()):
                self.drain(end)
            if condition():
                return
            due = self._next_time()
            if due is None or due > until:
                self.now = max(self.now, until)
                return
            self.now = max(self.now, due)
            while self._flying and self._flying[0][0] <= self.now:
                _, _, source, destination, data, size = heapq.heappop(self._flying)
                receiver = self.ends.get(destination)
                if receiver is not None:
                    receiver.engine.receive(data, size, source, self.now)
            for end in list(self.ends.values()):
                timeout = end.engine.next_timeout()
                if timeout is not None and timeout <= self.now:
                    end.engine.handle_timeout(self.now)
        pytest.fail("the engines never come to rest")

    def _next_time(self) -> float | None:
        times = [self._flying[0][0]] if self._flying else []
        for end in self.ends.values():
            timeout = end.engine.next_timeout()
            if timeout is not None:
                times.append(timeout)
        return min(times, default=None)

    def _launch(self, source: Address, destination: Address, data: bytes, size: int) -> None:
        if self.is_cut:
            return
        if not (self.loss or self.jitter_s or self.duplicate or self.bytes_per_s):
            self._fly(self.delay_s, source, destination, data, size)
            return
        for segment in split(data, size):
            if self._random.random() < self.loss:
                continue
            waits_s = self._queue(source, len(segment))
            if waits_s is None:
                continue
            for _ in range(2 if self._random.random() < self.duplicate else 1):
                delay = self.delay_s + waits_s + self._random.random() * self.jitter_s
                self._fly(delay, source, destination, segment, 0)

    def _queue(self, source: Address, size: int) -> float | None:
        """How long a datagram takes through the bottleneck; None when its queue is full."""
        if self.bytes_per_s is None:
            return 0.0
        waits_s = max(0.0, self._busy_until.get(source, 0.0) - self.now)
        if waits_s > self.queue_s:
            return None
        waits_s += size / self.bytes_per_s
        self._busy_until[source] = self.now + waits_s
        return waits_s

    def _fly(
        self, delay: float, source: Address, destination: Address, data: bytes, size: int
    ) -> None:
        self._count += 1
        heapq.heappush(
            self._flying, (self.now + delay, self._count, source, destination, data, size)
        )


def check_transmit(data: bytes, segment_size: int) -> None:
    """What one GSO send takes: at most 64 segments and 65,507 bytes, none empty."""
    assert data
    assert len(data) <= 65507
    if segment_size:
        assert -(-len(data) // segment_size) <= 64


@dataclass(slots=True)
class Pair:
    """A client and a server with one connection between them, handshake done."""

    link: Link
    client: End
    server: End
    connection: int
    """The client's number for it."""
    accepted: int
    """The server's number for it."""


def connect_pair(
    client_engine: str,
    server_engine: str,
    *,
    client: EngineConfig | None = None,
    server: EngineConfig | None = None,
    gate: Gate | None = None,
    link: Link | None = None,
) -> Pair:
    """Two engines, a link and a connection that is ready for use."""
    link = link or Link()
    server_end = link.attach(
        make_engine(server_engine, server or server_config(), gate=gate, now=link.now), SERVER
    )
    client_end = link.attach(
        make_engine(client_engine, client or client_config(), now=link.now), CLIENT
    )
    connection = client_end.engine.connect(SERVER, SERVER_NAME, link.now)
    link.run_until(lambda: client_end.is_ready and server_end.is_ready)
    accepted = server_end.of(HandshakeCompleted)[0].connection
    return Pair(link, client_end, server_end, connection, accepted)


def attempt(
    engines: tuple[str, str],
    *,
    client: EngineConfig | None = None,
    server: EngineConfig | None = None,
    server_name: str = SERVER_NAME,
) -> tuple[Link, End, End]:
    """A client that tries to connect; nothing has happened yet."""
    link = Link()
    server_end = link.attach(make_engine(engines[1], server or server_config()), SERVER)
    client_end = link.attach(make_engine(engines[0], client or client_config()), CLIENT)
    client_end.engine.connect(SERVER, server_name, link.now)
    return link, client_end, server_end


def numbered(count: int, size: int) -> list[bytes]:
    """Payloads that say which they are."""
    return [index.to_bytes(4, "big") + bytes(size - 4) for index in range(count)]


def numbers(payloads: list[bytes]) -> list[int]:
    return [int.from_bytes(payload[:4], "big") for payload in payloads]


class Gatekeeper:
    """A gate that answers the same each time and remembers what it was asked."""

    def __init__(self, answer: Admission) -> None:
        self.answer = answer
        self.asked: list[tuple[Address, bool]] = []

    def __call__(self, source: Address, is_validated: bool) -> Admission:
        self.asked.append((source, is_validated))
        return self.answer
