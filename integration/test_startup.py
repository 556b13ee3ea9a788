"""What the gateway makes of its configuration file and its environment when it starts."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest

from integration.conftest import Peer
from integration.masque_client import DEADLINE_S, ask, connected, connected_engine, open_tunnel, run
from integration.operation import change_config, operate, wait_for_generations
from integration.processes import (
    BIN,
    Gateway,
    Running,
    free_tcp_port,
    free_udp_port,
    run_command,
    running_gateway,
    start,
    wait_until,
    write_gateway_config,
)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short: unix socket paths are limited to 107 bytes."""
    return tmp_path_factory.mktemp("gw")


def start_bare(directory: Path, environ: dict[str, str], *arguments: str | Path) -> Running:
    """``toppy-gw run`` with nothing but what the test gives."""
    whole = {
        "TOPPY_GW_RUNTIME_DIR": str(directory / "run"),
        "TOPPY_GW_CONFIG": "",
        **environ,
    }
    return start([BIN / "toppy-gw", "run", *arguments], directory / "bare.log", whole)


def needs_no_system_config() -> None:
    if Path("/etc/toppy/gateway.toml").exists():
        pytest.skip("this host has a configuration of its own in /etc/toppy")


def test_the_environment_alone_is_enough(directory: Path, echo: Peer) -> None:
    needs_no_system_config()
    made = run_command("toppy-gw", "init", str(directory))
    assert made.returncode == 0
    port, health = free_udp_port(), free_tcp_port()
    running = start_bare(
        directory,
        {
            "TOPPY_GW_LISTEN": f"127.0.0.1:{health}",
            "TOPPY_GW_QUIC_LISTEN": f"127.0.0.1:{port}",
            "TOPPY_GW_CERT": str(directory / "server.pem"),
            "TOPPY_GW_KEY": str(directory / "server-key.pem"),
            "TOPPY_GW_TOKEN": "a-token-of-the-environment",
        },
    )
    gateway = Gateway(directory, "127.0.0.1", port, health, running, "a-token-of-the-environment")
    try:
        running.wait_for_output("gateway serves")
        assert gateway.healthz().status_code == 200

        async def scenario() -> None:
            async with connected(gateway) as client:
                tunnel = await open_tunnel(client, "localhost", 9)
                await tunnel.echo(b"without a file")
                # no policy: everything is denied
                assert (await ask(client, echo.host, echo.port).answer()).status == 403

        run(scenario())
    finally:
        running.stop()


def test_the_environment_overrides_the_file(directory: Path) -> None:
    port, health = free_udp_port(), free_tcp_port()
    environ = {
        "TOPPY_GW_TOKEN": "another-token-altogether",
        "TOPPY_GW_QUIC_LISTEN": f"127.0.0.1:{port}",
        "TOPPY_GW_LISTEN": f"127.0.0.1:{health}",
        "TOPPY_GW_JWT_SECRET": "a secret of the environment, long enough",
        "TOPPY_GW_JWT_ISS": "issuer",
        "TOPPY_GW_JWT_AUD": "audience",
    }
    with running_gateway(directory, environ=environ) as gateway:
        old_token, gateway.port, gateway.health_port = gateway.token, port, health
        assert gateway.healthz().status_code == 200

        async def scenario() -> None:
            claims = {"iss": "issuer", "aud": "audience", "exp": time.time() + 60}
            async with connected_engine(gateway) as client:
                for token, status in (
                    (old_token, 401),
                    ("another-token-altogether", 200),
                    (jwt.encode(claims, environ["TOPPY_GW_JWT_SECRET"]), 200),
                    (jwt.encode({**claims, "aud": "x"}, environ["TOPPY_GW_JWT_SECRET"]), 401),
                ):
                    tunnel = ask(client, "localhost", 9, token=token)
                    assert (await tunnel.answer()).status == status

        run(scenario())


@pytest.mark.parametrize("given", ["TOPPY_GW_CERT", "TOPPY_GW_KEY"])
def test_a_certificate_without_its_key_is_refused(directory: Path, given: str) -> None:
    running = start_bare(directory, {"TOPPY_GW_TOKEN": "long-enough", given: "/dev/null"})
    assert running.process.wait(DEADLINE_S) == 1
    assert "TOPPY_GW_CERT and TOPPY_GW_KEY go together" in running.output()


def test_a_variable_that_nobody_knows_is_a_warning(directory: Path) -> None:
    with running_gateway(directory, environ={"TOPPY_GW_TOKNE": "x"}) as gateway:
        log = gateway.running.output()
        assert "TOPPY_GW_TOKNE is not known (did you mean TOPPY_GW_TOKEN?)" in log


def test_without_authentication_it_refuses_to_start(directory: Path) -> None:
    needs_no_system_config()
    running = start_bare(directory, {})
    assert running.process.wait(DEADLINE_S) == 1
    assert "no authentication is configured" in running.output()
    assert "TOPPY_GW_TOKEN" in running.output()


def open_config(directory: Path, listen: str) -> Path:
    path = directory / "open.toml"
    path.write_text(
        f'insecure_no_auth = true\nruntime_dir = "run"\n'
        f'[listen]\nquic = ["{listen}"]\nhealth = ""\n'
    )
    return path


def test_an_open_gateway_serves_loopback_only(directory: Path) -> None:
    running = start_bare(directory, {}, "--config", open_config(directory, "0.0.0.0:0"))
    assert running.process.wait(DEADLINE_S) == 1
    assert "loopback addresses only" in running.output()
    running = start_bare(directory, {}, "--config", open_config(directory, "127.0.0.1:0"))
    try:
        running.wait_for_output("gateway serves")
        assert "no authentication" in running.output()
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"workers": 0}, ["gateway.toml:2", "workers = 0", "from 1 to 64"]),
        ({"engine": "turbo"}, ["quic.engine = 'turbo'", "'native'", "'aioquic'"]),
        (
            {"extra": "[limits]\nmax_conections = 5"},
            ["limits.max_conections", "unknown key", "did you mean max_connections?"],
        ),
        (
            {"extra": "[limits]\nretry_threshold = -1"},
            ["limits.retry_threshold = -1", "from 0 to 1000000"],
        ),
        ({"extra": "[resolver]\nnameservers = ['dns.example']"}, ["resolver.nameservers"]),
        (
            {"rules": "[[policy.rules]]\naction = 'allow'\ncidr = ['10.0.0.0/33']"},
            ["10.0.0.0/33", "is no network", "10.0.0.0/8"],
        ),
        ({"rules": "[[policy.rules]]\naction = 'permit'"}, ["action = 'permit'", "'allow'"]),
        ({"extra": "[["}, ["gateway.toml", "not valid TOML", "line"]),
        ({"host": "localhost"}, ["listen.quic", "localhost", "not a name"]),
    ],
)
def test_check_config_names_file_key_value_and_what_is_allowed(
    directory: Path, change: dict[str, Any], expected: list[str]
) -> None:
    assert run_command("toppy-gw", "init", str(directory)).returncode == 0
    write_gateway_config(directory, port=4433, health_port=8080, **change)
    checked = run_command("toppy-gw", "check-config", "--config", str(directory / "gateway.toml"))
    assert checked.returncode == 1
    for text in expected:
        assert text in checked.stderr
    assert "Traceback" not in checked.stderr


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("token", None, "auth.token_file: cannot read"),
        ("token", "short", "too short"),
        ("server.pem", None, "tls.certificate: cannot read"),
        ("server.pem", "no PEM at all", "tls.certificate"),
        ("server-key.pem", "no PEM at all", "tls.private_key"),
        ("server-key.pem", "another key", "tls.private_key"),
    ],
)
def test_check_config_reads_every_file_that_is_named(
    directory: Path, name: str, content: str | None, expected: str
) -> None:
    assert run_command("toppy-gw", "init", str(directory)).returncode == 0
    path = directory / name
    if content is None:
        path.unlink()
    elif content == "another key":
        path.write_bytes((directory / "ca-key.pem").read_bytes())
    else:
        path.write_text(content)
    checked = run_command("toppy-gw", "check-config", "--config", str(directory / "gateway.toml"))
    assert checked.returncode == 1
    assert expected in checked.stderr
    assert "Traceback" not in checked.stderr


def test_a_secret_file_that_others_can_read_is_a_warning(directory: Path) -> None:
    assert run_command("toppy-gw", "init", str(directory)).returncode == 0
    (directory / "token").chmod(0o644)
    checked = run_command("toppy-gw", "check-config", "--config", str(directory / "gateway.toml"))
    assert checked.returncode == 0
    assert "chmod 600" in checked.stderr


def hears_later(pid: int) -> bool:
    """Whether a process lets SIGHUP wait (proc_pid_status(5))."""
    (held,) = (
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigBlk:")
    )
    return bool(int(held, 16) & 1 << (signal.SIGHUP - 1))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_waits_until_it_can_be_obeyed(
    directory: Path, number: signal.Signals
) -> None:
    with running_gateway(directory) as gateway:
        gateway.running.stop()
        again = start(
            [BIN / "toppy-gw", "run", "--config", directory / "gateway.toml"],
            directory / "again.log",
        )
        gateway.running = again
        try:
            wait_until("its first lines", lambda: hears_later(again.pid))
            again.process.send_signal(number)
            if number == signal.SIGHUP:
                again.wait_for_output("reloaded")
                wait_for_generations(gateway, {2: "active"})
                assert not hears_later(again.pid)
                assert not any(hears_later(w["pid"]) for w in gateway.status()["workers"])
            else:
                assert again.process.wait(10) == 0
        finally:
            again.stop()
        assert [path.name for path in (directory / "run").iterdir()] == ["lock"]


def test_workers_are_pinned_to_cores_in_turn_where_asked(directory: Path) -> None:
    may_use = psutil.Process().cpu_affinity() or []
    with running_gateway(directory, workers=2) as gateway:
        assert cores_of_workers(gateway) == [may_use, may_use]
        change_config(gateway, "workers = 2", "workers = 2\npin_workers = true")
        operate(gateway, "reload")
        wait_for_generations(gateway, {2: "active"})
        assert cores_of_workers(gateway) == [[may_use[n % len(may_use)]] for n in range(2)]


def cores_of_workers(gateway: Gateway) -> list[list[int] | None]:
    return [psutil.Process(worker["pid"]).cpu_affinity() for worker in gateway.status()["workers"]]
