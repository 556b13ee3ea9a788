"""``toppy doctor`` over real sockets: what each check finds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest

from tests.client.gateway import LoopbackGateway, write_config
from tests.quic.certificates import dated_pair, other_ca_pem
from toppy import __version__
from toppy.client.doctor import examine as examine_module
from toppy.client.doctor import gather as gather_module
from toppy.client.doctor import host as host_module
from toppy.client.doctor.examine import NETWORK_CHECKS, ORDER, examine
from toppy.client.doctor.report import Check, Report, Status
from toppy.client.lookup import NameLookupError
from toppy.model.target import Protocol
from toppy.quic import choose
from toppy.quic.endpoint import HeadersReceived
from toppy.quic.engine import Address
from toppy.quic.h3 import Headers
from toppy.system.tun_probe import LinuxTunProbe, OtherTunProbe, TunProbe
from toppy.wire.connect_udp import response_headers
from toppy.wire.gateway_facts import date_field, diagnostic_fields
from toppy.wire.proxy_status import encode_proxy_status

SILENT: Address = ("127.0.0.1", 9)
POLICY = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53]\n'
UDP_ONLY = '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53]\nprotocol = ["udp"]\n'
OLD_IDS = (
    "cfg.load",
    "net.dns",
    "h3.connect",
    "masque.connect_udp",
    "masque.connect_udp.datagram",
    "tun.perm",
    "mtu.sanity",
)
"""T-081, in order."""
ONLY_WHERE_CONFIGURED = ("auth.login", "tls.client_certificate")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs the tests may be busy."""
    for name in (
        "TOTAL_S",
        "PING_TIMEOUT_S",
        "CONNECT_UDP_TIMEOUT_S",
        "ECHO_TIMEOUT_S",
        "CERTIFICATE_TIMEOUT_S",
        "TARGET_TIMEOUT_S",
        "SIZES_TIMEOUT_S",
    ):
        monkeypatch.setattr(gather_module, name, 20.0)
    monkeypatch.setattr(examine_module, "TOTAL_S", 20.0)
    monkeypatch.setattr(gather_module, "ECHOES", 10)
    monkeypatch.setattr(gather_module, "ECHO_INTERVAL_S", 0.002)


def by_id(report: Report) -> dict[str, Check]:
    return {check.id: check for check in report.checks}


def diagnose(config: Path, *, tun: TunProbe | None = None, **environ: str) -> dict[str, Check]:
    """Without a network unless a test asks for it."""
    environ = {"TOPPY_DOCTOR_NET": "skip", **environ}
    return by_id(asyncio.run(examine(str(config), environ, tun=tun)))


def same(path: Path) -> Path:
    return path


def diagnose_at(
    gateway: LoopbackGateway,
    home: Path,
    change: Callable[[Path], Path] = same,
    *,
    target: str | None = None,
    unix_clock: Callable[[], float] = time.time,
) -> dict[str, Check]:
    """With a gateway to ask. ``change`` may alter the configuration file."""

    async def scenario() -> Report:
        async with gateway:
            config = change(write_config(home, gateway.address))
            environ = {"HOME": str(home)}
            return await examine(str(config), environ, target=target, unix_clock=unix_clock)

    return by_id(asyncio.run(scenario()))


def with_line(old: str, new: str) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    return change


def with_facts(
    *, unix_time: float | None = None, address: Address | None = ("127.0.0.1", 1)
) -> Callable[[HeadersReceived], tuple[Headers, bool]]:
    """A gateway that says what it is."""

    def respond(_: HeadersReceived) -> tuple[Headers, bool]:
        date = date_field(time.time() if unix_time is None else unix_time)
        facts = diagnostic_fields(__version__, "native", address)
        return [*response_headers(200), date, *facts], False

    return respond


def refusing(status: int, **said: str) -> Callable[[HeadersReceived], tuple[Headers, bool]]:
    def respond(_: HeadersReceived) -> tuple[Headers, bool]:
        return response_headers(status, proxy_status=encode_proxy_status("gw", **said)), True

    return respond


# configuration


def test_without_a_configuration_everything_follows_from_that(tmp_path: Path) -> None:
    report = asyncio.run(examine(str(tmp_path / "none.toml"), {}, target="10.0.0.1:53"))
    checks = by_id(report)
    assert tuple(checks) == tuple(i for i in ORDER if i not in ONLY_WHERE_CONFIGURED)
    assert checks["cfg.load"].status is Status.FAIL
    assert "toppy-gw init" in checks["cfg.load"].summary
    for check_id in (*NETWORK_CHECKS, "mtu.sanity", "policy.denied", "policy.gateway"):
        assert checks[check_id].status is Status.SKIP
        assert checks[check_id].because == "cfg.load"


def test_the_ids_that_were_always_there_keep_their_order() -> None:
    assert tuple(i for i in ORDER if i in OLD_IDS) == OLD_IDS


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
    assert check.remedy is not None
    assert "Rust toolchain" in check.remedy


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
    assert check.remedy is not None
    assert "chmod 600" in check.remedy


# the network


def test_every_network_check_passes_at_a_good_gateway(tmp_path: Path) -> None:
    gateway = LoopbackGateway(respond=with_facts())
    checks = diagnose_at(gateway, tmp_path, target="10.0.0.1:53")
    assert tuple(checks) == tuple(i for i in ORDER if i not in ONLY_WHERE_CONFIGURED)
    for check_id in (*NETWORK_CHECKS, "policy.gateway"):
        expected = Status.WARN if check_id == "tls.certificate" else Status.PASS
        assert checks[check_id].status is expected, checks[check_id]
    assert checks["tls.certificate"].facts["days_left"] == 29  # of the tests' own


def test_a_gateway_that_says_nothing_of_itself_is_no_problem(tmp_path: Path) -> None:
    checks = diagnose_at(LoopbackGateway(), tmp_path)
    for check_id in ("net.nat", "clock.skew", "gateway.version"):
        assert checks[check_id].status is Status.SKIP
        assert checks[check_id].because is None


def test_a_refused_token_says_what_to_set_and_is_named_once(tmp_path: Path) -> None:
    gateway = LoopbackGateway(
        pong=b"unauthorized", respond=refusing(401, error="http_request_denied")
    )
    checks = diagnose_at(gateway, tmp_path)
    assert checks["h3.connect"].status is Status.FAIL
    assert checks["h3.connect"].because is None
    assert "unauthorized" in checks["h3.connect"].summary
    assert "auth_token" in (checks["h3.connect"].remedy or "")
    for check_id in ("auth.token", "masque.connect_udp", "net.latency", "gateway.version"):
        assert checks[check_id].because == "h3.connect"


def test_a_missing_token_is_named_when_the_gateway_refuses(tmp_path: Path) -> None:
    def without_token(path: Path) -> Path:
        text = path.read_text()
        path.write_text("\n".join(line for line in text.splitlines() if "token" not in line))
        return path

    checks = diagnose_at(LoopbackGateway(pong=b"unauthorized"), tmp_path, without_token)
    assert "auth_token not set" in checks["h3.connect"].summary


def test_a_token_that_has_expired_is_the_cause_of_its_refusal(tmp_path: Path) -> None:
    token = jwt.encode({"sub": "me", "exp": int(time.time()) - 7200}, "x" * 32)
    gateway = LoopbackGateway(
        pong=b"unauthorized", respond=refusing(401, error="http_request_denied")
    )
    checks = diagnose_at(gateway, tmp_path, with_line("the-token", token))
    assert checks["auth.token"].status is Status.FAIL
    assert "expired 2 hours ago" in checks["auth.token"].summary
    assert checks["h3.connect"].because == "auth.token"
    assert all(token not in check.summary for check in checks.values())


def test_a_certificate_of_another_ca_says_what_to_check(tmp_path: Path) -> None:
    def with_other_root(path: Path) -> Path:
        (path.parent / "ca.pem").write_bytes(other_ca_pem())
        return path

    checks = diagnose_at(LoopbackGateway(), tmp_path, with_other_root)
    assert checks["tls.certificate"].status is Status.FAIL
    assert "ca_cert_path" in (checks["tls.certificate"].remedy or "")
    assert checks["h3.connect"].status is Status.FAIL
    assert checks["h3.connect"].because == "tls.certificate"
    assert "ca_cert_path" in (checks["h3.connect"].remedy or "")


@pytest.mark.parametrize(
    ("days", "said"), [((-9, -2), "expired on"), ((2, 9), "is not valid before")]
)
def test_a_certificate_out_of_its_time_is_the_cause(
    tmp_path: Path, days: tuple[int, int], said: str
) -> None:
    pair = dated_pair(*days)

    def trusting(path: Path) -> Path:
        (path.parent / "ca.pem").write_bytes(pair[0])
        return path

    gateway = LoopbackGateway(pair=pair)
    checks = diagnose_at(gateway, tmp_path, trusting)
    assert checks["tls.certificate"].status is Status.FAIL
    assert said in checks["tls.certificate"].summary
    assert checks["h3.connect"].because == "tls.certificate"
    assert gateway.pings == []


def test_a_name_that_the_certificate_lacks_is_the_cause(tmp_path: Path) -> None:
    change = with_line('server_name = "gateway.test"', 'server_name = "other.example"')
    checks = diagnose_at(LoopbackGateway(), tmp_path, change)
    assert "gateway.test" in checks["tls.certificate"].summary
    assert "server_name" in (checks["tls.certificate"].remedy or "")
    assert checks["h3.connect"].because == "tls.certificate"


def test_a_port_without_a_gateway_is_told_by_udp_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PING_TIMEOUT_S", "CONNECT_UDP_TIMEOUT_S", "CERTIFICATE_TIMEOUT_S"):
        monkeypatch.setattr(gather_module, name, 0.05)
    config = write_config(tmp_path, SILENT)
    checks = by_id(asyncio.run(examine(str(config), {})))
    assert checks["net.dns"].status is Status.PASS
    assert checks["net.udp"].status is Status.FAIL
    assert "nothing listens at UDP port 9" in checks["net.udp"].summary
    for check_id in ("net.mtu.up", "tls.certificate", "h3.connect", "masque.connect_udp"):
        assert checks[check_id].because == "net.udp"
    assert checks["h3.connect"].status is Status.FAIL


def test_a_size_that_does_not_pass_says_which_does(tmp_path: Path) -> None:
    change = with_line("mtu = 1350", "mtu = 65507")
    checks = diagnose_at(LoopbackGateway(), tmp_path, change)
    assert checks["net.mtu.up"].status is not Status.PASS or checks["net.mtu.up"].facts == {
        "largest_bytes": 65507,
        "used_bytes": 65507,
    }


def test_a_gateway_that_refuses_the_echo_is_explained(tmp_path: Path) -> None:
    respond = refusing(403, error="http_request_denied", details="no", rule="r1")
    checks = diagnose_at(LoopbackGateway(respond=respond), tmp_path)
    assert checks["h3.connect"].status is Status.PASS
    assert checks["masque.connect_udp"].status is Status.FAIL
    assert "rule 'r1'" in checks["masque.connect_udp"].summary
    assert "operator" in (checks["masque.connect_udp"].remedy or "")
    assert checks["masque.connect_udp.datagram"].because == "masque.connect_udp"


def test_a_path_that_loses_datagrams_is_told_apart_from_one_without_a_tunnel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_module, "ECHO_TIMEOUT_S", 0.05)
    checks = diagnose_at(LoopbackGateway(lose=1000), tmp_path)
    assert checks["masque.connect_udp"].status is Status.PASS
    assert checks["masque.connect_udp.datagram"].status is Status.FAIL
    assert "no datagram came back" in checks["masque.connect_udp.datagram"].summary
    assert checks["net.latency"].because == "masque.connect_udp.datagram"


def test_a_name_that_does_not_resolve_ends_the_network_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up(host: str, port: int) -> list[Address]:
        raise NameLookupError("no such name")

    monkeypatch.setattr(examine_module, "look_up", look_up)
    config = write_config(tmp_path, ("gw.example", 4433))
    checks = by_id(asyncio.run(examine(str(config), {})))
    assert checks["net.dns"].status is Status.FAIL
    assert "no such name" in checks["net.dns"].summary
    for check_id in NETWORK_CHECKS[1:]:
        assert checks[check_id].because == "net.dns"


def test_another_proxy_has_no_echo_to_ask(tmp_path: Path) -> None:
    def with_template(path: Path) -> Path:
        with path.open("a") as file:
            file.write('gateway_template = "https://proxy.example/{target_host}/{target_port}/"')
        return path

    checks = diagnose_at(LoopbackGateway(), tmp_path, with_template)
    assert checks["net.udp"].status is Status.PASS
    for check_id in ("h3.connect", "masque.connect_udp", "masque.connect_udp.datagram"):
        assert checks[check_id].status is Status.SKIP
        assert "gateway_template" in checks[check_id].summary


def test_a_clock_that_is_wrong_is_told_by_the_gateways(tmp_path: Path) -> None:
    gateway = LoopbackGateway(respond=with_facts(unix_time=time.time() + 3600))
    check = diagnose_at(gateway, tmp_path)["clock.skew"]
    assert check.status is Status.WARN
    assert "behind the gateway's" in check.summary
    assert "NTP" in (check.remedy or "")


def test_a_token_is_judged_by_the_gateways_clock(tmp_path: Path) -> None:
    token = jwt.encode({"sub": "me", "exp": int(time.time()) + 1800}, "x" * 32)
    gateway = LoopbackGateway(respond=with_facts(unix_time=time.time() + 3600))
    checks = diagnose_at(gateway, tmp_path, with_line("the-token", token))
    assert "expired" in checks["auth.token"].summary
    assert checks["clock.skew"].status is Status.FAIL


def test_the_address_that_the_gateway_sees_tells_of_a_nat(tmp_path: Path) -> None:
    gateway = LoopbackGateway(respond=with_facts(address=("203.0.113.9", 40_000)))
    check = diagnose_at(gateway, tmp_path)["net.nat"]
    assert check.status is Status.PASS
    assert check.facts["is_behind_nat"] is True
    assert "203.0.113.9:40000" in check.summary


def test_a_nat_that_rebinds_during_the_run_is_told(tmp_path: Path) -> None:
    ports = iter(range(40_000, 50_000))

    def respond(request: HeadersReceived) -> tuple[Headers, bool]:
        return with_facts(address=("203.0.113.9", next(ports)))(request)

    check = diagnose_at(LoopbackGateway(respond=respond), tmp_path)["net.nat"]
    assert check.status is Status.WARN
    assert "203.0.113.9:40001" in check.summary


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


# a target


def test_the_gateways_denial_names_its_rule(tmp_path: Path) -> None:
    def respond(request: HeadersReceived) -> tuple[Headers, bool]:
        if b"10.0.0.1" not in dict(request.headers)[b":path"]:
            return with_facts()(request)
        return refusing(403, error="http_request_denied", details="no", rule="r9")(request)

    check = diagnose_at(LoopbackGateway(respond=respond), tmp_path, target="10.0.0.1:53")[
        "policy.gateway"
    ]
    assert check.status is Status.FAIL
    assert check.facts == {
        "udp_status": 403,
        "udp_rule": "r9",
        "tcp_status": 403,
        "tcp_rule": "r9",
    }
    assert "'r9'" in check.summary
    assert "operator" in (check.remedy or "")


def test_one_protocol_that_the_gateway_opens_is_enough(tmp_path: Path) -> None:
    def respond(request: HeadersReceived) -> tuple[Headers, bool]:
        if dict(request.headers)[b":protocol"] == b"connect-udp":
            return with_facts()(request)
        return refusing(502, error="connection_refused")(request)

    check = diagnose_at(LoopbackGateway(respond=respond), tmp_path, target="10.0.0.1:53")[
        "policy.gateway"
    ]
    assert check.status is Status.PASS
    assert "opens UDP tunnels" in check.summary
    assert "TCP: 502" in check.summary


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_both_policies_may_be_asked_about_one_protocol_alone(
    tmp_path: Path, protocol: Protocol
) -> None:
    def respond(request: HeadersReceived) -> tuple[Headers, bool]:
        if dict(request.headers)[b":protocol"] == b"connect-udp":
            return with_facts()(request)
        return refusing(403, error="http_request_denied")(request)

    async def scenario() -> Report:
        async with LoopbackGateway(respond=respond) as gateway:
            config = write_config(tmp_path, gateway.address, UDP_ONLY)
            environ = {"HOME": str(tmp_path)}
            return await examine(str(config), environ, target="10.0.0.1:53", protocol=protocol)

    checks = by_id(asyncio.run(scenario()))
    status = Status.PASS if protocol == "udp" else Status.FAIL
    assert checks["policy.denied"].status is status
    assert checks["policy.gateway"].status is status
    assert set(checks["policy.gateway"].facts) == {f"{protocol}_status"}


@pytest.mark.parametrize("status", [404, 501])
def test_a_gateway_without_tcp_is_not_blamed_for_it(tmp_path: Path, status: int) -> None:
    def respond(request: HeadersReceived) -> tuple[Headers, bool]:
        if dict(request.headers)[b":protocol"] == b"connect-udp":
            return with_facts()(request)
        return refusing(status, error="http_request_error")(request)

    check = diagnose_at(LoopbackGateway(respond=respond), tmp_path, target="10.0.0.1:53")[
        "policy.gateway"
    ]
    assert check.summary == "the gateway opens UDP tunnels to 10.0.0.1:53"


@pytest.mark.parametrize(
    ("policy", "target", "status", "part"),
    [
        (POLICY, "10.0.0.1:53", Status.PASS, "10.0.0.1:53 is allowed"),
        (UDP_ONLY, "10.0.0.1:53", Status.PASS, "for UDP only"),
        (POLICY, "10.0.0.1:54", Status.FAIL, "10.0.0.1:54 is not allowed"),
        (POLICY, "nonsense", Status.FAIL, "TOPPY_DOCTOR_TARGET"),
        ("", "10.0.0.1:53", Status.WARN, "no [policy]"),
    ],
)
def test_the_own_policy_is_asked_about_a_target(
    tmp_path: Path, policy: str, target: str, status: Status, part: str
) -> None:
    config = write_config(tmp_path, SILENT, policy)
    check = diagnose(config, TOPPY_DOCTOR_TARGET=target)["policy.denied"]
    assert check.status is status
    assert part in check.summary


def test_the_option_goes_before_the_environment(tmp_path: Path) -> None:
    config = write_config(tmp_path, SILENT, POLICY)
    environ = {"TOPPY_DOCTOR_NET": "skip", "TOPPY_DOCTOR_TARGET": "10.0.0.1:53"}
    report = asyncio.run(examine(str(config), environ, target="10.0.0.2:54"))
    assert "10.0.0.2:54" in by_id(report)["policy.denied"].summary


def test_without_a_target_no_policy_is_asked(tmp_path: Path) -> None:
    checks = diagnose(write_config(tmp_path, SILENT, POLICY))
    assert not {"policy.denied", "policy.gateway"} & set(checks)


def test_a_policy_that_waits_for_a_name_server_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> None:
        time.sleep(0.3)  # beside the event loop, as a silent name server would keep it

    monkeypatch.setattr(examine_module, "TOTAL_S", 0.05)
    monkeypatch.setattr(host_module, "check_policy", wait)
    config = write_config(tmp_path, SILENT, POLICY)
    check = diagnose(config, TOPPY_DOCTOR_TARGET="name.example:53")["policy.denied"]
    assert check.status is Status.SKIP
    assert "no time" in check.summary


# the host and the MTU


def test_a_tun_device_that_can_be_opened_passes(tmp_path: Path) -> None:
    device = tmp_path / "tun"
    device.touch()
    config = write_config(tmp_path, SILENT)
    assert diagnose(config, tun=LinuxTunProbe(str(device)))["tun.perm"].status is Status.PASS


def test_a_tun_device_that_cannot_be_opened_is_a_warning_with_advice(tmp_path: Path) -> None:
    config = write_config(tmp_path, SILENT)
    check = diagnose(config, tun=LinuxTunProbe(str(tmp_path / "none")))["tun.perm"]
    assert check.status is Status.WARN
    assert "modprobe tun" in (check.remedy or "")


def test_a_system_without_a_known_tun_is_a_warning(tmp_path: Path) -> None:
    check = diagnose(write_config(tmp_path, SILENT), tun=OtherTunProbe("plan9"))["tun.perm"]
    assert check.status is Status.WARN
    assert "plan9" in check.summary


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


def test_no_text_shows_the_token(tmp_path: Path) -> None:
    checks = diagnose_at(LoopbackGateway(pong=b"unauthorized"), tmp_path)
    assert "the-token" not in str(checks)
