"""How many files and sockets this process may have open, and those that it was born with."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Mapping, MutableMapping

_FIRST_DESCRIPTOR = 3
"""Where the service manager's begin, sd_listen_fds(3)."""
HANDED_OVER = "TOPPYHANDED_OVER"
"""The environment variable that says which descriptors are which sockets."""


def open_missing_standard_descriptors() -> None:
    """Put the null device where standard input, output or error was closed. Otherwise the next
    socket would be standard output; call it before anything else is opened.
    """
    descriptor = 0
    while descriptor < _FIRST_DESCRIPTOR:  # the lowest free number is taken
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor < _FIRST_DESCRIPTOR:
            os.set_inheritable(descriptor, True)
    os.close(descriptor)


def raise_descriptor_limit() -> None:
    """Use all that the hard limit allows: every tunnel has a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def inherited_sockets(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """Sockets by name: what ``hand_over`` left in this process before it was re-executed, or what
    the service manager kept (FDSTORE=1). Takes the variables out of ``environ``.
    """
    handed_over = environ.pop(HANDED_OVER, "")
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    if handed_over:
        for each in handed_over.split(","):
            name, _, number = each.partition("=")
            found[name] = int(number)
    elif pid == str(os.getpid()) and count.isdigit():
        for index in range(int(count)):
            name = names[index] if index < len(names) else str(index)
            found.setdefault(name, _FIRST_DESCRIPTOR + index)
    sockets = {}
    for name, descriptor in found.items():
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, False)
            sockets[name] = socket.socket(fileno=descriptor)
    return sockets


def hand_over(sockets: Mapping[str, socket.socket], environ: MutableMapping[str, str]) -> None:
    """Keep sockets open across a re-execution, for ``inherited_sockets``."""
    for sock in sockets.values():
        os.set_inheritable(sock.fileno(), True)
    environ[HANDED_OVER] = ",".join(f"{name}={s.fileno()}" for name, s in sockets.items())
