"""Ways from an application to its target, with and without a gateway in between."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from integration.processes import (
    Gateway,
    free_udp_port,
    running_gateway,
    running_udp_client,
)


@dataclass(frozen=True, slots=True)
class Way:
    """Where an application sends, where that arrives, and who works in between."""

    name: str
    host: str
    port: int
    target_host: str
    target_port: int
    """What is measured binds its sink or echo here."""
    processes: Mapping[str, tuple[psutil.Process, ...]] = field(default_factory=dict)
    """By role: "gateway", "client", or "relay" where one program does it all."""


def direct(host: str = "127.0.0.1") -> Way:
    """No gateway: the load and the kernel alone."""
    port = free_udp_port(host)
    return Way("no gateway", host, port, host, port)


_ATTEMPTS = 20
_REPORT_S = 0.7
"""Workers report twice a second."""


def _is_spread(gateway: Gateway, clients: int, workers: int) -> bool:
    if workers == 1:
        return True
    time.sleep(_REPORT_S)
    most = max(worker["connections"] for worker in gateway.status()["workers"])
    return bool(most <= -(-clients // workers))


@contextlib.contextmanager
def through_gateway(
    *,
    engine: str = "native",
    client_engine: str = "",
    workers: int = 1,
    host: str = "127.0.0.1",
    clients: int = 1,
    extra: str = "",
    client_extra: str = "",
) -> Iterator[list[Way]]:
    """A gateway and ``clients`` processes ``toppy udp``, each with its own connection to it and
    its own target port. ``client_engine`` is the clients', where it is another. ``host`` is where
    gateway and targets listen. ``extra`` is TOML for the gateway's configuration, ``client_extra``
    for the clients'; both begin in the table ``[quic]``.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        gateway = stack.enter_context(
            running_gateway(Path(directory), host=host, workers=workers, engine=engine, extra=extra)
        )
        ways = []
        for number in range(clients):
            target_port = free_udp_port(host)
            target = f"[{host}]:{target_port}" if ":" in host else f"{host}:{target_port}"
            for _ in range(_ATTEMPTS):
                started = contextlib.ExitStack()
                port, client = started.enter_context(
                    running_udp_client(
                        gateway,
                        target,
                        engine=client_engine or engine,
                        name=f"client-{number}",
                        extra=client_extra,
                        environ={"TOPPY_UDP_MAX_PEERS": "50000"},
                    )
                )
                # which worker gets a connection is chance: each is to have its share
                if _is_spread(gateway, number + 1, workers):
                    break
                started.close()
            stack.push(started)
            ways.append(
                Way(
                    f"toppy, {engine}",
                    "127.0.0.1",
                    port,
                    host,
                    target_port,
                    {
                        "gateway": worker_processes(gateway),
                        "client": (psutil.Process(client.pid),),
                    },
                )
            )
        yield ways


def worker_processes(gateway: Gateway) -> tuple[psutil.Process, ...]:
    """The processes that relay."""
    return tuple(psutil.Process(worker["pid"]) for worker in gateway.status()["workers"])
