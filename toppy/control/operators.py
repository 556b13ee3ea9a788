"""What operators see and do: workers, generations, connections and tunnels by their names."""

from __future__ import annotations

import re
from typing import Any

from toppy.control.admin import AdminError
from toppy.control.generation import GenerationState, Worker
from toppy.control.statistics import Statistics
from toppy.control.supervisor import Supervisor
from toppy.model.counters import WorkerCounters, counted
from toppy.model.grant import Denial
from toppy.model.target import Target
from toppy.observe.log import get_logger
from toppy.observe.metrics import WorkerSnapshot
from toppy.wire.ipc_message import LiveConnection, LiveTunnel

_WORKER_NAME = re.compile(r"s([0-9]{1,3})")
_GENERATION_NAME = re.compile(r"g([0-9]{1,9})")
_TUNNEL_NAME = re.compile(r"s[0-9]+g[0-9]+c[0-9]+t[0-9]+")

_LONGEST_DRAIN_S = 30 * 86_400
"""As long as ``reload.drain_timeout_s`` may be."""

_log = get_logger("control")


def drain(supervisor: Supervisor, what: str, timeout_s: float) -> dict[str, Any]:
    """Drain a worker or a generation by its name. Raises ``AdminError``."""
    if not 0 <= timeout_s <= _LONGEST_DRAIN_S:
        raise AdminError(f"a timeout is 0 to {_LONGEST_DRAIN_S} s", status=400)
    if named_worker := _WORKER_NAME.fullmatch(what):
        worker = supervisor.workers.get(int(named_worker[1]))
        if worker is None:
            raise AdminError(f"there is no worker {what}; see: toppy-gw status", status=404)
        others = [
            w
            for w in supervisor.workers.values()
            if w.generation is supervisor.active
            and w is not worker
            and w.is_serving
            and not w.is_expected_to_end
        ]
        if worker.generation is supervisor.active and not others:
            raise AdminError(
                f"{what} is the only worker that takes new connections; replace it with: "
                "toppy-gw reload"
            )
        drained = [worker.slot] if supervisor.drain_worker(worker, timeout_s) else []
        supervisor.steer_if_possible()
    elif named_generation := _GENERATION_NAME.fullmatch(what):
        generation = supervisor.generations.get(int(named_generation[1]))
        if generation is None:
            raise AdminError(f"there is no generation {what}; see: toppy-gw status", status=404)
        if generation.state is not GenerationState.DRAINING:
            raise AdminError(f"{what} takes the new connections; replace it: toppy-gw reload")
        drained = supervisor.drain_generation(generation, timeout_s)
    else:
        raise AdminError(
            f"{what!r} is neither a worker (such as s0) nor a generation (such as g2)",
            status=400,
        )
    return {"draining": [f"s{slot}" for slot in drained]}


async def connections(supervisor: Supervisor) -> dict[str, Any]:
    """Every open connection."""
    live = await supervisor.lists.connections()
    return {
        "unanswered": live.unanswered,
        "connections": [
            {
                "name": _connection_name(worker, each),
                "slot": worker.slot,
                "generation": worker.generation.number,
                "source": each.source,
                "alpn": each.alpn,
                "tunnels": each.tunnels,
                "since": each.opened_at,
                "round_trip_s": each.round_trip_s,
            }
            for worker, each in live.found
        ],
    }


async def tunnels(supervisor: Supervisor) -> dict[str, Any]:
    """Every open tunnel."""
    live = await supervisor.lists.tunnels()
    return {
        "unanswered": live.unanswered,
        "tunnels": [
            {
                "name": tunnel_name(worker, each),
                "source": each.source,
                "protocol": each.protocol,
                "target": str(Target(each.host, each.port)),
                "address": each.address,
                "subject": each.subject,
                "rule": each.rule,
                "since": each.opened_at,
                "bytes_to_target": each.bytes_to_target,
                "bytes_to_client": each.bytes_to_client,
                "datagrams_to_target": each.datagrams_to_target,
                "datagrams_to_client": each.datagrams_to_client,
            }
            for worker, each in live.found
        ],
    }


async def kick(supervisor: Supervisor, what: str) -> dict[str, Any]:
    """End open tunnels by name or subject. Raises ``AdminError``."""
    is_tunnel = _TUNNEL_NAME.fullmatch(what) is not None
    denial = Denial(403, "connection_terminated", "an operator of the gateway ended the tunnel")
    closed = 0
    live = await supervisor.lists.tunnels()
    for worker, tunnel in live.found:
        name = tunnel_name(worker, tunnel)
        if what == (name if is_tunnel else tunnel.subject):
            supervisor.close_tunnels(worker, [tunnel], denial)
            _log.info("tunnel cut by an operator", tunnel=name, subject=tunnel.subject)
            closed += 1
    if not closed and live.silent:
        raise AdminError(
            f"{', '.join(live.unanswered)} did not answer, and no other worker has a tunnel with "
            f"the name or subject {what!r}; try again"
        )
    if not closed:
        raise AdminError(
            f"no open tunnel has the name or subject {what!r}; see: toppy-gw tunnels",
            status=404,
        )
    return {"closed": closed, "unanswered": live.unanswered}


def worker_facts(supervisor: Supervisor, statistics: Statistics) -> dict[str, Any]:
    """Generations and workers, and what they counted."""
    by_slot = statistics.by_slot()
    total = statistics.total()
    return {
        "generation": supervisor.active.number if supervisor.active is not None else 0,
        "worker_deaths": supervisor.deaths,
        "connections": total.connections_open,
        "tunnels": total.tunnels_open,
        "tcp_tunnels": total.tcp_tunnels_open,
        "drops": total.drops,
        "admissions": total.admissions,
        "generations": [
            {
                "generation": each.number,
                "state": each.state.value,
                "since": each.since,
                "revision": each.revision,
                "workers": sorted(
                    w.slot for w in supervisor.workers.values() if w.generation is each
                ),
            }
            for _, each in sorted(supervisor.generations.items())
        ],
        "workers": [
            _worker_status(worker, by_slot.get(slot, WorkerCounters()))
            for slot, worker in sorted(supervisor.workers.items())
        ],
    }


def worker_snapshots(supervisor: Supervisor, statistics: Statistics) -> list[WorkerSnapshot]:
    """For metrics: of workers that run, and of slots that had one."""
    workers = supervisor.workers
    counted = {slot: WorkerCounters() for slot in sorted(workers)} | statistics.by_slot()
    return [
        WorkerSnapshot(
            slot=slot,
            generation=workers[slot].generation.number if slot in workers else 0,
            is_up=slot in workers and workers[slot].is_serving,
            counters=counters,
        )
        for slot, counters in counted.items()
    ]


def _worker_status(worker: Worker, counters: WorkerCounters) -> dict[str, Any]:
    return {
        "name": f"s{worker.slot}",
        "slot": worker.slot,
        "generation": worker.generation.number,
        "pid": worker.process.pid,
        "state": worker.state.name.lower(),
        "engine": worker.engine,
        "since": worker.started_at,
        "connections": counters.connections_open,
        "tunnels": counters.tunnels_open,
        "tcp_tunnels": counters.tcp_tunnels_open,
        "tcp_bytes_to_target": counters.tcp_bytes_to_target,
        "tcp_bytes_to_client": counters.tcp_bytes_to_client,
        "protocol_errors": counters.protocol_errors,
        "drops": counters.drops,
        "datagrams_to_target": counters.datagrams_to_target,
        "datagrams_to_client": counters.datagrams_to_client,
    }


def _connection_name(worker: Worker, connection: LiveConnection) -> str:
    return f"s{worker.slot}g{worker.generation.number}c{connection.connection}"


def tunnel_name(worker: Worker, tunnel: LiveTunnel) -> str:
    """What operators call it."""
    return worker.tunnel_name(tunnel.connection, tunnel.quarter_stream_id)


def serving_workers(supervisor: Supervisor) -> int:
    """Of the active generation: how many take new connections."""
    return sum(
        worker.is_serving and worker.generation is supervisor.active
        for worker in supervisor.workers.values()
    )


def summary(supervisor: Supervisor, statistics: Statistics, wanted_workers: int) -> str:
    """One line for the service manager."""
    total = statistics.total()
    generations = len(supervisor.generations)
    text = (
        f"{serving_workers(supervisor)}/{wanted_workers} workers, "
        f"{counted(total.connections_open, 'connection')}, "
        f"{counted(total.tunnels_open, 'tunnel')}"
    )
    if generations > 1:
        text += f", {counted(generations - 1, 'generation')} draining"
    return text
