"""What ``/metrics`` shows, in the text format of Prometheus.

Labels never name a user, a target, an address or a connection: their number has a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from toppy.model.counters import GRANTED, WorkerCounters
from toppy.model.drop_reason import DropReason
from toppy.observe.audit_metrics import AuditCollector, AuditMetrics

_PREFIX: Final = "toppy_gw_"
_OTHER: Final = "other"
"""Stands for a label value that nobody knows: a worker cannot make new time series."""
_REASONS: Final = frozenset(reason.value for reason in DropReason)

Counted = Callable[[WorkerCounters], int]

_COUNTERS: Final[tuple[tuple[str, str, Counted], ...]] = (
    (
        "connections",
        "QUIC connection attempts that passed the gate.",
        lambda c: c.connections_total,
    ),
    ("tunnels", "Tunnels that were opened.", lambda c: c.tunnels_total),
    (
        "tunnels_cut",
        "Live tunnels that the gateway ended: the policy changed, or an operator said so.",
        lambda c: c.tunnels_cut,
    ),
    (
        "strays",
        "Packets handed over to the worker that they belong to.",
        lambda c: c.strays,
    ),
    (
        "strays_lost",
        "Packets for another worker whose queue was full, or that was gone.",
        lambda c: c.strays_lost,
    ),
    (
        "tcp_tunnels",
        "TCP tunnels that were opened; they are among the tunnels too.",
        lambda c: c.tcp_tunnels_total,
    ),
    (
        "protocol_errors",
        "Tunnels that ended because their client broke the protocol.",
        lambda c: c.protocol_errors,
    ),
    (
        "capsules_skipped",
        "Capsules of unknown types that TCP tunnels were sent.",
        lambda c: c.capsules_skipped,
    ),
    ("pings", "QUIC pings that were asked (ALPN toppy-ping).", lambda c: c.pings),
    (
        "socket_overflow",
        "Packets dropped by the kernel because the worker's receive buffer was full.",
        lambda c: c.socket_overflow,
    ),
    (
        "send_errors",
        "Batches of QUIC packets that the kernel refused to send.",
        lambda c: c.send_errors,
    ),
)
_GAUGES: Final[tuple[tuple[str, str, Counted], ...]] = (
    ("open_connections", "QUIC connections that are open now.", lambda c: c.connections_open),
    ("open_tunnels", "Tunnels that are open now.", lambda c: c.tunnels_open),
    ("open_tcp_tunnels", "TCP tunnels among them.", lambda c: c.tcp_tunnels_open),
)
_LABELLED: Final[tuple[tuple[str, str, str, tuple[tuple[str, Counted], ...]], ...]] = (
    (
        "handshakes",
        "QUIC handshakes by how they ended.",
        "outcome",
        (
            ("completed", lambda c: c.handshakes_completed),
            ("failed", lambda c: c.handshakes_failed),
            ("retried", lambda c: c.handshakes_retried),
            ("refused", lambda c: c.handshakes_refused),
        ),
    ),
    (
        "datagrams",
        "UDP payloads relayed.",
        "direction",
        (
            ("to_target", lambda c: c.datagrams_to_target),
            ("to_client", lambda c: c.datagrams_to_client),
        ),
    ),
    (
        "bytes",
        "Bytes of UDP payloads relayed.",
        "direction",
        (("to_target", lambda c: c.bytes_to_target), ("to_client", lambda c: c.bytes_to_client)),
    ),
    (
        "tcp_bytes",
        "Bytes of TCP payload relayed.",
        "direction",
        (
            ("to_target", lambda c: c.tcp_bytes_to_target),
            ("to_client", lambda c: c.tcp_bytes_to_client),
        ),
    ),
    (
        "capsules",
        "UDP payloads relayed in DATAGRAM capsules; they are among the datagrams too.",
        "direction",
        (("to_target", lambda c: c.capsules_received), ("to_client", lambda c: c.capsules_sent)),
    ),
)


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One slot as ``/metrics`` shows it.

    ``counters`` must never decrease, whatever happens to workers, except for what is open.
    """

    slot: int
    is_up: bool
    generation: int
    counters: WorkerCounters


def render_metrics(
    workers: Sequence[WorkerSnapshot],
    *,
    version: str,
    engine: str,
    worker_deaths: int = 0,
    audit: AuditMetrics | None = None,
    certificates: Mapping[str, float] | None = None,
) -> bytes:
    """The page, for ``text/plain; version=0.0.4``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(workers, version, engine, worker_deaths))
    if audit is not None:
        registry.register(AuditCollector(audit))
    registry.register(_Certificates(certificates or {}))
    return generate_latest(registry)


class _Certificates(Collector):
    """When certificates end, by what they are for."""

    def __init__(self, ends: Mapping[str, float]) -> None:
        self._ends = ends

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            f"{_PREFIX}certificate_expiry_timestamp_seconds",
            "Unix time at which a certificate ends.",
            labels=("certificate",),
        )
        for name, end in sorted(self._ends.items()):
            gauge.add_metric((name,), end)
        yield gauge


class _Snapshots(Collector):
    """Snapshots as metrics."""

    def __init__(
        self, workers: Sequence[WorkerSnapshot], version: str, engine: str, worker_deaths: int
    ) -> None:
        self._workers = [(str(worker.slot), worker) for worker in workers]
        self._version = version
        self._engine = engine
        self._worker_deaths = worker_deaths

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        build = InfoMetricFamily(f"{_PREFIX}build", "What is running.")
        build.add_metric([], {"version": self._version, "engine": self._engine})
        yield build
        yield CounterMetricFamily(
            f"{_PREFIX}worker_deaths",
            "Workers that ended without being told to.",
            value=self._worker_deaths,
        )
        yield self._gauge("worker_up", "Whether the slot's worker serves.", lambda w: int(w.is_up))
        yield self._gauge(
            "worker_generation", "Generation of the slot's worker.", lambda w: w.generation
        )
        for name, text, count in _GAUGES:
            yield self._gauge(name, text, lambda w, count=count: count(w.counters))  # type: ignore[misc]
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=("worker",))
            for slot, worker in self._workers:
                counter.add_metric((slot,), count(worker.counters))
            yield counter
        for name, text, label, values in _LABELLED:
            counter = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=("worker", label))
            for slot, worker in self._workers:
                for value, count in values:
                    counter.add_metric((slot, value), count(worker.counters))
            yield counter
        yield self._by_name(
            "datagrams_dropped",
            "UDP payloads that were not delivered.",
            "reason",
            lambda c: c.drops,
            lambda reason: reason in _REASONS,
        )
        yield self._by_name(
            "admissions",
            "Requests for a tunnel: granted, or the HTTP status of the refusal.",
            "outcome",
            lambda c: c.admissions,
            _is_outcome,
        )

    def _gauge(
        self, name: str, text: str, value: Callable[[WorkerSnapshot], int]
    ) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=("worker",))
        for slot, worker in self._workers:
            gauge.add_metric((slot,), value(worker))
        return gauge

    def _by_name(
        self,
        name: str,
        text: str,
        label: str,
        counts: Callable[[WorkerCounters], dict[str, int]],
        is_known: Callable[[str], bool],
    ) -> CounterMetricFamily:
        counter = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=("worker", label))
        for slot, worker in self._workers:
            known: dict[str, int] = {}
            for key, count in counts(worker.counters).items():
                shown = key if is_known(key) else _OTHER
                known[shown] = known.get(shown, 0) + count
            for key, count in sorted(known.items()):
                counter.add_metric((slot, key), count)
        return counter


def _is_outcome(text: str) -> bool:
    return text == GRANTED or (len(text) == 3 and text.isascii() and text.isdigit())
