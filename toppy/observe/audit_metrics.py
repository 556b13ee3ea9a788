"""What ``/metrics`` shows of the audit log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_PREFIX: Final = "toppy_gw_audit_"


@dataclass(frozen=True, slots=True)
class ShippingMetrics:
    """How far the audit log's collector is."""

    backlog: int
    """Entries that it does not have."""
    behind_s: float
    """Age of the oldest of them, as far as an attempt to ship has found them."""
    failures: int
    last_success: float | None
    """Unix time at which it last had everything."""


@dataclass(frozen=True, slots=True)
class AuditMetrics:
    """The audit log as ``/metrics`` shows it."""

    is_writable: bool
    entries: int
    """Since the log was begun, by whatever process."""
    waiting: int
    lost: int
    """Events that found no room, since the control plane's start; likewise ``failures``."""
    failures: int
    last_write: float | None
    """Unix time."""
    shipping: ShippingMetrics | None
    """None: there is no collector."""


class AuditCollector(Collector):
    """One reading as metrics. A time that is not known has no sample."""

    def __init__(self, audit: AuditMetrics) -> None:
        self._audit = audit

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        audit, shipping = self._audit, self._audit.shipping
        yield _gauge("writable", "Whether the last attempt to write succeeded.", audit.is_writable)
        yield _counter("entries", "Entries of the log since it was begun.", audit.entries)
        yield _gauge("waiting", "Events that are not in the file yet.", audit.waiting)
        yield _counter("lost", "Events that found no room.", audit.lost)
        yield _counter("write_failures", "Attempts to write that failed.", audit.failures)
        yield _time("last_write", "When entries were last written.", audit.last_write)
        if shipping is None:
            return
        yield _gauge(
            "ship_backlog_entries",
            "Entries that the collector does not have.",
            shipping.backlog,
        )
        yield _gauge("ship_backlog_seconds", "Age of the oldest of them.", shipping.behind_s)
        yield _counter("ship_failures", "Attempts to ship that failed.", shipping.failures)
        yield _time("last_ship", "When the collector last had everything.", shipping.last_success)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}{name}", text, value=value)


def _counter(name: str, text: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(f"{_PREFIX}{name}", text, value=value)


def _time(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{_PREFIX}{name}_timestamp_seconds", text)
    if value is not None:
        family.add_metric((), value)
    return family
