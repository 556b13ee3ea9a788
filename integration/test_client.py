"""``toppy udp`` and ``toppy doctor`` as processes, against a real gateway."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.conftest import ENGINES, Peer, wait_for_metric
from integration.processes import (
    BIN,
    Gateway,
    free_udp_port,
    run_command,
    running_gateway,
    running_udp_client,
    start,
    wait_until,
    write_client_config,
)

CHECKS = [
    "cfg.load",
    "net.dns",
    "net.udp",
    "net.mtu.up",
    "tls.certificate",
    "auth.token",
    "h3.connect",
    "masque.connect_udp",
    "masque.connect_udp.datagram",
    "net.mtu.down",
    "net.latency",
    "net.nat",
    "clock.skew",
    "gateway.version",
    "tun.perm",
    "mtu.sanity",
]
NO_TUN = {"TOPPY_DOCTOR_TUN": "pass"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that no test harms."""
    with running_gateway(tmp_path_factory.mktemp("gw")) as running:
        yield running


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}


def client_config(gateway: Gateway, path: Path, /, **changes: Any) -> Path:
    """The usual client configuration, with top-level keys changed; None takes one away."""
    write_client_config(gateway, path)
    lines = path.read_text().splitlines()
    for key, value in changes.items():
        lines = [line for line in lines if not line.startswith(f"{key} =")]
        if value is not None:
            lines.insert(0, f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    return path


def doctor(config: Path, **environ: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and (status, summary and remedy) by check ID."""
    done = run_command(
        "toppy", "doctor", "--json", "--config", str(config), env=environment(**environ)
    )
    report = json.loads(done.stdout)
    assert set(report) == {"version", "overall", "checks"}
    return done.returncode, {
        c["id"]: (c["status"], f"{c['summary']}; {c['remedy']}") for c in report["checks"]
    }


def exchange(port: int, payload: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect(("127.0.0.1", port))
        sock.send(payload)
        return sock.recv(65535)


class TestDoctor:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_every_check_passes_on_a_good_way(
        self, gateway: Gateway, tmp_path: Path, engine: str
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml")
        code, checks = doctor(config, TOPPY_QUIC_ENGINE=engine, **NO_TUN)
        assert code == 0, checks
        assert list(checks) == CHECKS
        assert {status for status, _ in checks.values()} == {"pass"}

    def test_people_get_lines(self, gateway: Gateway, tmp_path: Path) -> None:
        config = client_config(gateway, tmp_path / "c.toml")
        done = run_command("toppy", "doctor", "--config", str(config), env=environment(**NO_TUN))
        lines = done.stdout.splitlines()
        assert lines[0] == "doctor: pass"
        assert lines[1].startswith("version: ")
        assert lines[2].startswith("- [pass] cfg.load: ")

    def test_a_wrong_token_is_named_and_later_checks_are_skipped(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml", auth_token="wrong-token")
        code, checks = doctor(config)
        assert code == 1
        assert checks["h3.connect"][0] == "fail"
        assert "unauthorized" in checks["h3.connect"][1]
        assert "auth_token" in checks["h3.connect"][1]
        assert checks["masque.connect_udp"][0] == "skip"
        assert "mend h3.connect first" in checks["masque.connect_udp"][1]

    def test_a_certificate_of_another_ca_fails_with_advice(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        run_command("toppy-gw", "init", str(tmp_path / "other"))
        config = client_config(
            gateway, tmp_path / "c.toml", ca_cert_path=str(tmp_path / "other" / "ca.pem")
        )
        code, checks = doctor(config)
        assert code == 1
        assert checks["h3.connect"][0] == "fail"
        assert "ca_cert_path" in checks["h3.connect"][1]

    def test_a_name_that_the_certificate_lacks_fails(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml", server_name="other.example")
        code, checks = doctor(config)
        assert code == 1
        assert "certificate" in checks["h3.connect"][1]

    def test_a_gateway_that_is_not_there_fails_with_advice(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml", port=free_udp_port())
        code, checks = doctor(config)
        assert code == 1
        assert checks["net.udp"][0] == checks["h3.connect"][0] == "fail"
        assert "nothing listens" in checks["net.udp"][1]
        assert "no answer" in checks["h3.connect"][1]

    def test_a_name_that_does_not_resolve_skips_the_rest(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml", gateway="gw.invalid")
        code, checks = doctor(config)
        assert code == 1
        assert checks["net.dns"][0] == "fail"
        assert checks["h3.connect"][0] == "skip"

    def test_without_a_configuration_network_checks_are_skipped(self, tmp_path: Path) -> None:
        code, checks = doctor(tmp_path / "none.toml")
        assert code == 1
        assert checks["cfg.load"][0] == "fail"
        assert "toppy-gw init" in checks["cfg.load"][1]
        assert checks["net.dns"][0] == "skip"

    def test_a_missing_ca_file_is_named(self, gateway: Gateway, tmp_path: Path) -> None:
        config = client_config(gateway, tmp_path / "c.toml", ca_cert_path="/nowhere/ca.pem")
        code, checks = doctor(config)
        assert code == 1
        assert "ca_cert_path" in checks["cfg.load"][1]
        assert "/nowhere/ca.pem" in checks["cfg.load"][1]

    @pytest.mark.parametrize(("mtu", "status"), [(None, "warn"), (1000, "warn"), (1350, "pass")])
    def test_the_mtu_is_judged(
        self, gateway: Gateway, tmp_path: Path, mtu: int | None, status: str
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml", mtu=mtu)
        _, checks = doctor(config, TOPPY_DOCTOR_NET="skip")
        assert checks["mtu.sanity"][0] == status

    @pytest.mark.parametrize(
        ("value", "status"), [("pass", "pass"), ("fail", "fail"), ("skip", "warn")]
    )
    def test_the_environment_overrides_network_and_tun(
        self, gateway: Gateway, tmp_path: Path, value: str, status: str
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml")
        _, checks = doctor(config, TOPPY_DOCTOR_NET=value, TOPPY_DOCTOR_TUN=value)
        assert {checks[check][0] for check in CHECKS[1:15]} == {status}

    def test_policy_is_asked_about_a_target(self, gateway: Gateway, tmp_path: Path) -> None:
        path = client_config(gateway, tmp_path / "c.toml")
        _, checks = doctor(path, TOPPY_DOCTOR_NET="skip", TOPPY_DOCTOR_TARGET="10.0.0.1:53")
        assert checks["policy.denied"][0] == "pass"
        path.write_text(path.read_text().partition("[policy]")[0])
        _, checks = doctor(path, TOPPY_DOCTOR_NET="skip", TOPPY_DOCTOR_TARGET="10.0.0.1:53")
        assert checks["policy.denied"][0] == "warn"
        path.write_text(path.read_text() + '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [80]\n')
        code, checks = doctor(path, TOPPY_DOCTOR_NET="skip", TOPPY_DOCTOR_TARGET="10.0.0.1:53")
        assert code == 1
        assert checks["policy.denied"][0] == "fail"
        assert "not allowed" in checks["policy.denied"][1]


class TestUdp:
    def test_a_denied_target_exits_with_2_and_opens_no_socket(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml")
        text = config.read_text().partition("[policy]")[0]
        config.write_text(text + '[[policy.allow]]\ncidr = "10.0.0.0/8"\nports = [53]\n')
        port = free_udp_port()
        done = run_command(
            *("toppy", "udp", "--config", str(config)),
            *("--listen", f"127.0.0.1:{port}", "--target", "10.0.0.1:54"),
        )
        assert done.returncode == 2
        assert done.stderr.startswith("Policy denied: ")
        assert "10.0.0.1:54 is not allowed" in done.stderr
        assert done.stdout == ""

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (("--listen", "nonsense", "--target", "10.0.0.1:53"), "--listen"),
            (("--listen", "127.0.0.1:0", "--target", "10.0.0.1:0"), "--target"),
            (("--listen", "127.0.0.1:0", "--target", "127.1:53"), "--target"),
            (("--listen", "192.0.2.1:1", "--target", "10.0.0.1:53"), "cannot listen"),
        ],
    )
    def test_a_bad_argument_exits_with_1_and_is_named(
        self, gateway: Gateway, tmp_path: Path, arguments: tuple[str, ...], part: str
    ) -> None:
        config = client_config(gateway, tmp_path / "c.toml")
        done = run_command("toppy", "udp", "--config", str(config), *arguments)
        assert done.returncode == 1
        assert part in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_missing_option_is_wrong_usage(self) -> None:
        assert run_command("toppy", "udp", "--listen", "127.0.0.1:0").returncode == 2

    def test_a_signal_ends_it_with_counts_and_exit_code_0(
        self, gateway: Gateway, echo: Peer
    ) -> None:
        with running_udp_client(gateway, f"{echo.host}:{echo.port}", name="counts") as (
            port,
            running,
        ):
            assert exchange(port, b"hello") == b"hello"
            assert running.stop(signal.SIGINT) == 0
            assert "1 peers, 1 datagrams (5 bytes) out, 1 datagrams (5 bytes) in" in (
                running.output()
            )

    def test_a_refused_tunnel_is_told_in_plain_words(
        self, gateway: Gateway, tmp_path: Path
    ) -> None:
        with running_udp_client(gateway, "10.1.2.3:53", name="refused") as (port, running):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", ("127.0.0.1", port))
            running.wait_for_output("10.1.2.3:53 is not allowed")
            assert "operator" in running.output()

    def test_a_wrong_certificate_is_told_and_nothing_is_sent(
        self, gateway: Gateway, echo: Peer, tmp_path: Path
    ) -> None:
        counted = (
            "toppy_gw_admissions_total",
            "toppy_gw_datagrams_total",
            "toppy_gw_tunnels_total",
        )
        before = [gateway.metric(name) for name in counted]
        failed = gateway.metric("toppy_gw_handshakes_total", outcome="failed")
        config = client_config(gateway, tmp_path / "c.toml", server_name="other.example")
        port = free_udp_port()
        running = start(
            [
                *(BIN / "toppy", "udp", "--config", config),
                *("--listen", f"127.0.0.1:{port}", "--target", f"{echo.host}:{echo.port}"),
            ],
            tmp_path / "log",
        )
        running.wait_for_output("toppy udp listening on")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"for the right gateway alone", ("127.0.0.1", port))
        running.wait_for_output("certificate")
        # two more attempts, with the datagram in hand; what they brought is reported by then
        wait_for_metric(gateway, failed + 2, "handshakes_total", outcome="failed")
        assert running.stop() == 0
        assert [gateway.metric(name) for name in counted] == before

    def test_no_secret_is_in_arguments_or_output(self, gateway: Gateway, echo: Peer) -> None:
        with running_udp_client(gateway, f"{echo.host}:{echo.port}", name="quiet") as (
            port,
            running,
        ):
            exchange(port, b"hello")
            process = psutil.Process(running.pid)
            assert gateway.token not in " ".join(process.cmdline())
            assert gateway.token not in running.output()

    def test_the_local_socket_outlives_the_gateway(
        self, tmp_path_factory: pytest.TempPathFactory, echo: Peer
    ) -> None:
        directory = tmp_path_factory.mktemp("gw")
        with running_gateway(directory) as gateway:
            context = running_udp_client(gateway, f"{echo.host}:{echo.port}", name="outlive")
            with context as (port, running):
                assert exchange(port, b"before") == b"before"
                gateway.running.stop()
                running.wait_for_output("no connection to the gateway")
                again = start(
                    [BIN / "toppy-gw", "run", "--config", directory / "gateway.toml"],
                    directory / "again.log",
                )
                try:
                    again.wait_for_output("gateway serves")

                    def answers() -> bool:
                        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                            sock.settimeout(0.5)
                            sock.connect(("127.0.0.1", port))
                            sock.send(b"after")
                            try:
                                return sock.recv(100) == b"after"
                            except TimeoutError:
                                return False

                    wait_until("echo through the new gateway", answers)
                finally:
                    again.stop()
