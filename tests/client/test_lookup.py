"""Names to addresses here, with a deadline."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from toppy.client.lookup import MAX_ADDRESSES, NameLookupError, look_up, look_up_now
from toppy.quic.engine import Address


def resolve(host: str, *, is_async: bool, timeout_s: float = 5.0) -> list[Address]:
    if is_async:
        return asyncio.run(look_up(host, 53, timeout_s))
    return look_up_now(host, 53, timeout_s)


BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["now", "async"])


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (text, port)) for text in answer]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@BOTH
def test_an_address_is_itself(is_async: bool) -> None:
    assert resolve("192.0.2.1", is_async=is_async) == [("192.0.2.1", 53)]
    assert resolve("2001:db8::1", is_async=is_async) == [("2001:db8::1", 53)]


@BOTH
def test_each_address_is_given_once_in_order_and_not_too_many(
    monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    answer_with(monkeypatch, ["192.0.2.2", "192.0.2.1", "192.0.2.2"])
    assert resolve("a.example", is_async=is_async) == [("192.0.2.2", 53), ("192.0.2.1", 53)]
    answer_with(monkeypatch, [f"192.0.2.{n}" for n in range(100)])
    assert len(resolve("a.example", is_async=is_async)) == MAX_ADDRESSES


@BOTH
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "not known"),
        (UnicodeError("label too long"), "no host name"),
    ],
)
def test_a_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, is_async: bool, error: Exception, text: str
) -> None:
    answer_with(monkeypatch, error)
    with pytest.raises(NameLookupError, match=text):
        resolve("a.example", is_async=is_async)


@BOTH
def test_a_silent_name_server_costs_no_more_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    released = threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        released.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    before = set(threading.enumerate())
    try:
        # with asyncio.run, the loop is closed too while the lookup still hangs
        with pytest.raises(NameLookupError, match="in time"):
            resolve("a.example", is_async=is_async, timeout_s=0.02)
        (hanging,) = set(threading.enumerate()) - before
        assert hanging.daemon
    finally:
        released.set()
    hanging.join(5)
    assert not hanging.is_alive()
