"""The report's two forms, its schema, and what follows from what."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy import __version__
from toppy.client.doctor.examine import ORDER
from toppy.client.doctor.report import Check, Findings, Report, Status, json_schema, render_schema

DOCS = Path(__file__).parents[3] / "docs"
CHECKS = st.builds(
    Check,
    st.text(),
    st.sampled_from(Status),
    st.text(),
    st.none() | st.text(),
    st.none() | st.text(),
    st.dictionaries(st.text(), st.booleans() | st.integers() | st.text(), max_size=3),
)


@pytest.mark.parametrize(
    ("found", "worst"),
    [
        ([], Status.PASS),
        ([Status.SKIP], Status.PASS),
        ([Status.PASS, Status.SKIP], Status.PASS),
        ([Status.PASS, Status.WARN, Status.PASS], Status.WARN),
        ([Status.SKIP, Status.WARN], Status.WARN),
        ([Status.WARN, Status.FAIL, Status.PASS], Status.FAIL),
    ],
)
def test_the_worst_status_is_the_overall_one(found: list[Status], worst: Status) -> None:
    report = Report.of(tuple(Check("net.dns", status, "", None, None, {}) for status in found))
    assert report.overall is worst


@given(st.lists(CHECKS))
def test_the_json_form_has_everything_that_was_found(found: list[Check]) -> None:
    report = Report.of(tuple(found))
    facts = json.loads(json.dumps(report.as_json()))
    assert list(facts) == ["version", "overall", "checks"]
    assert facts["version"] == __version__
    assert facts["checks"] == [
        {
            "id": check.id,
            "status": check.status.value,
            "summary": check.summary,
            "remedy": check.remedy,
            "because": check.because,
            "facts": check.facts,
        }
        for check in found
    ]
    assert msgspec.convert(facts, Report) == report


def test_the_human_form_is_a_line_per_check_with_its_remedy_below() -> None:
    findings = Findings()
    findings.add("cfg.load", Status.PASS, "found")
    findings.add("net.dns", Status.WARN, "odd", "do this")
    assert findings.report(ORDER).as_text().splitlines() == [
        "doctor: warn",
        f"version: {__version__}",
        "- [pass] cfg.load: found",
        "- [warn] net.dns: odd",
        "    do this",
    ]


def test_consequences_are_named_below_their_cause_and_not_shown() -> None:
    findings = Findings()
    findings.add("net.udp", Status.FAIL, "blocked", "open it")
    findings.follow(("net.mtu.up",), "net.udp")
    findings.add("h3.connect", Status.FAIL, "no answer", "try", because="net.udp")
    findings.follow(("masque.connect_udp",), "h3.connect")
    report = findings.report(ORDER)
    assert report.as_text().splitlines()[2:] == [
        "- [fail] net.udp: blocked",
        "    open it",
        "    because of this also: net.mtu.up, h3.connect, masque.connect_udp",
    ]
    assert [(c.id, c.status, c.because) for c in report.checks] == [
        ("net.udp", Status.FAIL, None),
        ("net.mtu.up", Status.SKIP, "net.udp"),
        ("h3.connect", Status.FAIL, "net.udp"),
        ("masque.connect_udp", Status.SKIP, "net.udp"),
    ]


def test_checks_keep_their_order_whenever_they_were_made() -> None:
    findings = Findings()
    for check_id in reversed(ORDER):
        findings.add(check_id, Status.PASS, "")
    assert tuple(check.id for check in findings.report(ORDER).checks) == ORDER


def test_the_schema_file_is_current() -> None:
    written = (DOCS / "doctor.schema.json").read_text()
    assert written == render_schema(), "run: make docs"


def test_the_schema_describes_every_field() -> None:
    definitions = json_schema()["$defs"]
    for name in ("Report", "Check"):
        for field, described in definitions[name]["properties"].items():
            assert "description" in str(described), field


def test_the_page_lists_every_check_and_every_fact() -> None:
    page = (DOCS / "doctor.md").read_text()
    for check_id in ORDER:
        assert f"`{check_id}`" in page, check_id
    sources = Path(__file__).parents[3] / "toppy" / "client" / "doctor"
    for path in sources.glob("*.py"):
        for fact in re.findall(r'^\s+"([a-z_]+_(?:ms|s|bytes|left))":', path.read_text(), re.M):
            assert f"`{fact}`" in page, fact
