"""``python -m integration.docker.traffic PORT``: numbered datagrams to a port that echoes.

At a steady rate, but never many at once, until its standard input ends; then, once the last echoes
are in, it prints what became of them, as JSON.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time

_RATE = 1000
"""Datagrams per second: far below what any engine carries."""
_WINDOW = 100
"""Datagrams under way. On a busy machine any process may stand still for a while, and more would
then overflow the kernel's default socket buffers: a loss that says nothing about the gateway."""
_GIVEN_UP_S = 1.0
"""An echo that is missing for so long no longer holds up the others."""
_QUIET_S = 1.0
"""After the last echo."""
_NUMBER = struct.Struct("!Q")
_PAYLOAD_BYTES = 200


def run(port: int) -> dict[str, int]:
    """Counts of what was sent and of what came back."""
    sent = duplicated = reordered = skipped = given_up = 0
    seen: set[int] = set()
    highest = -1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        begun = last_echo = time.monotonic()
        is_sending = True
        while is_sending or time.monotonic() - last_echo < _QUIET_S:
            readable, _, _ = select.select(
                [sock, *([sys.stdin] if is_sending else [])], [], [], 1e-3
            )
            if sys.stdin in readable:
                is_sending = bool(sys.stdin.read(1))
            if sock in readable:
                (number,) = _NUMBER.unpack_from(sock.recv(65535))
                last_echo = time.monotonic()
                duplicated += number in seen
                reordered += number < highest
                highest = max(highest, number)
                seen.add(number)
            now = time.monotonic()
            if now - last_echo > _GIVEN_UP_S:
                given_up = sent - len(seen)
            due = int((now - begun) * _RATE) - skipped if is_sending else 0
            while sent < due and sent - len(seen) - given_up < _WINDOW:
                sock.send(_NUMBER.pack(sent).ljust(_PAYLOAD_BYTES, b"."))
                sent += 1
            skipped += max(0, due - sent)
    return {
        "sent": sent,
        "lost": sent - len(seen),
        "duplicated": duplicated,
        "reordered": reordered,
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]))))
