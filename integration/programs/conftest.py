"""One gateway, one ``toppy proxy``, and real servers: each is started once, in a directory of its
own, when the first test wants it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.conftest import name_server
from integration.peers import start_dns_server
from integration.processes import (
    UNLIMITED,
    free_udp_port,
    running_gateway,
    write_client_config,
)
from integration.programs.servers import (
    PostgresServer,
    Sites,
    SshServer,
    running_iperf3,
    running_postgres,
    running_sites,
    running_sshd,
)
from integration.programs.through import NAMES, SHELL, Client, local_proxy, need, ssh_proxy
from tests.net.dns_server import DnsServer

RULES = """
[[policy.rules]]
name = "programs"
action = "allow"
cidr = ["127.0.0.0/8"]
"""


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A gateway with a resolver of its own, and a configuration of a client."""
    directory = tmp_path_factory.mktemp("gw")
    names = DnsServer(records={(name, "A"): ["127.0.0.1"] for name in NAMES})
    with (
        name_server(names),
        running_gateway(
            directory, rules=RULES, extra=f'[resolver]\nnameservers = ["{names.address}"]\n'
        ) as gateway,
    ):
        config = write_client_config(gateway, directory / "programs.toml", extra=UNLIMITED)
        yield Client(gateway, config)


@pytest.fixture(scope="session")
def proxy_port(client: Client) -> Iterator[int]:
    """The port of a ``toppy proxy``."""
    with local_proxy(client) as port:
        yield port


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """A web site, with and without TLS."""
    with running_sites(tmp_path_factory.mktemp("sites")) as running:
        yield running


@pytest.fixture(scope="session")
def ssh_server(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """An OpenSSH server that is reached by way of ``toppy ssh-proxy``."""
    with running_sshd(tmp_path_factory.mktemp("sshd"), SHELL, ssh_proxy(client)) as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server."""
    with running_postgres() as running:
        yield running


@pytest.fixture(scope="session")
def dns_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of dnsmasq, UDP and TCP."""
    need("dnsmasq", "dnsmasq-base")
    port = free_udp_port()
    running, _ = start_dns_server(port, tmp_path_factory.mktemp("dns"))
    yield port
    running.stop()


@pytest.fixture(scope="session")
def iperf3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an iperf3 server."""
    with running_iperf3(tmp_path_factory.mktemp("iperf3")) as port:
        yield port
