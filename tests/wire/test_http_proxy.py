"""Requests to the local HTTP proxy: read strictly, passed on in origin-form, one at a time."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.model.target import Target
from toppy.wire.http_proxy import (
    MAX_HEAD_BYTES,
    HttpRequestError,
    RequestBody,
    encode_response,
    find_head,
    parse_head,
)
from toppy.wire.socks import Login


def head(request_line: str, *lines: str) -> bytes:
    return "\r\n".join((request_line, *lines, "", "")).encode("latin-1")


def refusal(data: bytes) -> int:
    with pytest.raises(HttpRequestError) as refused:
        parse_head(data)
    return refused.value.status


class TestTheHead:
    def test_its_end_is_found_when_it_is_there(self) -> None:
        data = head("CONNECT a.example:443 HTTP/1.1", "Host: a.example")
        assert all(find_head(data[:cut]) is None for cut in range(len(data)))
        assert find_head(data) == find_head(data + b"\nbehind") == len(data)

    @pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n", b"GET /\r\nHost: a\n\n", b"\n"])
    def test_a_line_that_ends_without_a_carriage_return_is_refused_at_once(
        self, data: bytes
    ) -> None:
        with pytest.raises(HttpRequestError, match="CRLF"):
            find_head(data)

    def test_one_that_is_too_long_is_431(self) -> None:
        line = b"GET / HTTP/1.1\r\nx: "
        assert find_head(line + b"y" * (MAX_HEAD_BYTES - len(line) - 1)) is None
        for size in (MAX_HEAD_BYTES, 100_000):
            with pytest.raises(HttpRequestError) as refused:
                find_head((line + b"y" * size)[:size])
            assert refused.value.status == 431
        with pytest.raises(HttpRequestError):
            find_head(line + b"y" * (MAX_HEAD_BYTES - len(line) - 3) + b"\r\n\r\n")

    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (head("CONNECT a.example:443", "Host: a"), 400),
            (head("CONNECT  a.example:443 HTTP/1.1", "Host: a"), 400),
            (head("CONNECT a.example:443 HTTP/1.1 ", "Host: a"), 400),
            (head("CONNECT\ta.example:443 HTTP/1.1", "Host: a"), 400),
            (head("CONNECT a.example:443 http/1.1", "Host: a"), 400),
            (head("CONNECT a.example:443 HTTP/1.1x", "Host: a"), 400),
            (head("CON(NECT a.example:443 HTTP/1.1", "Host: a"), 400),
            (head("PRI * HTTP/2.0"), 505),
            (head("", "CONNECT a.example:443 HTTP/1.1"), 400),
            (head("CONNECT a.example:443 HTTP/1.1"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "Host: a"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", " folded"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "\tfolded"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host : a"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", " Host: a"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "no field"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", ": nameless"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "x: a\0b"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "x: a\rb"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a", "x: \x7f"), 400),
            (head("CONNECT a.example:443 HTTP/1.1", "Host: a\r"), 400),
        ],
    )
    def test_one_that_could_be_read_in_two_ways_is_refused(self, data: bytes, status: int) -> None:
        assert refusal(data) == status

    @settings(deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_request_or_refused(self, data: bytes) -> None:
        for begin in (b"", b"CONNECT ", b"GET http://a/ HTTP/1.1\r\nHost: a\r\n"):
            try:
                end = find_head(begin + data + b"\r\n\r\n")
                if end is not None:
                    parse_head((begin + data + b"\r\n\r\n")[:end])
            except HttpRequestError as error:
                assert error.status in (400, 431, 501, 505)


class TestConnect:
    @pytest.mark.parametrize(
        ("written", "target"),
        [
            ("a.example:443", Target("a.example", 443, "tcp")),
            ("A.Example.:443", Target("a.example", 443, "tcp")),
            ("192.0.2.1:22", Target("192.0.2.1", 22, "tcp")),
            ("[2001:db8::1]:22", Target("2001:db8::1", 22, "tcp")),
        ],
    )
    def test_it_asks_for_a_tunnel(self, written: str, target: Target) -> None:
        request = parse_head(head(f"CONNECT {written} HTTP/1.1", f"Host: {written}"))
        assert request.target == target
        assert request.body is None
        assert request.head == b""

    def test_version_1_0_needs_no_host(self) -> None:
        assert parse_head(head("CONNECT a.example:22 HTTP/1.0")).target is not None

    @pytest.mark.parametrize(
        "written",
        [
            "a.example",
            "a.example:0",
            "a.example:65536",
            "http://a.example:443",
            "a.example:443/",
            "user@a.example:443",
            "2001:db8::1:443",
            "127.1:443",
            "/proxy.pac",
            "*",
        ],
    )
    def test_a_target_that_is_not_host_and_port_is_refused(self, written: str) -> None:
        assert refusal(head(f"CONNECT {written} HTTP/1.1", "Host: a")) == 400

    @pytest.mark.parametrize(
        "line", ["Content-Length: 0", "content-length: 5", "Transfer-Encoding: chunked"]
    )
    def test_it_has_no_content(self, line: str) -> None:
        assert refusal(head("CONNECT a.example:443 HTTP/1.1", "Host: a", line)) == 400


class TestCredentials:
    @staticmethod
    def login(*values: str) -> Login | None:
        lines = [f"Proxy-Authorization: {value}" for value in values]
        return parse_head(head("CONNECT a.example:443 HTTP/1.1", "Host: a", *lines)).login

    @settings(deadline=None)
    @given(st.binary(max_size=20).filter(lambda user: b":" not in user), st.binary(max_size=20))
    def test_basic_has_a_user_and_a_password(self, user: bytes, password: bytes) -> None:
        encoded = base64.b64encode(user + b":" + password).decode()
        assert self.login(f"Basic {encoded}") == Login(user, password)
        assert self.login(f"bASIC {encoded}") == Login(user, password)

    @pytest.mark.parametrize("value", ["", "Basic", "Basic !", "Basic YQ", "Bearer YTpi"])
    def test_what_is_no_basic_is_no_login(self, value: str) -> None:
        assert self.login(value) in (None, Login(b"", b""))

    def test_two_are_refused(self) -> None:
        with pytest.raises(HttpRequestError):
            self.login("Basic YTpi", "Basic YTpi")


class TestPassingOn:
    def test_a_request_goes_on_in_origin_form_without_what_was_for_the_proxy(self) -> None:
        request = parse_head(
            head(
                "POST http://User-Agents.Example:8080/a?b=c HTTP/1.1",
                "Host: elsewhere.example",
                "Accept: */*",
                "Connection: keep-alive, X-Private",
                "X-Private: 1",
                "Keep-Alive: 5",
                "Proxy-Connection: keep-alive",
                "Proxy-Authorization: Basic YTpi",
                "TE: trailers",
                "Upgrade: websocket",
                "Content-Length: 5",
            )
        )
        assert request.target == Target("user-agents.example", 8080, "tcp")
        assert request.login == Login(b"a", b"b")
        assert request.head == head(
            "POST /a?b=c HTTP/1.1",
            "Host: user-agents.example:8080",
            "Accept: */*",
            "Content-Length: 5",
            "Via: 1.1 toppy",
            "Connection: close",
        )
        assert request.body is not None
        assert request.body.receive(b"12345GET / HTTP/1.1\r\n") == b"12345"

    @pytest.mark.parametrize(
        ("written", "target", "line", "host"),
        [
            ("http://a.example", "a.example:80", "GET /", "a.example"),
            ("HTTP://a.example/", "a.example:80", "GET /", "a.example"),
            ("http://a.example:/x", "a.example:80", "GET /x", "a.example"),
            ("http://a.example:80/x", "a.example:80", "GET /x", "a.example"),
            ("http://a.example?q", "a.example:80", "GET /?q", "a.example"),
            ("http://[::1]/x", "[::1]:80", "GET /x", "[::1]"),
            ("http://[::1]:81/x", "[::1]:81", "GET /x", "[::1]:81"),
            ("http://a.example//b/../c", "a.example:80", "GET //b/../c", "a.example"),
            ("http://a.example/http://b/", "a.example:80", "GET /http://b/", "a.example"),
        ],
    )
    def test_a_uri_is_read_in_one_way(
        self, written: str, target: str, line: str, host: str
    ) -> None:
        request = parse_head(head(f"GET {written} HTTP/1.1", "Host: a"))
        assert str(request.target) == target
        assert request.head.split(b"\r\n")[:2] == [
            f"{line} HTTP/1.1".encode(),
            f"Host: {host}".encode(),
        ]

    def test_version_1_0_stays_that(self) -> None:
        request = parse_head(head("GET http://a.example/ HTTP/1.0"))
        assert request.head == head(
            "GET / HTTP/1.0", "Host: a.example", "Via: 1.0 toppy", "Connection: close"
        )

    def test_options_without_a_path_asks_about_the_whole_target(self) -> None:
        request = parse_head(head("OPTIONS http://a.example HTTP/1.1", "Host: a"))
        assert request.head.startswith(b"OPTIONS * HTTP/1.1\r\n")

    @pytest.mark.parametrize(
        "written",
        [
            "https://a.example/",
            "ftp://a.example/",
            "http:///x",
            "http://user@a.example/",
            "http://user:pw@a.example/",
            "http://a.example:0/",
            "http://a.example:x/",
            "http://a b/",
            "http://%61.example/",
            "http://::1/",
            "http://127.1/",
            "http://a.example/#fragment",
            "http:/a.example/",
            "a.example/",
            "*",
        ],
    )
    def test_another_uri_is_refused(self, written: str) -> None:
        assert refusal(head(f"GET {written} HTTP/1.1", "Host: a")) == 400

    @pytest.mark.parametrize(
        "lines",
        [
            ("Content-Length: 5", "Transfer-Encoding: chunked"),
            ("Content-Length: 5", "Content-Length: 5"),
            ("Content-Length: 5, 5",),
            ("Content-Length: +5",),
            ("Content-Length: -5",),
            ("Content-Length: 0x5",),
            ("Content-Length: 5 5",),
            ("Content-Length:",),
            ("Content-Length: 9999999999999999999",),
            ("Transfer-Encoding: gzip, chunked",),
            ("Transfer-Encoding: xchunked",),
            ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
            ("Transfer-Encoding: identity",),
            ("Transfer-Encoding:",),
        ],
    )
    def test_a_body_whose_end_two_readers_could_see_differently_is_refused(
        self, lines: tuple[str, ...]
    ) -> None:
        assert refusal(head("POST http://a.example/ HTTP/1.1", "Host: a", *lines)) in (400, 501)

    def test_chunks_are_not_of_version_1_0(self) -> None:
        assert refusal(head("POST http://a.example/ HTTP/1.0", "Transfer-Encoding: chunked")) == 501

    def test_the_framing_cannot_be_taken_away_by_connection(self) -> None:
        request = parse_head(
            head(
                "POST http://a.example/ HTTP/1.1",
                "Host: a",
                "Connection: content-length",
                "Content-Length: 5",
            )
        )
        assert b"Content-Length: 5\r\n" in request.head

    def test_a_request_to_the_proxy_itself_has_a_path_only(self) -> None:
        request = parse_head(head("GET /proxy.pac?x=1 HTTP/1.1", "Host: 127.0.0.1:1080"))
        assert request.target is None
        assert request.path == "/proxy.pac"


CHUNKED = b"5;name=value\r\nhello\r\n00A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"


class TestTheBody:
    @settings(deadline=None)
    @given(st.binary(max_size=50), st.integers(0, 50), st.integers(1, 7))
    def test_so_many_bytes_pass_and_no_more(self, data: bytes, length: int, chunk: int) -> None:
        body = RequestBody(length)
        passed = b"".join(
            body.receive(data[start : start + chunk]) for start in range(0, len(data), chunk)
        )
        assert passed == data[:length]
        assert body.is_complete == (len(data) >= length)

    @settings(deadline=None)
    @given(st.lists(st.integers(1, 12), max_size=60))
    def test_chunks_pass_as_they_are_and_nothing_behind_them(self, sizes: list[int]) -> None:
        body, rest, passed = RequestBody(None), CHUNKED + b"GET / HTTP/1.1\r\n", b""
        for size in sizes:
            passed += body.receive(rest[:size])
            rest = rest[size:]
        passed += body.receive(rest)
        assert passed == CHUNKED
        assert body.is_complete
        assert body.receive(b"more") == b""

    @pytest.mark.parametrize(
        "data",
        [
            b"\r\n",
            b"x\r\n",
            b"-1\r\n",
            b"0x5\r\n",
            b"5 \r\nhello",
            b"5\nhello\r\n",
            b"5\r\nhello!\r\n",
            b"5\r\nhello\n",
            b"1" * 16 + b"\r\n",
            b"5;" + b"x" * 300,
            b"5;\x00\r\n",
            b"0\r\nno field\r\n",
            b"0\r\nx: a\rb\r\n",
            b"0\r\n folded\r\n",
            b"0\r\n" + b"x: y\r\n" * 3000,
        ],
    )
    def test_bad_chunks_are_refused(self, data: bytes) -> None:
        with pytest.raises(HttpRequestError):
            RequestBody(None).receive(data)

    @settings(deadline=None)
    @given(st.lists(st.binary(max_size=40), max_size=10))
    def test_any_bytes_pass_or_are_refused(self, parts: list[bytes]) -> None:
        body = RequestBody(None)
        try:
            for part in parts:
                assert part.startswith(body.receive(part))
        except HttpRequestError:
            pass


def test_an_answer_says_how_long_it_is_and_that_it_is_the_last() -> None:
    answer = encode_response(403, "nö\n", fields=[("Proxy-Status", "toppy")])
    begin, _, body = answer.partition(b"\r\n\r\n")
    assert body == "nö\n".encode()
    assert begin.split(b"\r\n")[0] == b"HTTP/1.1 403 Forbidden"
    assert b"Content-Length: 4" in begin
    assert b"Connection: close" in begin
    assert b"Proxy-Status: toppy" in begin


def test_an_answer_to_head_has_no_body() -> None:
    assert encode_response(404, "gone", with_body=False).endswith(b"\r\n\r\n")
