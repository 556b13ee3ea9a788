"""A gateway's admin socket that answers what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

CONFIG = 'runtime_dir = "run"\n[auth]\ntoken = "token-of-a-test"\n'
Answer = tuple[int, Any]
"""Status, and what becomes JSON; bytes are sent as they are."""


def status_facts(**changes: Any) -> dict[str, Any]:
    worker = {
        "name": "s0",
        "slot": 0,
        "generation": 1,
        "pid": 2,
        "state": "serving",
        "engine": "native",
        "since": 0.0,
        "connections": 3,
        "tunnels": 4,
        "drops": {},
        "datagrams_to_target": 5,
        "datagrams_to_client": 6,
    }
    generation = {"generation": 1, "state": "active", "since": 0.0, "revision": 1, "workers": [0]}
    return {
        "version": "9.9",
        "pid": os.getpid(),
        "engine": "native",
        "since": 0.0,
        "configuration": "/etc/toppy/gateway.toml",
        "revision": 1,
        "listen": ["[::]:4433"],
        "health": "127.0.0.1:8080",
        "steered": True,
        "generation": 1,
        "rollout": "idle",
        "last_reload": None,
        "worker_deaths": 0,
        "connections": 3,
        "tunnels": 4,
        "drops": {},
        "admissions": {},
        "generations": [generation],
        "workers": [worker],
    } | changes


@dataclass
class GatewayStub:
    """What was asked, and what is answered."""

    runtime_dir: Path
    answers: dict[str, Answer | Callable[[], Answer]] = field(default_factory=dict)
    """By method and path; anything else is answered as Starlette does."""
    asked: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> str:
        return str(self.runtime_dir.parent / "gateway.toml")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    stub: GatewayStub


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        stub, what = self.server.stub, f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        stub.asked.append((what, json.loads(body) if body else None))
        answer = stub.answers.get(what, (404, b"Not Found"))
        status, said = answer() if callable(answer) else answer
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        if status:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def address_string(self) -> str:
        return "operator"

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def gateway_stub(directory: Path) -> Iterator[GatewayStub]:
    """It has a configuration, and answers ``GET /status``."""
    runtime_dir = directory / "run"
    runtime_dir.mkdir()
    (directory / "gateway.toml").write_text(CONFIG)
    stub = GatewayStub(runtime_dir, {"GET /status": (200, status_facts())})
    with _Server(str(runtime_dir / "admin.sock"), _Handler) as server:
        server.stub = stub
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()
