"""SOCKS 5, 4 and 4a: what programs send, what they are answered, datagrams with their header."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.model.target import Target
from toppy.wire.socks import (
    USER_PASSWORD,
    Command,
    Login,
    Reply,
    SocksError,
    SocksRequest,
    encode_login_answer,
    encode_method,
    encode_reply,
    encode_reply_4,
    encode_udp_header,
    parse_udp_datagram,
    read_login,
    read_methods,
    read_request,
    read_request_4,
)

IPV4 = b"\x01\xc0\x00\x02\x01"
IPV6 = b"\x04" + ipaddress.IPv6Address("2001:db8::1").packed
NAME = b"\x03\x0adb.example"
PORT = b"\x15\x38"  # 5432

hosts = st.one_of(
    st.ip_addresses().map(str),
    st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z](\.[a-z]{2,5}){1,3}", fullmatch=True),
)


def test_methods_are_read_when_all_are_there() -> None:
    assert read_methods(b"\x05\x02\x00\x02rest") == (frozenset({0, 2}), 4)
    for cut in range(4):
        assert read_methods(b"\x05\x02\x00\x02"[:cut]) is None
    with pytest.raises(SocksError):
        read_methods(b"\x05\x00")


def test_a_method_is_chosen_or_none_is() -> None:
    assert encode_method(USER_PASSWORD) == b"\x05\x02"
    assert encode_method(None) == b"\x05\xff"


@settings(deadline=None)
@given(st.binary(max_size=255), st.binary(max_size=255), st.binary(max_size=3))
def test_a_login_is_read_when_it_is_all_there(user: bytes, password: bytes, rest: bytes) -> None:
    message = b"\x01" + bytes([len(user)]) + user + bytes([len(password)]) + password
    assert read_login(message + rest) == (Login(user, password), len(message))
    assert all(read_login(message[:cut]) is None for cut in range(len(message)))


def test_a_login_is_not_shown() -> None:
    assert "secret" not in repr(Login(b"secret-user", b"secret"))


def test_a_login_of_another_version_is_refused() -> None:
    with pytest.raises(SocksError):
        read_login(b"\x05\x01a\x01b")


def test_a_login_is_answered() -> None:
    assert encode_login_answer(is_accepted=True) == b"\x01\x00"
    assert encode_login_answer(is_accepted=False) == b"\x01\x01"


@pytest.mark.parametrize(
    ("address", "host"),
    [(IPV4, "192.0.2.1"), (IPV6, "2001:db8::1"), (NAME, "db.example")],
    ids=["ipv4", "ipv6", "name"],
)
def test_a_request_is_read_when_it_is_all_there(address: bytes, host: str) -> None:
    message = b"\x05\x01\x00" + address + PORT
    assert read_request(message + b"early") == (
        SocksRequest(Command.CONNECT, host, 5432),
        len(message),
    )
    assert all(read_request(message[:cut]) is None for cut in range(len(message)))


def test_udp_associate_may_leave_its_address_open() -> None:
    found = read_request(b"\x05\x03\x00\x01" + bytes(6))
    assert found == (SocksRequest(Command.UDP_ASSOCIATE, "0.0.0.0", 0), 10)


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        (b"\x04\x01\x00" + IPV4 + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x02\x00" + IPV4 + PORT, Reply.COMMAND_NOT_SUPPORTED),
        (b"\x05\x00\x00" + IPV4 + PORT, Reply.COMMAND_NOT_SUPPORTED),
        (b"\x05\x01\x01" + IPV4 + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x02", Reply.ADDRESS_TYPE_NOT_SUPPORTED),
        (b"\x05\x01\x00" + IPV4 + b"\x00\x00", Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x00" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x04a..b" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x05127.1" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x04a\r\nb" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x03a\x00b" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x02\xc3\xbc" + PORT, Reply.GENERAL_FAILURE),
        (b"\x05\x01\x00\x03\x03u@h" + PORT, Reply.GENERAL_FAILURE),
    ],
)
def test_a_request_that_leads_nowhere_is_refused(message: bytes, reply: Reply) -> None:
    with pytest.raises(SocksError) as refused:
        read_request(message)
    assert refused.value.reply is reply


def test_a_reply_has_the_address_that_was_bound() -> None:
    assert encode_reply(Reply.REFUSED) == b"\x05\x05\x00\x01" + bytes(6)
    assert encode_reply(Reply.SUCCEEDED, "192.0.2.1", 5432) == b"\x05\x00\x00" + IPV4 + PORT
    assert encode_reply(Reply.SUCCEEDED, "2001:db8::1", 5432) == b"\x05\x00\x00" + IPV6 + PORT


@pytest.mark.parametrize(
    ("tail", "host"),
    [
        (b"\xc0\x00\x02\x01me\x00", "192.0.2.1"),
        (b"\xc0\x00\x02\x01\x00", "192.0.2.1"),
        (b"\x00\x00\x00\x01me\x00db.example\x00", "db.example"),
    ],
    ids=["4", "4 without a user", "4a"],
)
def test_a_request_of_version_4_is_read_when_it_is_all_there(tail: bytes, host: str) -> None:
    message = b"\x04\x01" + PORT + tail
    found = read_request_4(message + b"early")
    assert found is not None
    assert found[1:] == (SocksRequest(Command.CONNECT, host, 5432), len(message))
    assert all(read_request_4(message[:cut]) is None for cut in range(len(message)))


@pytest.mark.parametrize(
    "message",
    [
        b"\x04\x02" + PORT + b"\xc0\x00\x02\x01\x00",
        b"\x04\x01\x00\x00\xc0\x00\x02\x01\x00",
        b"\x04\x01" + PORT + b"\xc0\x00\x02\x01" + b"u" * 256,
        b"\x04\x01" + PORT + b"\x00\x00\x00\x01\x00" + b"a" * 256,
        b"\x04\x01" + PORT + b"\x00\x00\x00\x01\x00\x00",
        b"\x04\x01" + PORT + b"\x00\x00\x00\x01\x00\xff\x00",
    ],
    ids=["bind", "no port", "a long user", "a long name", "no name", "not ascii"],
)
def test_a_request_of_version_4_that_leads_nowhere_is_refused(message: bytes) -> None:
    with pytest.raises(SocksError):
        read_request_4(message)


def test_version_4_knows_yes_and_no() -> None:
    assert encode_reply_4(is_granted=True) == b"\x00\x5a" + bytes(6)
    assert encode_reply_4(is_granted=False) == b"\x00\x5b" + bytes(6)


@settings(deadline=None)
@given(hosts, st.integers(1, 65535), st.binary(max_size=50))
def test_a_datagram_goes_where_its_header_says(host: str, port: int, payload: bytes) -> None:
    datagram = parse_udp_datagram(encode_udp_header(host, port) + payload)
    assert datagram.target == Target(host, port, "udp")
    assert datagram.payload == payload


def test_the_payload_of_a_datagram_is_not_copied() -> None:
    data = encode_udp_header("192.0.2.1", 53) + bytes(1200)
    assert parse_udp_datagram(data).payload.obj is data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"\x00\x00\x00", "cut off"),
        (b"\x00\x00\x00" + IPV4, "cut off"),
        (b"\x00\x00\x00\x03\xffabc", "cut off"),
        (b"\x00\x00\x01" + IPV4 + PORT, "fragments"),
        (b"\x00\x00\x80" + IPV4 + PORT, "fragments"),
        (b"\x00\x01\x00" + IPV4 + PORT, "reserved"),
        (b"\x00\x00\x00\x05" + PORT, "address type"),
        (b"\x00\x00\x00" + IPV4 + b"\x00\x00", "port"),
        (b"\x00\x00\x00\x03\x03a.." + PORT, "host name"),
    ],
)
def test_a_datagram_that_leads_nowhere_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SocksError, match=reason):
        parse_udp_datagram(data)


@pytest.mark.parametrize(
    "read",
    [read_methods, read_login, read_request, read_request_4, parse_udp_datagram],
    ids=lambda read: read.__name__,
)
@settings(deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_a_message_or_refused(read: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(SocksError):
        read(data)
