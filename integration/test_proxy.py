"""``toppy proxy``, ``toppy ssh-proxy`` and ``toppy exec`` through a real gateway."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dns.message
import dns.query
import psutil
import pytest

from integration.conftest import Peer, name_server
from integration.operation import operate, worker_pids
from integration.processes import (
    BIN,
    Gateway,
    free_tcp_port,
    running_gateway,
    wait_until,
    write_client_config,
)
from integration.tcp_client import running_proxy
from integration.test_up import DEADLINE_S, connect, echo, target
from tests.net.dns_server import DnsServer
from toppy.observe.audit_reader import checkpoint_path, verify_log
from toppy.wire.audit_entry import parse_entry
from toppy.wire.socks import encode_udp_header

NAME = "web.lan.test"
"""Only the gateway can resolve it."""
PAGE = os.urandom(100_000)

pytestmark = pytest.mark.xdist_group("tcp-proxy")


class _Web(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(PAGE)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["content-length"])))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class World:
    """A gateway that alone can resolve names, and what is behind it."""

    gateway: Gateway
    web_port: int
    proxy_port: int

    @property
    def url(self) -> str:
        return f"http://{NAME}:{self.web_port}/"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with (
        name_server(DnsServer(records={(NAME, "A"): ["127.0.0.1"]})) as names,
        running_gateway(
            tmp_path_factory.mktemp("gw"), extra=f'[resolver]\nnameservers = ["{names.address}"]'
        ) as gateway,
        running_proxy(gateway) as (port, _),
    ):
        yield World(gateway, web.server_address[1], port)
    web.shutdown()
    web.server_close()


def curl(
    *arguments: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (package curl)")
    plain = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    return subprocess.run(
        ["curl", "--silent", "--show-error", "--noproxy", "", *arguments],
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env={**plain, **(environ or {})},
    )


def toppy(
    world: World, command: str, *arguments: str, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """One of the commands to its end."""
    config = write_client_config(world.gateway, world.gateway.directory / f"{command}.toml")
    return subprocess.run(
        [str(BIN / "toppy"), command, "--config", str(config), *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "TOPPY_AUDIT_LOG": str(world.gateway.directory / f"{command}.jsonl")},
    )


WAYS = [
    pytest.param(["--proxy", "socks5h://127.0.0.1:{port}"], id="socks5"),
    pytest.param(["--proxy", "socks4a://127.0.0.1:{port}"], id="socks4a"),
    pytest.param(["--proxy", "http://127.0.0.1:{port}", "--proxytunnel"], id="connect"),
    pytest.param(["--proxy", "http://127.0.0.1:{port}"], id="absolute"),
]


@pytest.mark.parametrize("way", WAYS)
def test_curl_loads_and_posts_by_a_name_that_the_gateway_resolves(
    world: World, way: Sequence[str]
) -> None:
    options = [option.format(port=world.proxy_port) for option in way]
    loaded = curl(*options, world.url)
    assert (loaded.stdout == PAGE, loaded.stderr) == (True, b"")
    posted = curl(*options, "--data-binary", "something", world.url, world.url)
    assert (posted.stdout, posted.stderr) == (b"something" * 2, b"")


def test_refusals_are_said_in_the_programs_words(world: World) -> None:
    port = world.proxy_port
    for url, code, status, word in (
        (f"http://127.0.0.1:{free_tcp_port()}/", b"(5)", b"502", b"refused"),
        ("http://10.9.8.7/", b"(2)", b"403", b"not allowed"),
        (f"http://nobody.lan.test:{world.web_port}/", b"(4)", b"502", b"resolve"),
    ):
        socks = curl("--proxy", f"socks5h://127.0.0.1:{port}", url)
        assert socks.returncode == 97
        assert code in socks.stderr
        http = curl("--include", "--proxy", f"http://127.0.0.1:{port}", url)
        assert http.stdout.startswith(b"HTTP/1.1 " + status)
        assert b"Proxy-Status: toppy-gw; error=" in http.stdout
        assert word in http.stdout


def test_with_a_password_only_those_who_know_it_get_through(world: World) -> None:
    secret = world.gateway.directory / "proxy-password"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    extra = f'[proxy]\nuser = "me"\npassword_file = "{secret}"\n'
    with running_proxy(world.gateway, extra=extra, name="guarded") as (port, running):
        for scheme in ("socks5h", "http"):
            assert curl("--proxy", f"{scheme}://127.0.0.1:{port}", world.url).stdout != PAGE
            wrong = curl("--proxy", f"{scheme}://me:wrong@127.0.0.1:{port}", world.url)
            assert wrong.stdout != PAGE
            assert (
                curl("--proxy", f"{scheme}://me:s3cret@127.0.0.1:{port}", world.url).stdout == PAGE
            )
        assert "s3cret" not in running.output()


def test_the_pac_file_is_served(world: World) -> None:
    served = curl("--include", f"http://127.0.0.1:{world.proxy_port}/proxy.pac")
    assert b"application/x-ns-proxy-autoconfig" in served.stdout
    assert b"PROXY 127.0.0.1:%d" % world.proxy_port in served.stdout


def associate(port: int) -> tuple[socket.socket, tuple[str, int]]:
    """A SOCKS5 association: the connection that keeps it, and where datagrams go."""
    control = connect(port)
    control.sendall(b"\x05\x01\x00")
    assert control.recv(2) == b"\x05\x00"
    control.sendall(b"\x05\x03\x00\x01" + bytes(6))
    reply = control.recv(10)
    assert reply[1] == 0
    return control, (socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[8:10]))


def test_datagrams_of_every_size_come_back(world: World, echo_peer: Peer) -> None:
    control, relay = associate(world.proxy_port)
    header = encode_udp_header(echo_peer.host, echo_peer.port)
    with control, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        for size in (0, 1, 1200, 1500, 9000, 60_000):
            payload = os.urandom(size)
            sock.sendto(header + payload, relay)
            assert sock.recv(70_000) == header + payload
        for number in range(200):
            sock.sendto(header + number.to_bytes(2), relay)
        back = [int.from_bytes(sock.recv(100)[-2:]) for _ in range(200)]
        assert back == list(range(200))


@pytest.fixture(scope="module")
def echo_peer(echo: Peer) -> Peer:
    return echo


def test_a_name_is_resolved_over_socks_datagrams(world: World) -> None:
    control, relay = associate(world.proxy_port)
    with (
        name_server(DnsServer(records={("a.test", "A"): ["192.0.2.7"]})) as names,
        control,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        host, _, port = names.address.rpartition(":")
        header = encode_udp_header(host, int(port))
        query = dns.message.make_query("a.test", "A")
        sock.settimeout(DEADLINE_S)
        sock.sendto(header + query.to_wire(), relay)
        answer = dns.message.from_wire(sock.recv(4096)[len(header) :])
        assert query.is_response(answer)
        assert "192.0.2.7" in answer.to_text()


def test_what_programs_did_is_in_the_audit_log(world: World) -> None:
    log = world.gateway.directory / "audited.jsonl"
    environ = {"TOPPY_AUDIT_LOG": str(log)}
    with running_proxy(world.gateway, environ=environ, name="audited") as (port, running):
        for _ in range(2):
            assert curl("--proxy", f"socks5h://127.0.0.1:{port}", world.url).stdout == PAGE
        curl("--proxy", f"socks5h://127.0.0.1:{port}", "http://10.9.8.7/")
        running.stop()
    events = [parse_entry(line).event for line in log.read_bytes().splitlines()]
    assert [(event.action, event.target, event.allowed) for event in events] == [
        ("proxy", f"127.0.0.1:{port}", True),
        ("proxy.opened", f"{NAME}:{world.web_port}", True),
        ("proxy.refused", "10.9.8.7:80", False),
        ("proxy.closed", f"127.0.0.1:{port}", True),
    ]
    verify_log(log, None, checkpoints=checkpoint_path(log))


# ssh-proxy


def test_ssh_proxy_carries_standard_input_and_output(world: World) -> None:
    sent = os.urandom(1 << 20)
    with target(echo) as port:
        done = toppy(world, "ssh-proxy", NAME, str(port), stdin=sent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == sent


def test_ssh_proxy_says_what_is_wrong_on_standard_error(world: World) -> None:
    for host, port, code, reason in (
        ("127.0.0.1", free_tcp_port(), 1, b"refused the connection"),
        ("10.9.8.7", 22, 2, b"policy denied: 403: target 10.9.8.7:22 is not allowed"),
    ):
        done = toppy(world, "ssh-proxy", host, str(port), stdin=b"")
        assert (done.returncode, done.stdout) == (code, b"")
        assert reason in done.stderr


# exec


def test_exec_gives_a_program_the_way_and_tells_its_exit_code(world: World) -> None:
    script = (
        f"curl --silent --noproxy '' {world.url} && curl -s --proxy $ALL_PROXY {world.url}; exit 7"
    )
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (package curl)")
    done = toppy(world, "exec", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout == PAGE * 2, done.stderr) == (7, True, b"")


def test_the_proxy_of_exec_is_for_its_program_alone(world: World) -> None:
    script = (
        "import os, socket, sys; port = int(os.environ['http_proxy'].rpartition(':')[2]);"
        "sock = socket.create_connection(('127.0.0.1', port));"
        "sock.sendall(b'\\5\\1\\0'); sys.stdout.write(sock.recv(2).hex())"
    )
    done = toppy(world, "exec", "--", sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, b"05ff")


# bounds


def test_garbage_and_silence_leave_nothing_behind(world: World) -> None:
    extra = "[proxy]\nhandshake_timeout_s = 0.5\nmax_connections = 500\n"
    with running_proxy(world.gateway, extra=extra, name="bounded") as (port, running):
        assert curl("--proxy", f"socks5h://127.0.0.1:{port}", world.url).stdout == PAGE
        process = psutil.Process(running.pid)
        worker = psutil.Process(next(iter(worker_pids(world.gateway).values())))
        wait_until("the end of the first", lambda: not process.net_connections("tcp")[1:])
        before = process.num_fds()
        silent = [connect(port) for _ in range(600)]
        for number in range(300):
            with connect(port) as sock:
                sock.sendall(os.urandom(number + 1))
        for sock in silent:
            sock.close()
        wait_until("as few descriptors as before", lambda: process.num_fds() == before)
        assert curl("--proxy", f"socks5h://127.0.0.1:{port}", world.url).stdout == PAGE
        assert operate(world.gateway, "tunnels")["tunnels"] == []
        assert worker.is_running()


def test_a_port_for_others_needs_a_password(world: World) -> None:
    done = toppy(world, "proxy", "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert b"could use your access" in done.stderr
    assert Path(world.gateway.directory).exists()
