"""A certificate's end is told in time, and not too often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.system.certificate_samples import NOW, sample
from toppy.control.certificate_watch import CertificateWatch
from toppy.control.init import write_development_files
from toppy.control.settings import GatewaySettings, load_settings

DAY_S = 86_400.0
UNIX_NOW = NOW.timestamp()


@pytest.fixture
def settings(tmp_path: Path) -> GatewaySettings:
    write_development_files(
        tmp_path, listen="127.0.0.1:4433", health="127.0.0.1:8080", names=(), force=False
    )
    return load_settings(tmp_path / "gateway.toml", {})


class Gateway:
    """Settings that change, and a watch of them."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.watch = CertificateWatch(lambda: self.settings)

    def serve(self, days: float) -> None:
        pem = sample(begin_days=-9, end_days=days).certificate_pem
        self.settings = replace(self.settings, certificate_chain_pem=pem)

    def said(self, after_days: float) -> list[tuple[str, str]]:
        """Levels and warnings of one look, so many days later."""
        with capture_logs() as logs:
            self.watch.look(UNIX_NOW + after_days * DAY_S, after_days * DAY_S)
        return [(log["log_level"], log["warning"]) for log in logs]


def test_a_fresh_certificate_is_no_news(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    gateway.serve(31)
    assert gateway.said(0) == []
    assert gateway.said(0.9) == []


def test_the_last_thirty_days_are_told_once_a_day(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    gateway.serve(30.5)
    assert gateway.said(0) == []
    ((level, text),) = gateway.said(0.6)
    assert level == "warning"
    assert "in 29 days" in text
    assert gateway.said(1.5) == []
    assert len(gateway.said(1.7)) == 1


def test_the_last_seven_days_are_an_error(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    gateway.serve(7.5)
    assert [level for level, _ in gateway.said(0)] == ["warning"]
    # at once, although the last word was less than a day ago
    assert [level for level, _ in gateway.said(0.6)] == ["error"]
    ((_, text),) = gateway.said(7.4)
    assert "today" in text
    ((_, text),) = gateway.said(8.5)
    assert "it has expired" in text


def test_a_new_certificate_ends_the_warnings(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    gateway.serve(5)
    assert gateway.said(0)
    gateway.serve(90)
    assert gateway.said(0.1) == []
    gateway.serve(6)
    assert gateway.said(0.2)


def test_the_ca_of_clients_is_watched_too(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    cas = [sample(is_ca=True, usages=(), end_days=days).certificate_pem for days in (300, 10)]
    gateway.settings = replace(gateway.settings, client_ca_pem=b"".join(cas))
    ((_, text),) = gateway.said(0)
    assert "CA of client certificates" in text
    assert set(gateway.watch.ends()) == {"server", "client_ca"}
    assert gateway.watch.ends()["client_ca"] == UNIX_NOW + 10 * DAY_S


def test_operators_see_how_long_it_lasts(settings: GatewaySettings) -> None:
    gateway = Gateway(settings)
    gateway.serve(12.5)
    facts = gateway.watch.facts()["server"]
    assert facts["days_left"] == 12
    assert facts["names"] == ["gw.example"]
    assert facts["ends_at"] == gateway.watch.ends()["server"]
    assert gateway.watch.days_left() == {"certificate_days_left": 12}
