"""Certificates in use: replaced under load, shown by clients, refused with a word on why."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from integration.conftest import ENGINES, Peer, each_engine, wait_for_metric
from integration.masque_client import EngineClient, connected_engine, open_tunnel, run
from integration.operation import (
    SLOW_RATE,
    change_config,
    gateway_log,
    loads_the_machine,
    operate,
    operate_meanwhile,
    try_operation,
    under_load,
)
from integration.processes import (
    BIN,
    Gateway,
    Running,
    free_udp_port,
    running_gateway,
    start,
    wait_until,
)
from toppy.auth.certificate_chain import fingerprint
from toppy.cli.toppy_gw import app

CLIENTS_RULES = """
[[policy.rules]]
name = "alice"
action = "allow"
cidr = ["127.0.0.0/8"]
subjects = ["cert:alice"]
"""

ACCEPT = "[auth.client_certificate]\naccept = true\n"


def cert(*arguments: str | Path) -> None:
    """``toppy-gw cert``, in this process."""
    done = CliRunner().invoke(app, ["cert", *map(str, arguments)])
    assert done.exit_code == 0, done.output


def served(client: EngineClient) -> str:
    """Fingerprint of the certificate that the gateway has shown."""
    leaf = client.engine.peer_certificates(client.connection)[0]
    return fingerprint(x509.load_der_x509_certificate(leaf))


def on_disk(path: Path) -> str:
    return fingerprint(x509.load_pem_x509_certificate(path.read_bytes()))


@loads_the_machine
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reload_brings_new_connections_the_new_certificate_and_old_ones_lose_nothing(
    directory: Path, echo: Peer, engine: str
) -> None:
    with (
        running_gateway(directory, engine=engine) as gateway,
        under_load(gateway, echo, engine=engine, rate=SLOW_RATE) as loaded,
    ):
        before = on_disk(directory / "server.pem")

        async def scenario() -> None:
            async with connected_engine(gateway) as old:
                tunnel = await open_tunnel(old, echo.host, echo.port)
                cert("server", directory, "--force", "--key-type", "rsa-3072", "--days", "90")
                facts = await operate_meanwhile(gateway, "reload")
                assert facts["warnings"] == []
                await tunnel.echo(b"still here")
                assert served(old) == before
                async with connected_engine(gateway) as new:
                    assert served(new) == on_disk(directory / "server.pem") != before

        run(scenario())
        loaded.assert_whole()
        facts = gateway.status()["certificates"]["server"]
        assert facts["sha256"] == on_disk(directory / "server.pem")
        assert facts["days_left"] == 89
        metric = "toppy_gw_certificate_expiry_timestamp_seconds"
        assert gateway.metric(metric, certificate="server") == pytest.approx(facts["ends_at"])
        assert gateway.healthz().json() == {"status": "ok"}


def test_a_pair_that_does_not_fit_changes_nothing_and_is_told(directory: Path, echo: Peer) -> None:
    with running_gateway(directory) as gateway:
        good = on_disk(directory / "server.pem")
        cert("ca", directory / "other")
        cert("server", directory / "other")
        key = (directory / "server-key.pem").read_bytes()
        for broken, reason in (
            ((directory / "other" / "server-key.pem").read_bytes(), "not the certificate's"),
            (b"nonsense", "no PEM private key"),
        ):
            (directory / "server-key.pem").write_bytes(broken)
            refused = try_operation(gateway, "reload")
            assert refused.returncode == 1
            assert reason in refused.stderr
        (directory / "server-key.pem").write_bytes(key)

        async def scenario() -> None:
            async with connected_engine(gateway) as client:
                assert served(client) == good
                await (await open_tunnel(client, echo.host, echo.port)).echo(b"as before")

        run(scenario())
        assert gateway.status()["generation"] == 1


def start_client(gateway: Gateway, echo: Peer, name: str, extra: str) -> tuple[int, Running]:
    """``toppy udp`` without a token; ``extra`` is TOML of its top level."""
    config = gateway.directory / f"{name}.toml"
    config.write_text(
        f"""
gateway = "{gateway.host}"
port = {gateway.port}
server_name = "localhost"
ca_cert_path = "ca.pem"
{extra}
[[policy.allow]]
cidr = "127.0.0.0/8"
ports = ["1-65535"]
"""
    )
    config.chmod(0o600)
    port = free_udp_port()
    running = start(
        [
            *(BIN / "toppy", "udp", "--config", config),
            *("--listen", f"127.0.0.1:{port}", "--target", f"{echo.host}:{echo.port}"),
        ],
        gateway.directory / f"{name}.log",
    )
    running.wait_for_output("toppy udp listening on")
    return port, running


def ask(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", ("127.0.0.1", port))


def is_answered(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.connect(("127.0.0.1", port))
        sock.send(b"hello")
        try:
            return sock.recv(100) == b"hello"
        except (TimeoutError, ConnectionError):
            return False


@pytest.fixture(scope="module", params=each_engine("certificates"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """Lets certificates in, and tokens beside them; CAs and clients are in its directory."""
    directory = tmp_path_factory.mktemp("gw")
    clients = directory / "clients"
    cert("ca", clients, "--name", "CA of clients")
    cert("client", clients, "alice", "--key-type", "ecdsa-p384")
    cert("client", clients, "bob")
    cert("ca", directory / "strangers")
    cert("client", directory / "strangers", "alice")
    with running_gateway(
        directory,
        engine=request.param,
        rules=CLIENTS_RULES,
        extra=ACCEPT,
        environ={"TOPPY_GW_TLS_CA_PATH": str(clients / "ca.pem")},
    ) as gateway:
        yield gateway


def client_with(gateway: Gateway, echo: Peer, who: str) -> tuple[int, Running]:
    extra = f'client_certificate = "{who}.pem"\nclient_key = "{who}-key.pem"'
    return start_client(gateway, echo, who.replace("/", "-"), extra)


def test_a_certificate_is_a_credential_and_the_rules_know_its_name(
    gateway: Gateway, echo: Peer
) -> None:
    port, running = client_with(gateway, echo, "clients/alice")
    try:
        wait_until("an answer", lambda: is_answered(port))
        (tunnel,) = operate(gateway, "tunnels")["tunnels"]
        assert tunnel["subject"] == "cert:alice"
        assert tunnel["rule"] == "alice"
    finally:
        assert running.stop() == 0


def test_another_name_is_known_and_not_allowed(gateway: Gateway, echo: Peer) -> None:
    port, running = client_with(gateway, echo, "clients/bob")
    try:
        ask(port)
        running.wait_for_output("not allowed")
        wait_for_metric(gateway, 1, "admissions_total", outcome="403")
    finally:
        running.stop()


def test_a_client_without_one_is_told_what_to_set(gateway: Gateway, echo: Peer) -> None:
    _, running = start_client(gateway, echo, "nobody", "")
    try:
        running.wait_for_output("set client_certificate and client_key")
    finally:
        running.stop()


def test_one_of_another_authority_is_told_that_it_is_not_accepted(
    gateway: Gateway, echo: Peer
) -> None:
    _, running = client_with(gateway, echo, "strangers/alice")
    try:
        running.wait_for_output("does not accept the certificate")
    finally:
        running.stop()


def test_a_reload_takes_an_encrypted_key_and_cuts_whom_another_ca_let_in(
    directory: Path, echo: Peer
) -> None:
    (directory / "passphrase").write_text("correct horse battery\n")
    (directory / "passphrase").chmod(0o600)
    for ca in ("first", "second"):
        cert("ca", directory / ca, "--name", ca)
    cert("client", directory / "first", "alice")
    trusted = directory / "clients.pem"
    trusted.write_bytes((directory / "first" / "ca.pem").read_bytes())
    environ = {"TOPPY_GW_TLS_CA_PATH": str(trusted)}
    with running_gateway(directory, rules=CLIENTS_RULES, extra=ACCEPT, environ=environ) as gateway:
        extra = 'client_certificate = "first/alice.pem"\nclient_key = "first/alice-key.pem"'
        port, running = start_client(gateway, echo, "alice", extra)
        try:
            wait_until("an answer", lambda: is_answered(port))
            cert("server", directory, "--force", "--passphrase-file", directory / "passphrase")
            refused = try_operation(gateway, "reload")
            assert "private_key_passphrase_file" in refused.stderr
            change_config(gateway, "[tls]\n", '[tls]\nprivate_key_passphrase_file = "passphrase"\n')
            assert operate(gateway, "reload")["warnings"] == []
            wait_until("an answer", lambda: is_answered(port))
            trusted.write_bytes((directory / "second" / "ca.pem").read_bytes())
            operate(gateway, "reload")
            wait_until("the list", lambda: operate(gateway, "tunnels")["tunnels"] == [])
            events = [line["event"] for line in gateway_log(gateway)]
            assert "tunnel cut: the policy denies it now" in events
            running.wait_for_output("does not accept the certificate")
        finally:
            running.stop()
    assert "correct horse" not in gateway.running.output()
