"""A web site as a process: ``python -m integration.programs.web PORT GIT_ROOT [CERTIFICATE KEY]``.

``/bytes/N`` sends N bytes of ``payload.blocks``; ``PUT /digest`` answers the SHA-256 of what it is
sent; ``/`` is a page with a style sheet, scripts and pictures; below ``/git/`` is ``git
http-backend``. With a certificate it speaks TLS.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import unquote, urlsplit

from integration.programs.payload import blocks

PICTURES: Final = 24
SCRIPT: Final = """
const seen = document.body.dataset;
const pictures = [...document.images];
seen.pictures = pictures.filter(p => p.complete && p.naturalWidth === 3).length;
seen.style = getComputedStyle(document.body).color;
fetch("/data.json").then(r => r.json()).then(data => { seen.data = data.text; });
"""
_PICTURE: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="3" height="2">'
    '<rect width="3" height="2" fill="red"/><!--' + "x" * 20_000 + "--></svg>"
)
_READ_BYTES: Final = 1 << 18


def _page() -> str:
    pictures = "".join(f'<img src="/picture/{number}.svg">' for number in range(PICTURES))
    return (
        '<!doctype html><title>toppy</title><link rel="stylesheet" href="/style.css">'
        f"<body>{pictures}<script>window.onload = () => {{ const s = document.createElement("
        '"script"); s.src = "/script.js"; document.body.append(s); };</script></body>'
    )


def _file(path: str) -> tuple[str, str] | None:
    """Content type and text of a part of the page."""
    if path.startswith("/picture/"):
        return "image/svg+xml", _PICTURE
    return {
        "/": ("text/html", _page()),
        "/style.css": ("text/css", "body { color: rgb(1, 2, 3) }"),
        "/script.js": ("text/javascript", SCRIPT),
        "/data.json": ("application/json", json.dumps({"text": "all of it came"})),
    }.get(path)


class Site(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    git_root = ""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/git/"):
            self._git()
        elif path.startswith("/bytes/"):
            length = int(path.removeprefix("/bytes/"))
            self._begin(200, "application/octet-stream", length)
            for block in blocks(length):
                self.wfile.write(block)
        elif (file := _file(path)) is not None:
            self._answer(200, file[0], file[1].encode())
        else:
            self._answer(404, "text/plain", b"there is nothing\n")

    def do_POST(self) -> None:
        self._git()

    def do_PUT(self) -> None:
        digest = hashlib.sha256()
        for chunk in self._body():
            digest.update(chunk)
        self._answer(200, "text/plain", digest.hexdigest().encode())

    def _begin(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        self.wfile.write(body)

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._pieces(int(self.headers.get("Content-Length", 0)))
            return
        while length := int(self.rfile.readline().partition(b";")[0], 16):
            yield from self._pieces(length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _pieces(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, _READ_BYTES))
            if not piece:
                raise ConnectionResetError("cut off")
            length -= len(piece)
            yield piece

    def _git(self) -> None:
        """A request to git's CGI program (RFC 3875)."""
        body = b"".join(self._body())
        url = urlsplit(self.path)
        environ = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": self.git_root,
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": unquote(url.path).removeprefix("/git"),
            "QUERY_STRING": url.query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_ADDR": self.client_address[0],
            "REMOTE_USER": "developer",
        }
        git = shutil.which("git") or "git"
        done = subprocess.run(
            [git, "http-backend"], input=body, env=environ, capture_output=True, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(fields.pop("Status", "200 OK").split()[0]))
        for name, value in (fields | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        print(f"{self.client_address[1]} {format % args}", flush=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _serve(port: int, git_root: str, wrap: Callable[[_Server], None]) -> None:
    Site.git_root = git_root
    with _Server(("127.0.0.1", port), Site) as server:
        wrap(server)
        print("site is ready", flush=True)
        server.serve_forever()


def main() -> None:
    """Serve until killed."""
    port, git_root, *pair = sys.argv[1:]

    def wrap(server: _Server) -> None:
        if pair:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*pair)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )

    _serve(int(port), git_root, wrap)


if __name__ == "__main__":
    main()
