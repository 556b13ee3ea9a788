"""What an earlier control plane left behind: its workers, and the sockets that they read."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from toppy.config.address import parse_host_port
from toppy.config.gateway import GatewayConfig
from toppy.control.listeners import addresses_of, close_all, is_at, named
from toppy.control.saved_state import SavedState, SavedWorker
from toppy.ipc.takeover_channel import take_over
from toppy.ipc.worker_sockets import takeover_path
from toppy.model.target import Target
from toppy.net import steering
from toppy.observe.log import get_logger
from toppy.system.processes import Process, adopt

_END_DEADLINE_S = 1.0

_log = get_logger("control")


def find_workers(
    saved: SavedState, runtime_dir: str, inherited: dict[str, socket.socket]
) -> list[tuple[SavedWorker, Process, socket.socket]]:
    """Workers that an earlier control plane left; their copies of the sockets, where we have none,
    go to ``inherited``.
    """
    found = []
    for each in saved.workers:
        taken = find_saved_worker(each, runtime_dir)
        if taken is None:
            continue
        process, line, descriptors = taken
        found.append((each, process, line))
        # one from before the sockets became more has fewer: the first ones of each row
        count, rest = divmod(len(descriptors), len(saved.socket_rows) or 1)
        if rest:
            close_all({str(d): socket.socket(fileno=d) for d in descriptors})
            continue
        rows = [descriptors[at : at + count] for at in range(0, len(descriptors), count or 1)]
        for name, sock in named(rows).items():
            if name in inherited:
                sock.close()
            else:
                inherited[name] = sock
    return found


def find_saved_worker(
    saved: SavedWorker, runtime_dir: str
) -> tuple[Process, socket.socket, list[int]] | None:
    """A worker of an earlier control plane, taken over, with the sockets that it holds; None when
    it is gone or does not answer (then it is ended).
    """
    process = adopt(saved.pid, saved.started)
    if process is None:
        return None
    try:
        line, descriptors = take_over(takeover_path(runtime_dir, saved.slot), saved.secret)
    except OSError as error:
        _log.error("worker cannot be taken over", pid=saved.pid, reason=str(error))
        process.kill()
        # sockets that only it holds must be gone before others take their places in the group
        process.wait_blocking(_END_DEADLINE_S)
        return None
    return process, line, descriptors


def as_it_listens(
    config: GatewayConfig, saved: SavedState, inherited: Mapping[str, socket.socket]
) -> GatewayConfig:
    """``config`` with the addresses, and the steering, of workers that go on: they cannot change
    theirs.
    """
    addresses = addresses_of(inherited)
    wanted = [parse_host_port(text) for text in config.listen.quic]
    changes: dict[str, object] = {}
    if addresses and not (
        len(addresses) == len(wanted)
        and all(is_at(has, want) for has, want in zip(addresses, wanted, strict=True))
    ):
        changes["quic"] = tuple(str(Target(host, port)) for host, port in addresses)
    would_be = config.listen.steering and steering.is_supported()
    if saved.is_steered is not None and saved.is_steered != would_be:
        changes["steering"] = saved.is_steered
    if not changes:
        return config
    return config.model_copy(update={"listen": config.listen.model_copy(update=changes)})
