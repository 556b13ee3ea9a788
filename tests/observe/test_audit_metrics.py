"""The audit log's metrics: each figure under its name, and none that is not known."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from toppy.observe.audit_metrics import AuditMetrics, ShippingMetrics
from toppy.observe.metrics import render_metrics

SHIPPING = ShippingMetrics(backlog=7, behind_s=1.5, failures=2, last_success=1_700_000_001.0)
AUDIT = AuditMetrics(
    is_writable=False,
    entries=41,
    waiting=3,
    lost=4,
    failures=5,
    last_write=1_700_000_000.0,
    shipping=SHIPPING,
)


def shown(audit: AuditMetrics | None) -> dict[str, float]:
    page = render_metrics([], version="1", engine="native", audit=audit).decode()
    return {
        sample.name.removeprefix("toppy_gw_audit_"): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("toppy_gw_audit_")
    }


def test_every_figure_has_its_name() -> None:
    assert shown(AUDIT) == {
        "writable": 0,
        "entries_total": 41,
        "waiting": 3,
        "lost_total": 4,
        "write_failures_total": 5,
        "last_write_timestamp_seconds": 1_700_000_000.0,
        "ship_backlog_entries": 7,
        "ship_backlog_seconds": 1.5,
        "ship_failures_total": 2,
        "last_ship_timestamp_seconds": 1_700_000_001.0,
    }


def test_what_is_not_known_or_not_there_is_not_shown() -> None:
    assert shown(None) == {}
    fresh = AuditMetrics(
        is_writable=True,
        entries=0,
        waiting=0,
        lost=0,
        failures=0,
        last_write=None,
        shipping=None,
    )
    assert set(shown(fresh)) == {
        *("writable", "entries_total", "waiting", "lost_total", "write_failures_total")
    }
