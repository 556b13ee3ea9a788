"""``toppy doctor``: the report, and what each check finds."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.gateway import LoopbackGateway, write_config
from tests.quic.certificates import other_ca_pem
from toppy import __version__
from toppy.client import doctor as doctor_module
from toppy.client.doctor import NETWORK_CHECKS, Check, Report, Status, examine
from toppy.client.lookup import NameLookupError
from toppy.quic import choose
from toppy.quic.endpoint import HeadersReceived
from toppy.quic.engine import Address
from toppy.quic.h3 import Headers
from toppy.wire.connect_udp import response_headers
from toppy.wire.proxy_status import encode_proxy_status

SILENT: Address = ("127.0.0.1", 9)
POLICY = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53]\n'
ALWAYS = ["cfg.load", *NETWORK_CHECKS, "tun.perm", "mtu.sanity"]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests may be busy."""
    for name in ("PING_TIMEOUT_S", "CONNECT_UDP_TIMEOUT_S", "ECHO_TIMEOUT_S"):
        monkeypatch.setattr(doctor_module, name, 10.0)


def diagnose(config: Path, **environ: str) -> dict[str, Check]:
    """Without a network unless a test asks for it."""
    report = asyncio.run(examine(str(config), {"TOPPY_DOCTOR_NET": "skip", **environ}))
    return {check.check_id: check for check in report.checks}


def diagnose_at(
    gateway: LoopbackGateway, change: Callable[[Path], Path], **environ: str
) -> dict[str, Check]:
    """With a gateway to ask. ``change`` may alter the configuration file."""

    async def scenario() -> Report:
        async with gateway:
            config = change(write_config(Path(environ["HOME"]), gateway.address))
            return await examine(str(config), environ)

    return {check.check_id: check for check in asyncio.run(scenario()).checks}


def same(path: Path) -> Path:
    return path


# the report


@pytest.mark.parametrize(
    ("found", "worst"),
    [
        ([], Status.PASS),
        ([Status.PASS, Status.WARN, Status.PASS], Status.WARN),
        ([Status.WARN, Status.FAIL, Status.PASS], Status.FAIL),
    ],
)
def test_the_worst_status_is_the_overall_one(found: list[Status], worst: Status) -> None:
    report = Report()
    for status in found:
        report.add("net.dns", status, "")
    assert report.overall is worst


@given(st.lists(st.tuples(st.text(), st.sampled_from(Status), st.text())))
def test_the_json_form_has_everything_that_was_found(found: list[tuple[str, Status, str]]) -> None:
    report = Report()
    for check_id, status, summary in found:
        report.add(check_id, status, summary)
    facts = json.loads(json.dumps(report.as_json()))
    assert list(facts) == ["version", "overall", "checks"]
    assert facts["version"] == __version__
    worst = max((status for _, status, _ in found), default=Status.PASS)
    assert facts["overall"] == worst.name.lower()
    assert facts["checks"] == [
        {"id": check_id, "status": status.name.lower(), "summary": summary}
        for check_id, status, summary in found
    ]


def test_the_human_form_is_one_line_per_check() -> None:
    report = Report()
    report.add("cfg.load", Status.PASS, "found")
    report.add("net.dns", Status.WARN, "skipped: why")
    assert report.as_text().splitlines() == [
        "doctor: warn",
        f"version: {__version__}",
        "- [pass] cfg.load: found",
        "- [warn] net.dns: skipped: why",
    ]


# configuration


def test_every_check_is_there_in_order_even_without_a_configuration(tmp_path: Path) -> None:
    report = asyncio.run(examine(str(tmp_path / "none.toml"), {}))
    assert [check.check_id for check in report.checks] == ALWAYS
    checks = {check.check_id: check for check in report.checks}
    assert checks["cfg.load"].status is Status.FAIL
    assert "toppy-gw init" in checks["cfg.load"].summary
    for check_id in (*NETWORK_CHECKS, "mtu.sanity"):
        assert checks[check_id].status is Status.WARN
        assert checks[check_id].summary.startswith("skipped: ")
        assert "cfg.load" in checks[check_id].summary


def test_a_ca_file_that_is_no_use_fails_the_configuration(tmp_path: Path) -> None:
    config = write_config(tmp_path, SILENT)
    (tmp_path / "ca.pem").write_text("nothing")
    check = diagnose(config)["cfg.load"]
    assert check.status is Status.FAIL
    assert "ca_cert_path" in check.summary


def test_the_configuration_check_says_which_file_and_engine(tmp_path: Path) -> None:
    config = write_config(tmp_path, SILENT)
    check = diagnose(config, TOPPY_QUIC_ENGINE="aioquic")["cfg.load"]
    assert check.status is Status.PASS
    assert str(config) in check.summary
    assert "engine aioquic" in check.summary


def test_running_on_the_slow_engine_by_default_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "has_native_engine", lambda: False)
    check = diagnose(write_config(tmp_path, SILENT))["cfg.load"]
    assert check.status is Status.WARN
    assert "Rust toolchain" in check.summary


def test_an_engine_that_is_not_there_fails_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "has_native_engine", lambda: False)
    check = diagnose(write_config(tmp_path, SILENT), TOPPY_QUIC_ENGINE="native")["cfg.load"]
    assert check.status is Status.FAIL
    assert "quic.engine" in check.summary


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    config = write_config(tmp_path, SILENT)
    config.chmod(0o644)
    check = diagnose(config)["cfg.load"]
    assert check.status is Status.WARN
    assert "chmod 600" in check.summary


# the network


def test_every_network_check_passes_at_a_good_gateway(tmp_path: Path) -> None:
    checks = diagnose_at(LoopbackGateway(), same, HOME=str(tmp_path))
    assert list(checks) == ALWAYS
    for check_id in NETWORK_CHECKS:
        assert checks[check_id].status is Status.PASS, checks[check_id]


def test_a_refused_token_says_what_to_set_and_ends_the_network_checks(tmp_path: Path) -> None:
    checks = diagnose_at(LoopbackGateway(pong=b"unauthorized"), same, HOME=str(tmp_path))
    assert checks["h3.connect"].status is Status.FAIL
    assert "unauthorized" in checks["h3.connect"].summary
    assert "auth_token" in checks["h3.connect"].summary
    for check_id in NETWORK_CHECKS[2:]:
        assert checks[check_id].status is Status.WARN
        assert "h3.connect" in checks[check_id].summary


def test_a_missing_token_is_named_when_the_gateway_refuses(tmp_path: Path) -> None:
    def without_token(path: Path) -> Path:
        text = path.read_text()
        path.write_text("\n".join(line for line in text.splitlines() if "token" not in line))
        return path

    gateway = LoopbackGateway(pong=b"unauthorized")
    checks = diagnose_at(gateway, without_token, HOME=str(tmp_path))
    assert "auth_token not set" in checks["h3.connect"].summary


def test_a_certificate_that_does_not_verify_says_what_to_check(tmp_path: Path) -> None:
    def with_other_root(path: Path) -> Path:
        (path.parent / "ca.pem").write_bytes(other_ca_pem())
        return path

    checks = diagnose_at(LoopbackGateway(), with_other_root, HOME=str(tmp_path))
    assert checks["h3.connect"].status is Status.FAIL
    assert "certificate" in checks["h3.connect"].summary
    assert "ca_cert_path" in checks["h3.connect"].summary


def test_a_gateway_that_does_not_answer_fails_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "PING_TIMEOUT_S", 0.05)
    config = write_config(tmp_path, SILENT)
    report = asyncio.run(examine(str(config), {}))
    checks = {check.check_id: check for check in report.checks}
    assert checks["net.dns"].status is Status.PASS
    assert checks["h3.connect"].status is Status.FAIL
    assert "is the gateway running" in checks["h3.connect"].summary
    assert "mtu" not in checks["h3.connect"].summary


def test_no_answer_to_jumbo_packets_points_at_the_mtu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "PING_TIMEOUT_S", 0.05)
    config = write_config(tmp_path, SILENT)
    config.write_text(config.read_text().replace("mtu = 1350", "mtu = 9000"))
    report = asyncio.run(examine(str(config), {}))
    assert "mtu = 9000 needs jumbo frames" in report.checks[2].summary


def test_the_mtu_is_not_blamed_when_the_gateway_was_reached(tmp_path: Path) -> None:
    def with_jumbo_frames(path: Path) -> Path:
        path.write_text(path.read_text().replace("mtu = 1350", "mtu = 9000"))
        return path

    gateway = LoopbackGateway(pong=b"unauthorized")
    checks = diagnose_at(gateway, with_jumbo_frames, HOME=str(tmp_path))
    assert checks["h3.connect"].status is Status.FAIL
    assert "jumbo" not in checks["h3.connect"].summary


def test_a_gateway_that_refuses_the_echo_is_explained(tmp_path: Path) -> None:
    def refuse(_: HeadersReceived) -> tuple[Headers, bool]:
        said = encode_proxy_status("gw", error="http_request_denied", details="no", rule="r1")
        return response_headers(403, proxy_status=said), True

    checks = diagnose_at(LoopbackGateway(respond=refuse), same, HOME=str(tmp_path))
    assert checks["h3.connect"].status is Status.PASS
    assert checks["masque.connect_udp"].status is Status.FAIL
    assert "rule 'r1'" in checks["masque.connect_udp"].summary
    assert checks["masque.connect_udp.datagram"].status is Status.WARN


def test_a_path_that_loses_datagrams_is_told_apart_from_one_without_a_tunnel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "ECHO_TIMEOUT_S", 0.05)
    checks = diagnose_at(LoopbackGateway(lose=1000), same, HOME=str(tmp_path))
    assert checks["masque.connect_udp"].status is Status.PASS
    assert checks["masque.connect_udp.datagram"].status is Status.FAIL
    assert "no datagram came back" in checks["masque.connect_udp.datagram"].summary


def test_a_name_that_does_not_resolve_ends_the_network_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(host: str, port: int) -> list[Address]:
        raise NameLookupError("no such name")

    monkeypatch.setattr(doctor_module, "look_up", look_up)
    config = write_config(tmp_path, ("gw.example", 4433))
    report = asyncio.run(examine(str(config), {}))
    checks = {check.check_id: check for check in report.checks}
    assert checks["net.dns"].status is Status.FAIL
    assert "no such name" in checks["net.dns"].summary
    for check_id in NETWORK_CHECKS[1:]:
        assert checks[check_id].status is Status.WARN


def test_another_proxy_has_no_echo_to_ask(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        SILENT,
        'gateway_template = "https://proxy.example/{target_host}/{target_port}/"',
    )
    report = asyncio.run(examine(str(config), {}))
    for check in report.checks[2:5]:
        assert check.status is Status.WARN
        assert "gateway_template" in check.summary


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("pass", Status.PASS),
        ("fail", Status.FAIL),
        ("skip", Status.WARN),
        ("SKIP", Status.WARN),
        ("maybe", Status.FAIL),
    ],
)
def test_the_environment_says_what_network_and_tun_find(
    tmp_path: Path, value: str, status: Status
) -> None:
    config = write_config(tmp_path, SILENT)
    checks = diagnose(config, TOPPY_DOCTOR_NET=value, TOPPY_DOCTOR_TUN=value)
    for check_id in (*NETWORK_CHECKS, "tun.perm"):
        assert checks[check_id].status is status


# the host, the MTU and the policy


def test_a_tun_device_that_can_be_opened_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "tun"
    device.touch()
    monkeypatch.setattr(doctor_module, "_TUN", str(device))
    assert diagnose(write_config(tmp_path, SILENT))["tun.perm"].status is Status.PASS


@pytest.mark.parametrize(("name", "advice"), [("none", "modprobe tun"), ("ca.pem/x", "root")])
def test_a_tun_device_that_cannot_be_opened_is_a_warning_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, advice: str
) -> None:
    config = write_config(tmp_path, SILENT)
    monkeypatch.setattr(doctor_module, "_TUN", str(tmp_path / name))
    check = diagnose(config)["tun.perm"]
    assert check.status is Status.WARN
    assert advice in check.summary


def test_without_linux_the_tun_check_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    check = diagnose(write_config(tmp_path, SILENT))["tun.perm"]
    assert check.status is Status.WARN
    assert check.summary.startswith("skipped: ")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("", Status.WARN),
        ("mtu = 1199", Status.WARN),
        ("mtu = 1200", Status.PASS),
        ("mtu = 1350", Status.PASS),
        ("mtu = 9000", Status.PASS),
        ("mtu = 9001", Status.WARN),
    ],
)
def test_the_mtu_is_sane_from_1200_to_9000(tmp_path: Path, line: str, status: Status) -> None:
    config = write_config(tmp_path, SILENT)
    config.write_text(config.read_text().replace("mtu = 1350", line))
    check = diagnose(config)["mtu.sanity"]
    assert check.status is status
    assert (status is Status.PASS) or "1350" in check.summary


@pytest.mark.parametrize(
    ("policy", "target", "status", "part"),
    [
        (POLICY, "10.0.0.1:53", Status.PASS, "10.0.0.1:53 is allowed"),
        (POLICY, "10.0.0.1:54", Status.FAIL, "10.0.0.1:54 is not allowed"),
        (POLICY, "nonsense", Status.FAIL, "TOPPY_DOCTOR_TARGET"),
        ("", "10.0.0.1:53", Status.WARN, "no [policy]"),
    ],
)
def test_the_policy_is_asked_about_a_target(
    tmp_path: Path, policy: str, target: str, status: Status, part: str
) -> None:
    config = write_config(tmp_path, SILENT, policy)
    check = diagnose(config, TOPPY_DOCTOR_TARGET=target)["policy.denied"]
    assert check.status is status
    assert part in check.summary


def test_without_a_target_the_policy_is_not_asked(tmp_path: Path) -> None:
    assert "policy.denied" not in diagnose(write_config(tmp_path, SILENT, POLICY))


def test_without_a_configuration_a_target_is_skipped(tmp_path: Path) -> None:
    checks = diagnose(tmp_path / "none.toml", TOPPY_DOCTOR_TARGET="10.0.0.1:53")
    assert checks["policy.denied"].status is Status.WARN


def test_no_summary_shows_the_token(tmp_path: Path) -> None:
    checks = diagnose_at(LoopbackGateway(pong=b"unauthorized"), same, HOME=str(tmp_path))
    assert all("the-token" not in check.summary for check in checks.values())
