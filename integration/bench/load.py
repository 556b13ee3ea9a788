"""Load generator, sink and echo client, each a process; batched, so that none is the bottleneck.

``python -m integration.bench.load KIND JSON`` prints one JSON object on standard output.
"""

from __future__ import annotations

import json
import select
import signal
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toppy.net.udp_socket import MAX_GSO_BYTES, SendResult, UdpSocket, bind_udp, connect_udp

_BUFFER_BYTES = 32 << 20
_MOST_PER_BATCH = 16
_OPENING_RATE = 400.0
"""Tunnels per second that a generator opens before it begins."""
_WARM_UP_S = 0.7
_HEAD = struct.Struct("=QQ")  # number, and nanoseconds when it was sent
_HELLO = 2**64 - 1
_HELLO_DEADLINE_S = 10.0
_LAST_S = 0.4
"""For what is under way at the end."""
_ECHO_TICK_S = 0.0001


def _connect(host: str, ports: Sequence[int], tunnels: int) -> list[UdpSocket]:
    """``tunnels`` sockets, spread over the ports: a tunnel is opened for each."""
    return [
        UdpSocket(connect_udp(host, ports[number % len(ports)], buffer_bytes=_BUFFER_BYTES))
        for number in range(tunnels)
    ]


def generate(
    *, host: str, ports: Sequence[int], tunnels: int, rate: float, size: int, seconds: float
) -> dict[str, float]:
    """Send ``rate`` datagrams/s in all, in batches of up to 16 per tunnel, after one in each that
    opens it.
    """
    sockets = _connect(host, ports, tunnels)
    per_batch = max(1, min(_MOST_PER_BATCH, MAX_GSO_BYTES // size))
    batch = bytes(size * per_batch)
    for sock in sockets:
        sock.send(bytes(size), 0)
        time.sleep(1 / _OPENING_RATE)
    time.sleep(_WARM_UP_S)
    opened = sent = tunnels
    blocked = turn = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        if sent - opened >= rate * elapsed:
            time.sleep(0.0002)
            continue
        sock = sockets[turn % tunnels]
        if sock.send(batch, size) is SendResult.SENT:
            sent += per_batch
            turn += 1
        else:
            blocked += 1
            sent += sock.sent_bytes // size
    return {"sent": sent, "seconds": time.perf_counter() - begin, "blocked": blocked}


def sink(host: str, ports: Sequence[int]) -> dict[str, float]:
    """Count what arrives at any of the ports until SIGTERM."""
    receivers = {}
    for port in ports:
        udp = UdpSocket(bind_udp(host, port, buffer_bytes=_BUFFER_BYTES, may_fragment=True))
        receivers[udp.fileno()] = udp
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    print("ready", file=sys.stderr, flush=True)
    received = 0
    while not stopping:
        for ready in select.select(list(receivers), [], [], 0.2)[0]:
            udp = receivers[ready]
            while (batch := udp.receive()) is not None:
                received += -(-len(batch[0]) // batch[1]) if batch[1] else 1
    return {"received": received, "overflow": sum(udp.overflow for udp in receivers.values())}


def echo(
    *, host: str, ports: Sequence[int], tunnels: int, rate: float, size: int, seconds: float
) -> dict[str, float]:
    """Round trips of stamped datagrams at a steady rate, in microseconds. Those that are due within
    a tenth of a millisecond go out together; each round trip counts.
    """
    sockets = _connect(host, ports, tunnels)
    by_descriptor = {sock.fileno(): sock for sock in sockets}
    for sock in sockets:
        _open_way(sock, size)
    cut = struct.Struct(f"=QQ{size - _HEAD.size}x")
    round_trips = array("d")
    sent = turn = blocked = 0
    poller = select.epoll()
    for descriptor in by_descriptor:
        poller.register(descriptor, select.EPOLLIN)
    begin = time.perf_counter()
    due_s = 0.0
    while (now := time.perf_counter() - begin) < seconds + _LAST_S:
        if due_s <= now < seconds:
            # never more to make up for than a few milliseconds: a machine that stands still costs
            # rate, not latency
            count = max(1, min(int((now - due_s) * rate) + 1, MAX_GSO_BYTES // size, 64))
            stamp = time.perf_counter_ns()
            batch = bytearray(count * size)
            for index in range(count):
                _HEAD.pack_into(batch, index * size, sent + index, stamp)
            sock = sockets[turn % tunnels]
            turn += 1
            if sock.send(batch, size) is SendResult.SENT:
                sent += count
            else:
                sent += sock.sent_bytes // size
                blocked += 1
            due_s = max(due_s + count / rate, now - 0.005)
            if rate * _ECHO_TICK_S > 1:
                due_s = max(due_s, now + _ECHO_TICK_S)
        limit = due_s if now < seconds else seconds + _LAST_S
        for descriptor, _ in poller.poll(max(0.0, limit - (time.perf_counter() - begin))):
            sock = by_descriptor[descriptor]
            while (received := sock.receive()) is not None:
                arrived = time.perf_counter_ns()
                for number, stamp in cut.iter_unpack(received[0]):
                    if number != _HELLO:
                        round_trips.append((arrived - stamp) / 1e3)
    ordered = sorted(round_trips)
    count = len(ordered)
    result = {"sent": float(sent), "received": float(count), "blocked": float(blocked)}
    for name, share in (("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)):
        result[name] = ordered[min(count - 1, int(count * share))] if count else 0.0
    return result


def _open_way(sock: UdpSocket, size: int) -> None:
    hello = _HELLO.to_bytes(8, sys.byteorder).ljust(size, b"\0")
    end = time.monotonic() + _HELLO_DEADLINE_S
    while time.monotonic() < end:
        sock.send(hello, 0)
        if select.select([sock.fileno()], [], [], 0.5)[0] and sock.receive() is not None:
            return
    raise TimeoutError("no echo of the first datagram")


_KINDS: Mapping[str, Callable[..., dict[str, float]]] = {
    "generate": generate,
    "sink": sink,
    "echo": echo,
}


def start_load(kind: str, **arguments: Any) -> subprocess.Popen[str]:
    """One of the kinds above in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "integration.bench.load", kind, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    """Entry point of a load process."""
    kind, arguments = sys.argv[1:]
    print(json.dumps(_KINDS[kind](**json.loads(arguments))), flush=True)


if __name__ == "__main__":
    main()
