"""The gateway's UDP sockets: one group per address, one socket per slot."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from toppy.control.listeners import Listeners
from toppy.errors import ConfigError

BUFFER_BYTES = 65536


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    made = Listeners([("127.0.0.1", 0)], 4, buffer_bytes=BUFFER_BYTES)
    yield made
    made.close()


def sockets(listeners: Listeners, slot: int) -> list[tuple[str, int]]:
    """Where the sockets of a slot are bound."""
    found = []
    for descriptor in listeners.descriptors(slot):
        sock = socket.socket(fileno=descriptor)
        found.append(sock.getsockname()[:2])
        sock.detach()
    return found


def test_every_slot_has_a_socket_at_the_same_address(listeners: Listeners) -> None:
    (address,) = listeners.addresses
    assert address[1] != 0
    assert {sockets(listeners, slot)[0] for slot in range(4)} == {address}
    assert len({listeners.descriptors(slot)[0] for slot in range(4)}) == 4


def test_several_addresses_share_a_port_that_the_system_chose() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6 loopback address")
    listeners = Listeners([("127.0.0.1", 0), ("::1", 0)], 2, buffer_bytes=BUFFER_BYTES)
    assert [host for host, _ in listeners.addresses] == ["127.0.0.1", "::1"]
    assert len({port for _, port in listeners.addresses}) == 1
    assert sockets(listeners, 1) == list(listeners.addresses)
    listeners.close()


def test_new_connections_go_to_the_active_slot_only(listeners: Listeners) -> None:
    if not listeners.is_steered:
        pytest.skip("this kernel does not steer packets (no SO_ATTACH_REUSEPORT_CBPF)")
    for active in (0, 3):
        listeners.steer([active])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number in range(8):
                client.sendto(bytes((0xC0, number)) + bytes(1198), listeners.addresses[0])
        assert [count(listeners, slot) for slot in range(4)] == [
            8 if slot == active else 0 for slot in range(4)
        ]


def count(listeners: Listeners, slot: int) -> int:
    """Take what waits at a slot."""
    sock = socket.socket(fileno=listeners.descriptors(slot)[0])
    found = 0
    try:
        while True:
            sock.recv(2000)
            found += 1
    except BlockingIOError:
        return found
    finally:
        sock.detach()


def test_a_port_that_another_program_has_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"listen\.quic.*another program"):
            Listeners([taken.getsockname()], 2, buffer_bytes=BUFFER_BYTES)


def test_a_port_that_another_gateway_has_is_refused(listeners: Listeners) -> None:
    with pytest.raises(ConfigError, match="another toppy-gw"):
        Listeners(listeners.addresses, 2, buffer_bytes=BUFFER_BYTES)


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not have that address"):
        Listeners([("192.0.2.1", 0)], 2, buffer_bytes=BUFFER_BYTES)


def test_what_was_bound_before_a_failure_is_given_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = _free_port()
        with pytest.raises(ConfigError):
            Listeners([("127.0.0.1", port), taken.getsockname()], 2, buffer_bytes=BUFFER_BYTES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", port))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_closed_group_gives_its_port_up() -> None:
    listeners = Listeners([("127.0.0.1", 0)], 2, buffer_bytes=BUFFER_BYTES)
    (address,) = listeners.addresses
    listeners.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(address)


def test_a_privileged_port_needs_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("toppy.control.listeners.bind_udp", refuse)
    with pytest.raises(ConfigError, match="CAP_NET_BIND_SERVICE"):
        Listeners([("127.0.0.1", 443)], 2, buffer_bytes=BUFFER_BYTES)
