"""``make demo``: a gateway, a client and real applications on this machine, in a minute.

Exit 0 only when everything that was sent came back.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dns.message
import dns.query
import dns.rdatatype
from rich.console import Console
from rich.progress import track

from integration.peers import (
    DNS_ADDRESS,
    DNS_NAME,
    PAGE,
    fetch_http3,
    start_dns_server,
    start_peer,
)
from integration.processes import (
    Running,
    free_udp_port,
    running_gateway,
    running_udp_client,
    wait_until,
)

ECHOES = 10_000
SIZE = 1200
_WINDOW = 32
_TIMEOUT_S = 5.0

console = Console(highlight=False)


class DemoError(Exception):
    """Something was lost or failed."""


def check_dns(port: int) -> str:
    """Resolve through the tunnel; with ``dig`` where it is installed."""
    dig = shutil.which("dig")
    if dig is not None:
        command = [
            dig,
            "@127.0.0.1",
            "-p",
            str(port),
            DNS_NAME,
            "A",
            "+short",
            "+time=3",
            "+tries=2",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        answer = done.stdout.strip()
    else:
        query = dns.message.make_query(DNS_NAME, dns.rdatatype.A)
        response = dns.query.udp(query, "127.0.0.1", port=port, timeout=_TIMEOUT_S)
        answer = response.answer[0][0].to_text() if response.answer else ""
    if answer != DNS_ADDRESS:
        raise DemoError(f"DNS through the tunnel answered {answer!r} instead of {DNS_ADDRESS}")
    return "dig" if dig else "dnspython"


def check_http3(port: int, ca: Path) -> int:
    """Fetch a page over HTTP/3 whose QUIC packets travel in the tunnel; its size in bytes."""
    try:
        body = asyncio.run(fetch_http3(port, ca))
    except (TimeoutError, ConnectionError) as error:
        raise DemoError(f"HTTP/3 inside the tunnel failed: {error or 'no answer'}") from None
    if body != PAGE:
        raise DemoError(f"HTTP/3 inside the tunnel brought {len(body)} bytes of {len(PAGE)}")
    return len(body)


def check_echo(port: int) -> tuple[int, float]:
    """Numbered datagrams through the tunnel and back: how many returned, and the median in us."""
    sent_at: dict[int, float] = {}
    round_trips: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.settimeout(_TIMEOUT_S)
        sock.connect(("127.0.0.1", port))

        def receive() -> None:
            data = sock.recv(65535)
            number = int.from_bytes(data[:4])
            if len(data) == SIZE and number in sent_at:
                round_trips.append(time.perf_counter() - sent_at.pop(number))

        with contextlib.suppress(TimeoutError):
            for number in track(
                range(ECHOES), f"  {ECHOES} echoes of {SIZE} bytes", console=console
            ):
                sent_at[number] = time.perf_counter()
                sock.send(number.to_bytes(4) + bytes(SIZE - 4))
                while len(sent_at) >= _WINDOW:
                    receive()
            while sent_at:
                receive()
    median = statistics.median(round_trips) * 1e6 if round_trips else 0.0
    return len(round_trips), median


def run_demo(directory: Path, ended: contextlib.ExitStack) -> str:
    """The whole demonstration; its last line."""

    def keep(running: Running) -> None:
        ended.callback(running.stop)

    echo_port, dns_port, web_port = (free_udp_port() for _ in range(3))
    console.print("starting a gateway with two workers …")
    gateway = ended.enter_context(running_gateway(directory, workers=2))
    facts = gateway.status()
    console.print(
        f"  toppy-gw {facts['version']}, engine [bold]{facts['engine']}[/], "
        f"{len(facts['workers'])} workers, listening on {', '.join(facts['listen'])} (QUIC)"
    )
    if facts["engine"] == "aioquic":
        console.print(
            "  this is the slow engine: there was no Rust toolchain to build the fast one"
        )
    console.print("starting a DNS server, an HTTP/3 server and an echo server behind it …")
    dns_server, dns_name = start_dns_server(dns_port, directory)
    keep(dns_server)
    keep(
        start_peer(
            *("http3", web_port, directory),
            *(str(directory / "server.pem"), str(directory / "server-key.pem")),
        )
    )
    keep(start_peer("echo", echo_port, directory))
    console.print("starting `toppy udp` for each …")
    ports = {}
    for name, target_port in (("dns", dns_port), ("web", web_port), ("echo", echo_port)):
        target = f"127.0.0.1:{target_port}"
        ports[name], _ = ended.enter_context(running_udp_client(gateway, target, name=name))
        console.print(f"  toppy udp --listen 127.0.0.1:{ports[name]} --target {target}")

    asked_with = check_dns(ports["dns"])
    console.print(f"DNS: {asked_with} asked {dns_name} for {DNS_NAME}: {DNS_ADDRESS}")
    size = check_http3(ports["web"], directory / "ca.pem")
    console.print(f"HTTP/3 inside the tunnel: a page of {size} bytes")
    console.print("echo:")
    echoed, median = check_echo(ports["echo"])
    if echoed != ECHOES:
        raise DemoError(f"{ECHOES} datagrams sent, {echoed} echoed: {ECHOES - echoed} lost")
    wait_until("reports of the workers", lambda: gateway.status()["tunnels"] == len(ports), 5.0)
    tunnels = gateway.status()
    console.print(
        f"the gateway saw {tunnels['connections']} connections and {tunnels['tunnels']} tunnels, "
        f"and dropped {sum(tunnels['drops'].values())} datagrams"
    )
    return f"demo ok: {ECHOES} sent, {echoed} echoed, p50 {median:.0f} us, DNS ok, HTTP/3 ok"


def main() -> int:
    """Entry point of ``make demo``."""
    directory = Path(tempfile.mkdtemp(prefix="toppy-demo-"))
    try:
        with contextlib.ExitStack() as ended:
            last_line = run_demo(directory, ended)
    except (DemoError, AssertionError, TimeoutError, OSError) as error:
        console.print(f"demo failed: {error}", markup=False)
        console.print(f"the logs are in {directory}", markup=False)
        return 1
    shutil.rmtree(directory)
    console.print("everything is stopped")
    print(last_line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
