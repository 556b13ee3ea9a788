"""``udp_echo.py serve PORT`` answers every UDP datagram with itself; ``udp_echo.py ask PORT`` sends
one to this host and exits with 0 when it comes back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

_TIMEOUT_S = 1.5
_ASKER_PORT = 39_999
"""The same each time, so that a client sees one local peer and keeps one tunnel for it."""


def serve(port: int) -> None:
    """Until SIGTERM, which ends a container's first process only where it is asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", port))  # noqa: S104  # reached from other containers
        print(f"udp-echo on port {port}", flush=True)
        while True:
            payload, peer = sock.recvfrom(65535)
            sock.sendto(payload, peer)


def ask(port: int) -> str | None:
    """The problem, if there is one."""
    question = os.urandom(16)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.bind(("127.0.0.1", _ASKER_PORT))
            sock.connect(("127.0.0.1", port))
            sock.send(question)
            answer = sock.recv(65535)
        except OSError as error:
            return f"no echo at port {port}: {error}"
    return None if answer == question else f"port {port} answers something else"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(ask(int(sys.argv[2])))
