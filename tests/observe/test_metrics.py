from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from toppy.model.counters import WorkerCounters
from toppy.model.drop_reason import DropReason
from toppy.observe.metrics import WorkerSnapshot, render_metrics

Sample = tuple[str, frozenset[tuple[str, str]]]


def samples(page: bytes) -> dict[Sample, float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def render(*counters: WorkerCounters, worker_deaths: int = 0) -> dict[Sample, float]:
    workers = [
        WorkerSnapshot(slot, slot != 1, 3 + slot, count) for slot, count in enumerate(counters)
    ]
    page = render_metrics(workers, version="1.2.3", engine="native", worker_deaths=worker_deaths)
    return samples(page)


def one(name: str, **labels: str) -> Sample:
    return f"toppy_gw_{name}", frozenset(labels.items())


def numbered() -> WorkerCounters:
    """Every field has its own value."""
    counters = WorkerCounters(
        drops={"queue_full": 501, "malformed": 502}, admissions={"granted": 601, "403": 602}
    )
    for number, name in enumerate(WorkerCounters.__dataclass_fields__, 1):
        if name not in {"drops", "admissions"}:
            setattr(counters, name, number)
    return counters


def test_every_count_of_a_worker_is_shown_once() -> None:
    counters = numbered()
    shown = render(counters)
    values = sorted(
        value
        for (name, labels), value in shown.items()
        if ("worker", "0") in labels and not name.startswith("toppy_gw_worker_")
    )
    plain = [
        getattr(counters, name)
        for name in WorkerCounters.__dataclass_fields__
        if name not in {"drops", "admissions"}
    ]
    assert values == sorted([*plain, 501, 502, 601, 602])


@pytest.mark.parametrize(
    ("sample", "field"),
    [
        (one("open_connections", worker="0"), "connections_open"),
        (one("connections_total", worker="0"), "connections_total"),
        (one("open_tunnels", worker="0"), "tunnels_open"),
        (one("tunnels_total", worker="0"), "tunnels_total"),
        (one("handshakes_total", worker="0", outcome="failed"), "handshakes_failed"),
        (one("datagrams_total", worker="0", direction="to_target"), "datagrams_to_target"),
        (one("bytes_total", worker="0", direction="to_client"), "bytes_to_client"),
        (one("capsules_total", worker="0", direction="to_target"), "capsules_received"),
        (one("capsules_total", worker="0", direction="to_client"), "capsules_sent"),
        (one("pings_total", worker="0"), "pings"),
        (one("socket_overflow_total", worker="0"), "socket_overflow"),
        (one("send_errors_total", worker="0"), "send_errors"),
    ],
)
def test_a_count_has_its_name_and_labels(sample: Sample, field: str) -> None:
    counters = numbered()
    assert render(counters)[sample] == getattr(counters, field)


def test_drops_and_admissions_are_labelled() -> None:
    shown = render(numbered())
    assert shown[one("datagrams_dropped_total", worker="0", reason="queue_full")] == 501
    assert shown[one("admissions_total", worker="0", outcome="granted")] == 601
    assert shown[one("admissions_total", worker="0", outcome="403")] == 602


def test_workers_are_apart() -> None:
    shown = render(WorkerCounters(tunnels_total=5), WorkerCounters(tunnels_total=7))
    assert shown[one("tunnels_total", worker="0")] == 5
    assert shown[one("tunnels_total", worker="1")] == 7


def test_a_slot_says_whether_its_worker_is_up_and_of_which_generation() -> None:
    shown = render(WorkerCounters(), WorkerCounters(), worker_deaths=2)
    assert shown[one("worker_up", worker="0")] == 1
    assert shown[one("worker_up", worker="1")] == 0
    assert shown[one("worker_generation", worker="1")] == 4
    assert shown[one("worker_deaths_total")] == 2


def test_version_and_engine_are_shown() -> None:
    assert render()[one("build_info", version="1.2.3", engine="native")] == 1


def test_names_that_nobody_knows_make_no_new_series() -> None:
    counters = WorkerCounters(
        drops={"alice@example.test": 1, "\n": 2, "malformed": 4},
        admissions={"10.0.0.1": 8, "granted": 16, "۱۲۳": 32},
    )
    shown = render(counters)
    assert shown[one("datagrams_dropped_total", worker="0", reason="other")] == 3
    assert shown[one("datagrams_dropped_total", worker="0", reason="malformed")] == 4
    assert shown[one("admissions_total", worker="0", outcome="other")] == 40
    assert shown[one("admissions_total", worker="0", outcome="granted")] == 16


def test_labels_are_few_and_known() -> None:
    counters = WorkerCounters(drops={reason.value: 1 for reason in DropReason})
    labels = {name for _, pairs in render(counters) for name, _ in pairs}
    assert labels <= {"worker", "direction", "reason", "outcome", "version", "engine"}


def test_large_counts_are_whole_numbers() -> None:
    page = render_metrics(
        [WorkerSnapshot(0, True, 1, WorkerCounters(bytes_to_client=2**52 + 1))],
        version="1",
        engine="aioquic",
    )
    value = samples(page)[one("bytes_total", worker="0", direction="to_client")]
    assert int(value) == 2**52 + 1


def test_the_end_of_each_certificate_is_shown() -> None:
    ends = {"server": 1_800_000_000.0, "client_ca": 1_900_000_000.0}
    shown = samples(render_metrics([], version="1", engine="native", certificates=ends))
    name = "certificate_expiry_timestamp_seconds"
    assert shown[one(name, certificate="server")] == 1_800_000_000
    assert shown[one(name, certificate="client_ca")] == 1_900_000_000
