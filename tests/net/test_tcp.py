"""TCP sockets: their options, and which of several addresses is connected to."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.virtual_time import run_in_virtual_time
from toppy.errors import TargetError
from toppy.net import tcp
from toppy.net.tcp import (
    connect_error,
    connect_tcp,
    in_turns,
    listen_tcp,
    peer_of,
    prepare_tcp,
    reset_tcp,
)

FOUR, SIX = ["192.0.2.1", "192.0.2.2", "192.0.2.3"], ["2001:db8::1", "2001:db8::2"]


def test_families_take_turns_and_the_first_ones_begins() -> None:
    assert in_turns([*SIX, *FOUR]) == [SIX[0], FOUR[0], SIX[1], FOUR[1], FOUR[2]]
    assert in_turns([*FOUR, *SIX]) == [FOUR[0], SIX[0], FOUR[1], SIX[1], FOUR[2]]
    assert in_turns([]) == []


@given(st.lists(st.sampled_from([*FOUR, *SIX]), max_size=10))
def test_every_address_has_one_turn_in_its_familys_order(addresses: list[str]) -> None:
    turns = in_turns(addresses)
    assert sorted(turns) == sorted(set(addresses))
    for family in (FOUR, SIX):
        wanted = [address for address in dict.fromkeys(addresses) if address in family]
        assert [address for address in turns if address in family] == wanted


# connecting, with a network that the test plays


class Network:
    """What each address does: seconds until it answers, and the error or none."""

    def __init__(self, **answers: tuple[float, int]) -> None:
        self.answers = answers
        self.attempts: list[tuple[float, str]] = []
        self.sockets: list[socket.socket] = []
        self.cancelled: list[str] = []

    async def connect(self, address: str, port: int) -> socket.socket:
        del port
        self.attempts.append((round(asyncio.get_running_loop().time(), 3), address))
        delay_s, number = self.answers[address]
        try:
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            self.cancelled.append(address)
            raise
        if number:
            raise OSError(number, os.strerror(number))
        sock = socket.socket()
        self.sockets.append(sock)
        return sock


@pytest.fixture
def play(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[dict[str, tuple[float, int]], Sequence[str]], Network]:
    def run(answers: dict[str, tuple[float, int]], addresses: Sequence[str]) -> Network:
        network = Network(**answers)
        monkeypatch.setattr(tcp, "_connect", network.connect)

        async def connect() -> None:
            try:
                (await connect_tcp(addresses, 80, timeout_s=5.0)).close()
                await asyncio.sleep(10)  # what is cancelled ends
            finally:
                await asyncio.sleep(0)

        run_in_virtual_time(connect())
        return network

    return run


Play = Callable[[dict[str, tuple[float, int]], Sequence[str]], Network]


def test_a_target_that_answers_at_once_gets_one_attempt(play: Play) -> None:
    network = play({SIX[0]: (0.1, 0), FOUR[0]: (0.0, 0)}, [SIX[0], FOUR[0]])
    assert network.attempts == [(0.0, SIX[0])]


def test_a_silent_address_is_joined_by_the_next_and_the_first_answer_wins(play: Play) -> None:
    network = play({SIX[0]: (99.0, 0), FOUR[0]: (0.1, 0)}, [SIX[0], FOUR[0]])
    assert network.attempts == [(0.0, SIX[0]), (0.25, FOUR[0])]
    assert network.cancelled == [SIX[0]]


def test_a_refusal_is_followed_by_the_next_attempt_at_once(play: Play) -> None:
    network = play({SIX[0]: (0.01, errno.ECONNREFUSED), FOUR[0]: (0.1, 0)}, [SIX[0], FOUR[0]])
    assert network.attempts == [(0.0, SIX[0]), (0.01, FOUR[0])]


def test_a_slow_first_address_may_still_win(play: Play) -> None:
    network = play({SIX[0]: (0.3, 0), FOUR[0]: (9.0, 0)}, [SIX[0], FOUR[0]])
    assert network.cancelled == [FOUR[0]]


def test_of_two_that_answer_together_one_is_closed(play: Play) -> None:
    network = play({SIX[0]: (0.35, 0), FOUR[0]: (0.1, 0)}, [SIX[0], FOUR[0]])
    assert all(sock.fileno() < 0 for sock in network.sockets)


def test_silence_of_all_is_a_timeout_of_all_together(play: Play) -> None:
    with pytest.raises(TargetError, match="did not answer within 5 s") as raised:
        play(dict.fromkeys(FOUR, (99.0, 0)), FOUR)
    assert (raised.value.status, raised.value.proxy_status) == (504, "connection_timeout")


def test_when_all_refuse_the_reason_is_told(play: Play) -> None:
    with pytest.raises(TargetError, match="refused the connection") as raised:
        play(dict.fromkeys(FOUR, (0.01, errno.ECONNREFUSED)), FOUR)
    assert (raised.value.status, raised.value.proxy_status) == (502, "connection_refused")


def test_without_an_address_there_is_no_way(play: Play) -> None:
    with pytest.raises(TargetError, match="it has no address"):
        play({}, [])


@pytest.mark.parametrize(
    ("numbers", "status", "proxy_status"),
    [
        ([errno.ENETUNREACH, errno.ECONNREFUSED], 502, "connection_refused"),
        ([errno.ENETUNREACH, errno.ETIMEDOUT], 504, "connection_timeout"),
        ([errno.ENETUNREACH], 502, "destination_ip_unroutable"),
        ([errno.EPERM], 502, "destination_unavailable"),
        ([errno.EPERM, errno.EHOSTUNREACH], 502, "destination_ip_unroutable"),
    ],
)
def test_the_most_telling_failure_is_told(
    numbers: list[int], status: int, proxy_status: str
) -> None:
    error = connect_error([OSError(number, os.strerror(number)) for number in numbers])
    assert (error.status, error.proxy_status) == (status, proxy_status)


# real sockets


def test_listening_and_connecting_on_loopback() -> None:
    async def test() -> None:
        with listen_tcp("127.0.0.1", 0) as listener:
            host, port = listener.getsockname()
            near = await connect_tcp([host], port, timeout_s=5.0)
            far, _ = await asyncio.get_running_loop().sock_accept(listener)
            with near, far:
                assert peer_of(near) == f"127.0.0.1:{port}"
                assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                assert not near.getblocking()

    asyncio.run(test())


def test_nobody_listening_is_a_refusal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(TargetError, match="refused"):
        asyncio.run(connect_tcp(["127.0.0.1"], port, timeout_s=5.0))


def test_a_port_can_be_listened_on_again_at_once() -> None:
    listener = listen_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        listener.setblocking(True)
        listener.accept()[0].close()
    listener.close()
    listen_tcp("127.0.0.1", port).close()


def test_an_ipv6_socket_leaves_the_ipv4_port_free() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    with listen_tcp("::", 0) as six, listen_tcp("0.0.0.0", six.getsockname()[1]):
        pass


@pytest.mark.parametrize("host", ["example.test", "127.0.0.1.5"])
def test_only_numeric_addresses_are_listened_on(host: str) -> None:
    with pytest.raises(OSError):
        listen_tcp(host, 0)


def test_a_reset_is_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    prepare_tcp(near)
    reset_tcp(near)
    with far, pytest.raises(ConnectionResetError):
        far.recv(1)
    reset_tcp(near)  # it is closed already
    assert peer_of(near) == ""
