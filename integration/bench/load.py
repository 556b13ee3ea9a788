"""Load generator, sink and echo client, each a process; batched, so that none is the bottleneck.

``python -m integration.bench.load KIND …`` prints one JSON object on standard output.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import sys
import time

from toppy.net.udp_socket import SendResult, UdpSocket, bind_udp, connect_udp

_BUFFER_BYTES = 32 << 20
_BATCH = 16
_WARM_UP_S = 0.7
_NUMBER_BYTES = 8


def generate(port: int, rate: float, size: int, seconds: float) -> dict[str, float]:
    """Send ``rate`` datagrams/s in batches of 16, after one that opens the tunnel."""
    udp = UdpSocket(connect_udp("127.0.0.1", port, buffer_bytes=_BUFFER_BYTES))
    batch = bytes(size * _BATCH)
    udp.send(bytes(size), 0)
    time.sleep(_WARM_UP_S)
    sent = 1
    blocked = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        if sent >= rate * elapsed:
            time.sleep(0.0002)
        elif udp.send(batch, size) is SendResult.SENT:
            sent += _BATCH
        else:
            blocked += 1
    return {"sent": sent, "seconds": time.perf_counter() - begin, "blocked": blocked}


def sink(port: int) -> dict[str, float]:
    """Count what arrives until SIGTERM."""
    udp = UdpSocket(bind_udp("127.0.0.1", port, buffer_bytes=_BUFFER_BYTES, may_fragment=True))
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    print("ready", file=sys.stderr, flush=True)
    received = 0
    while not stopping:
        if select.select([udp.fileno()], [], [], 0.2)[0]:
            while (batch := udp.receive()) is not None:
                received += -(-len(batch[0]) // batch[1]) if batch[1] else 1
    return {"received": received, "overflow": udp.overflow}


def echo(port: int, rate: float, size: int, seconds: float) -> dict[str, float]:
    """Round trips at a steady rate: median and 99th percentile in microseconds."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(2.0)
        sock.send(bytes(size))
        sock.recv(65535)
        sock.setblocking(False)
        sent_at: list[float] = []
        round_trips: list[float] = []
        begin = time.perf_counter()
        end = begin + seconds
        while (now := time.perf_counter()) < end + 0.3:
            due = begin + len(sent_at) / rate
            if now >= due and now < end:
                sock.send(len(sent_at).to_bytes(_NUMBER_BYTES) + bytes(size - _NUMBER_BYTES))
                sent_at.append(now)
                continue
            wait = max(0.0, min(due, end + 0.3) - now)
            if select.select([sock], [], [], wait)[0]:
                number = int.from_bytes(sock.recv(65535)[:_NUMBER_BYTES])
                round_trips.append(time.perf_counter() - sent_at[number])
        round_trips.sort()
    count = len(round_trips)
    return {
        "sent": len(sent_at),
        "received": count,
        "p50_us": round_trips[count // 2] * 1e6 if count else 0.0,
        "p99_us": round_trips[count * 99 // 100] * 1e6 if count else 0.0,
    }


def main() -> None:
    """Entry point of one load process."""
    kind, *arguments = sys.argv[1:]
    if kind == "generate":
        port, rate, size, seconds = arguments
        result = generate(int(port), float(rate), int(size), float(seconds))
    elif kind == "sink":
        result = sink(int(arguments[0]))
    else:
        port, rate, size, seconds = arguments
        result = echo(int(port), float(rate), int(size), float(seconds))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
