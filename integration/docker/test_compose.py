"""docker/compose.yaml on a real engine: healthy, relaying, reloaded under traffic, restarted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.docker.engine import Engine
from integration.docker.image import PROJECT
from integration.processes import BIN, wait_until

pytestmark = [pytest.mark.xdist_group("docker"), pytest.mark.timeout(300)]

GATEWAY, CLIENT, ECHO, INIT = (
    f"toppy_{service}_1" for service in ("gateway", "client", "udp-echo", "init")
)
REQUIRED_CHECKS = {"cfg.load", "net.dns", "h3.connect", "masque.connect_udp"}
ASK = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect(("127.0.0.1", 19000))
    sock.send(b"hello")
    print(sock.recv(100).decode())
"""


def status(engine: Engine) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(
        engine.docker("exec", GATEWAY, "toppy-gw", "status", "--json")
    )
    return facts


def process_states(engine: Engine, container: str) -> list[str]:
    """The state letter of each process in a container, as proc(5) has it."""
    script = "for s in /proc/[0-9]*/status; do sed -n 's/^State:.\\(.\\).*/\\1/p' $s; done"
    return engine.docker("exec", container, "sh", "-c", script).split()


@pytest.fixture
def traffic(engine: Engine, services: Path) -> Iterator[subprocess.Popen[str]]:
    """Numbered datagrams to the client, in its network namespace: not through Docker's proxy."""
    enter = ["nsenter", f"--net=/proc/{engine.pid(CLIENT)}/ns/net"]
    process = subprocess.Popen(
        [*enter, sys.executable, "-m", "integration.docker.traffic", "19000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def counts(process: subprocess.Popen[str]) -> dict[str, int]:
    """End the traffic; what became of it."""
    said, _ = process.communicate(timeout=30)
    found: dict[str, int] = json.loads(said)
    return found


def test_every_service_is_healthy(engine: Engine, services: Path) -> None:
    # docker/compose.sh gives them 30 s
    assert [engine.health(name) for name in (GATEWAY, CLIENT, ECHO)] == ["healthy"] * 3
    assert engine.inspect(INIT)["State"]["ExitCode"] == 0


def test_healthz_answers_on_the_host(engine: Engine, services: Path) -> None:
    answer = engine.run_on_host("curl", "-sSi", "http://127.0.0.1:8080/healthz").stdout
    assert answer.startswith("HTTP/1.1 200")
    assert answer.endswith('{"status":"ok"}')


def test_echo_goes_through_client_and_gateway(engine: Engine, services: Path) -> None:
    before = status(engine)["tunnels"]
    assert engine.run_on_host(sys.executable, "-c", ASK).stdout.strip() == "hello"
    wait_until("the tunnel in the status", lambda: bool(status(engine)["tunnels"] > before))


def test_doctor_passes_with_the_files_that_compose_up_wrote(engine: Engine, services: Path) -> None:
    config = services / ".dev" / "compose" / "client.toml"
    assert config.stat().st_mode & 0o077 == 0
    done = engine.run_on_host(BIN / "toppy", "doctor", "--json", "--config", config)
    report = json.loads(done.stdout)
    passed = {check["id"] for check in report["checks"] if check["status"] == "pass"}
    assert passed >= REQUIRED_CHECKS | {"masque.connect_udp.datagram"}
    assert done.returncode == 0


def test_make_doctor_asks_the_gateway_that_is_there(services: Path) -> None:
    def said(directory: Path) -> str:
        made = subprocess.run(
            ["make", "--dry-run", "doctor"],
            capture_output=True,
            text=True,
            check=True,
            cwd=directory,
        )
        return made.stdout

    assert "--config .dev/compose/client.toml" in said(services)
    moved = services / ".dev" / "elsewhere"
    (services / ".dev" / "compose").rename(moved)
    try:
        assert "--config .dev/client.toml" in said(services)
    finally:
        moved.rename(services / ".dev" / "compose")


def test_second_up_keeps_the_keys(engine: Engine, services: Path) -> None:
    token = engine.docker("exec", GATEWAY, "cat", "/etc/toppy/token")
    engine.docker("start", "--attach", INIT)
    assert engine.docker("exec", GATEWAY, "cat", "/etc/toppy/token") == token


@pytest.mark.parametrize("container", [GATEWAY, CLIENT, ECHO])
def test_container_has_no_rights(engine: Engine, services: Path, container: str) -> None:
    facts = Path(f"/proc/{engine.pid(container)}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in facts.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {"10001"}
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    tried = engine.run_on_host("docker", "exec", container, "touch", "/opt/toppy/new")
    assert tried.returncode != 0
    assert "Read-only file system" in tried.stderr


def test_hup_reloads_under_traffic_and_nothing_is_lost(
    engine: Engine, services: Path, traffic: subprocess.Popen[str]
) -> None:
    before = status(engine)
    config = services / "docker" / "compose" / "gateway.toml"
    config.write_text(config.read_text() + '\n[log]\nlevel = "debug"\n')
    for reload in (1, 2):
        wanted = before["generation"] + reload
        engine.docker("kill", "--signal", "HUP", GATEWAY)
        wait_until(f"generation {wanted}", partial(has_only, engine, wanted))
    found = counts(traffic)
    after = status(engine)
    assert found["sent"] > 1000
    # order across the switch is no promise of this test: echoes of the old and of the new workers
    # may overtake each other
    assert (found["lost"], found["duplicated"]) == (0, 0), (
        f"{after['drops']}\n{engine.run_on_host('docker', 'logs', CLIENT).stderr[-2000:]}"
    )
    assert after["pid"] == 1
    assert after["worker_deaths"] == 0
    assert engine.health(GATEWAY) == "healthy"
    # whatever the first process started, it has waited for
    assert "Z" not in process_states(engine, GATEWAY)


def has_only(engine: Engine, generation: int) -> bool:
    """Whether a generation serves and every older one has ended."""
    facts = status(engine)
    return facts["rollout"] == "idle" and [g["generation"] for g in facts["generations"]] == [
        generation
    ]


def test_hup_with_a_configuration_that_is_wrong_changes_nothing(
    engine: Engine, services: Path, traffic: subprocess.Popen[str]
) -> None:
    before = status(engine)
    config = services / "docker" / "compose" / "gateway.toml"
    good = config.read_text()
    config.write_text(good.replace('"/etc/toppy/token"', '"/etc/toppy/nothing"'))
    try:
        engine.docker("kill", "--signal", "HUP", GATEWAY)

        def was_refused() -> bool:
            last = status(engine)["last_reload"]
            return last != before["last_reload"] and not last["ok"]

        wait_until("the refusal", was_refused)
    finally:
        config.write_text(good)
    after = status(engine)
    assert "auth.token_file" in after["last_reload"]["message"]
    assert after["generation"] == before["generation"]
    found = counts(traffic)
    assert found == {"sent": found["sent"], "lost": 0, "duplicated": 0, "reordered": 0}


def test_client_finds_a_gateway_that_was_stopped_and_started_again(
    engine: Engine, services: Path
) -> None:
    engine.docker("stop", GATEWAY)
    state = engine.inspect(GATEWAY)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    engine.docker("start", GATEWAY)
    wait_until("the gateway's health", lambda: engine.health(GATEWAY) == "healthy", 30.0)

    def echoes() -> bool:
        return engine.run_on_host(sys.executable, "-c", ASK).stdout.strip() == "hello"

    wait_until("an echo", echoes, 60.0)


def test_the_audit_log_outlives_the_container(engine: Engine, services: Path) -> None:
    assert status(engine)["audit"]["path"] == "/var/lib/toppy-gw/audit.jsonl"
    facts = json.loads(engine.docker("exec", GATEWAY, "toppy-gw", "audit", "verify", "--json"))
    before = facts["entries"]
    engine.docker("restart", GATEWAY)
    wait_until("the gateway's health", lambda: engine.health(GATEWAY) == "healthy", 30.0)
    facts = json.loads(engine.docker("exec", GATEWAY, "toppy-gw", "audit", "verify", "--json"))
    assert facts["ok"]
    assert facts["entries"] > before
    said = engine.docker("exec", GATEWAY, "toppy-gw", "audit", "tail", "-n", "100000")
    assert "tunnel.opened" in said


def test_compose_script_says_how_to_use_it() -> None:
    done = subprocess.run(
        [PROJECT / "docker" / "compose.sh"], capture_output=True, text=True, check=False
    )
    if "usage" not in done.stderr:
        assert "there is no Docker Compose here" in done.stderr
    assert done.returncode in (1, 2)
