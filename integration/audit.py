"""Audit logs of real gateways: a collector, the entries that are there, and what makes some."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from integration.processes import Gateway, run_command, wait_until
from toppy.model.audit_event import parse_facts
from toppy.observe.audit_reader import log_files

KEY = "the audit key"
AUDIT = f"""
[audit]
path = "audit/audit.jsonl"
signing_key = "{KEY}"
fsync = "always"
"""


@dataclass
class HttpCollector:
    """A collector on 127.0.0.1 that keeps what it is sent, while ``is_up``."""

    is_up: bool = True
    bodies: list[Any] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    verified: list[int] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [
            entry for body in self.bodies for entry in (body if isinstance(body, list) else [body])
        ]

    @contextlib.contextmanager
    def serving(self) -> Iterator[HttpCollector]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if self.headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers["content-length"]))
                said = b"{}"
                status = 200 if collector.is_up else 503
                if status == 200 and self.path == "/verify":
                    found = json.loads(body)
                    collector.verified.append(len(found))
                    is_known = [e["hash"] for e in found] == [
                        e["hash"] for e in collector.entries[: len(found)]
                    ]
                    said = json.dumps({"verified": is_known, "message": "compared"}).encode()
                elif status == 200:
                    collector.tokens.add(self.headers.get("authorization", ""))
                    collector.bodies.append(json.loads(body))
                self.send_response(status)
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@dataclass(frozen=True)
class Entry:
    """One entry, its facts taken apart."""

    action: str
    target: str
    actor: str
    allowed: bool
    subject: str | None
    reason: str
    facts: dict[str, str]


def entries_of(path: Path) -> list[Entry]:
    found = []
    for file in log_files(path):
        for line in file.read_bytes().splitlines():
            event = json.loads(line)["event"]
            reason, facts = parse_facts(event.get("reason", ""))
            found.append(
                Entry(
                    event["action"],
                    event["target"],
                    event["actor"],
                    event["allowed"],
                    event.get("auth_subject"),
                    reason,
                    facts,
                )
            )
    return found


def log_of(gateway: Gateway) -> Path:
    return gateway.directory / "audit" / "audit.jsonl"


def events(gateway: Gateway, action: str) -> list[Entry]:
    return [entry for entry in entries_of(log_of(gateway)) if entry.action == action]


def wait_for(gateway: Gateway, action: str, count: int = 1) -> list[Entry]:
    wait_until(f"{count} x {action}", lambda: len(events(gateway, action)) >= count)
    return events(gateway, action)


def verify(gateway: Gateway) -> dict[str, Any]:
    config = str(gateway.directory / "gateway.toml")
    done = run_command("toppy-gw", "audit", "verify", "--json", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def gateway_command(gateway: Gateway, *arguments: str) -> str:
    done = run_command("toppy-gw", *arguments, "--config", str(gateway.directory / "gateway.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def echo_through(port: int, payload: bytes = b"hello", times: int = 3) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as app:
        app.settimeout(10)
        app.connect(("127.0.0.1", port))
        for _ in range(times):
            app.send(payload)
            assert app.recv(2000) == payload


def send(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as app:
        app.sendto(b"x", ("127.0.0.1", port))


def client_environment(gateway: Gateway, name: str = "client") -> dict[str, str]:
    return {
        "TOPPY_AUDIT_LOG": str(gateway.directory / f"{name}-audit.jsonl"),
        "USER": "alice",
    }


def echoes(port: int) -> bool:
    try:
        echo_through(port, times=1)
    except (OSError, AssertionError):
        return False
    return True


def kick_nobody(gateway: Gateway) -> None:
    transport = httpx.HTTPTransport(uds=str(gateway.directory / "run" / "admin.sock"))
    with httpx.Client(transport=transport, timeout=10, trust_env=False) as client:
        client.post("http://toppy-gw/kick", json={"what": "nobody"})
