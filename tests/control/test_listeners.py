"""The gateway's UDP sockets: one group per address, one socket per slot."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from toppy.control import listeners as listeners_module
from toppy.control.listeners import Listeners, addresses_of, close_all, is_at, named
from toppy.errors import ConfigError
from toppy.net import steering
from toppy.net.udp_socket import bind_udp
from toppy.quic.engine import Address

BUFFER_BYTES = 65536
LOOPBACK: Sequence[Address] = [("127.0.0.1", 0)]

Make = Callable[..., Listeners]


@pytest.fixture
def make() -> Iterator[Make]:
    """Listeners that are closed when the test is over; steered, with a worker for two slots."""
    made = []

    def make_listeners(
        addresses: Sequence[Address] = LOOPBACK, slot_count: int = 4, **options: Any
    ) -> Listeners:
        defaults = {"worker_count": 2, "buffer_bytes": BUFFER_BYTES, "is_steered": True}
        listeners = Listeners(addresses, slot_count, **(defaults | options))
        made.append(listeners)
        return listeners

    yield make_listeners
    for listeners in made:
        listeners.close()


@pytest.fixture
def steered(make: Make) -> Listeners:
    if not steering.is_supported():
        pytest.skip("this kernel does not steer packets (no SO_ATTACH_REUSEPORT_CBPF)")
    return make()


def bound(listeners: Listeners, slot: int) -> list[Address]:
    """Where the sockets of a slot are bound."""
    found = []
    for row in listeners.descriptors():
        sock = socket.socket(fileno=row[slot])
        host, port = sock.getsockname()[:2]
        found.append((host, port))
        sock.detach()
    return found


def count(listeners: Listeners, slot: int) -> int:
    """Take what waits at a slot."""
    sock = socket.socket(fileno=listeners.descriptors()[0][slot])
    found = 0
    try:
        while True:
            sock.recv(2000)
            found += 1
    except BlockingIOError:
        return found
    finally:
        sock.detach()


def copies(listeners: Listeners) -> dict[str, socket.socket]:
    """What somebody else holds of the same sockets."""
    return {name: sock.dup() for name, sock in listeners.by_name().items()}


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_slot_has_a_socket_at_the_same_address(steered: Listeners) -> None:
    (address,) = steered.addresses
    assert address[1] != 0
    assert {bound(steered, slot)[0] for slot in range(4)} == {address}
    assert len(set(steered.descriptors()[0])) == 4


def test_several_addresses_share_a_port_that_the_system_chose(make: Make) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6 loopback address")
    listeners = make([("127.0.0.1", 0), ("::1", 0)], 2)
    assert [host for host, _ in listeners.addresses] == ["127.0.0.1", "::1"]
    assert len({port for _, port in listeners.addresses}) == 1
    assert bound(listeners, 1) == list(listeners.addresses)


def test_new_connections_go_to_the_active_slots_only(steered: Listeners) -> None:
    for active in (0, 3):
        steered.steer([active], [active])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for number in range(8):
                client.sendto(bytes((0xC0, number)) + bytes(1198), steered.addresses[0])
        assert [count(steered, slot) for slot in range(4)] == [
            8 if slot == active else 0 for slot in range(4)
        ]


def test_without_steering_there_are_as_many_sockets_as_workers(make: Make) -> None:
    listeners = make(is_steered=False, worker_count=3)
    assert not listeners.is_steered
    assert listeners.slot_count == 3
    assert len(listeners.descriptors()[0]) == 3
    listeners.steer([0], [0])  # nothing to do, and nothing happens


def test_a_steered_worker_reads_its_own_slot(steered: Listeners) -> None:
    assert steered.read_by(3, 1, 2) == (3,)


@pytest.mark.parametrize("workers", range(1, 9))
def test_without_steering_the_workers_of_a_generation_read_every_socket(
    make: Make, workers: int
) -> None:
    listeners = make(is_steered=False, worker_count=4)
    shares = [listeners.read_by(7, place, workers) for place in range(workers)]
    assert all(shares)
    assert {index for share in shares for index in share} == set(range(4))
    if workers <= 4:
        assert sum(len(share) for share in shares) == 4, "no socket is read by two"


# what an earlier control plane left


def test_inherited_sockets_are_taken_as_they_are(make: Make, steered: Listeners) -> None:
    theirs = copies(steered)
    again = make(steered.addresses, inherited=theirs)
    assert again.is_inherited
    assert again.addresses == steered.addresses
    assert again.by_name() == theirs


def test_what_waits_in_an_inherited_socket_is_not_lost(make: Make, steered: Listeners) -> None:
    steered.steer([2], [2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(bytes((0xC0,)) + bytes(1199), steered.addresses[0])
    again = make(steered.addresses, inherited=copies(steered))
    steered.close()
    assert [count(again, slot) for slot in range(4)] == [0, 0, 1, 0]


def test_inherited_sockets_of_a_port_that_the_system_chose_fit(
    make: Make, steered: Listeners
) -> None:
    again = make(inherited=copies(steered))
    assert again.addresses == steered.addresses


def test_as_many_slots_as_were_inherited_are_there(make: Make, steered: Listeners) -> None:
    assert make(slot_count=2, inherited=copies(steered)).slot_count == 4


@pytest.mark.parametrize("missing", ["quic.0.0", "quic.0.2", "quic.1.0"])
def test_groups_that_are_not_whole_are_left_alone(make: Make, missing: str) -> None:
    addresses = [("127.0.0.1", free_port()), ("127.0.0.2", free_port())]
    theirs = copies(make(addresses))
    make(addresses=LOOPBACK)
    taken = theirs.pop(missing)
    taken.close()
    with pytest.raises(ConfigError, match="another program"):  # the first ones are still there
        make(addresses, inherited=theirs)
    assert all(sock.fileno() >= 0 for sock in theirs.values()), "they are the caller's"
    close_all(theirs)


def test_inherited_sockets_of_another_address_are_left_alone(
    make: Make, steered: Listeners
) -> None:
    theirs = copies(steered)
    again = make([("127.0.0.2", 0)], inherited=theirs)
    assert not again.is_inherited
    assert again.addresses[0][0] == "127.0.0.2"
    close_all(theirs)


def test_an_inherited_socket_of_another_kind_is_left_alone(make: Make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream:
        stream.bind(("127.0.0.1", 0))
        assert not make(inherited={"quic.0.0": stream}).is_inherited


def test_what_a_worker_hands_over_has_the_same_names(steered: Listeners) -> None:
    rows = [[os.dup(descriptor) for descriptor in row] for row in steered.descriptors()]
    theirs = named(rows)
    mine = steered.by_name()
    assert list(theirs) == list(mine) == [f"quic.0.{index}" for index in range(4)]
    for name, sock in theirs.items():
        assert os.fstat(sock.fileno()).st_ino == os.fstat(mine[name].fileno()).st_ino
    close_all(theirs)


@pytest.mark.parametrize("missing", [["quic.1.3"], ["quic.0.2", "quic.0.3", "quic.1.3"]])
def test_a_group_that_is_short_of_its_last_sockets_is_taken_and_made_whole(
    make: Make, missing: list[str]
) -> None:
    if not steering.is_supported():
        pytest.skip("this kernel does not steer packets (no SO_ATTACH_REUSEPORT_CBPF)")
    before = make([("127.0.0.1", free_port()), ("127.0.0.2", free_port())])
    theirs = copies(before)
    before.close()
    for name in missing:
        theirs.pop(name).close()
    again = make(before.addresses, 3, inherited=theirs)
    assert again.is_inherited
    assert theirs.items() <= again.by_name().items()
    whole = 4 if missing == ["quic.1.3"] else 3
    assert [len(row) for row in again.descriptors()] == [whole, whole]
    again.steer([2], [2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(bytes((0xC0,)) + bytes(1199), again.addresses[0])
    assert count(again, 2) == 1


def test_fewer_sockets_than_slots_are_completed(make: Make, steered: Listeners) -> None:
    again = make(steered.addresses, 6, inherited=copies(steered))
    assert len(again.descriptors()[0]) == again.slot_count == 6


def test_where_an_earlier_control_plane_listened_is_known(make: Make) -> None:
    addresses = [("127.0.0.1", free_port()), ("127.0.0.2", free_port())]
    theirs = copies(make(addresses))
    assert addresses_of(theirs) == addresses
    assert addresses_of({}) == []
    close_all(theirs)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("127.0.0.1", 4433), True),
        (("127.0.0.1", 0), True),
        (("127.0.0.1", 4434), False),
        (("127.0.0.2", 4433), False),
    ],
)
def test_an_address_fits_or_not(wanted: Address, expected: bool) -> None:
    assert is_at(("127.0.0.1", 4433), wanted) is expected


# growing


def test_slots_that_are_added_change_no_index(steered: Listeners) -> None:
    before = steered.descriptors()[0]
    steered.grow(6)
    assert steered.slot_count == 6
    assert steered.descriptors()[0][:4] == before
    steered.steer([5], range(6))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(bytes((0xC0,)) + bytes(1199), steered.addresses[0])
    assert count(steered, 5) == 1


def test_there_are_never_fewer_slots(steered: Listeners) -> None:
    steered.grow(2)
    assert steered.slot_count == len(steered.descriptors()[0]) == 4


def test_growing_that_fails_can_be_repeated(
    steered: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(listeners_module, "bind_udp", refuse)
        with pytest.raises(OSError, match="Too many"):
            steered.grow(6)
    assert steered.slot_count == 4
    steered.grow(6)
    assert len(steered.descriptors()[0]) == 6


def test_all_addresses_grow_or_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = make([("127.0.0.1", 0), ("127.0.0.2", 0)])
    if not listeners.is_steered:
        pytest.skip("this kernel does not steer packets (no SO_ATTACH_REUSEPORT_CBPF)")
    opened: list[socket.socket] = []

    def bind(*arguments: Any, **options: Any) -> socket.socket:
        if len(opened) == 3:  # in the midst of the second group
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(bind_udp(*arguments, **options))
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(listeners_module, "bind_udp", bind)
        with pytest.raises(OSError, match="Too many"):
            listeners.grow(6)
    assert [len(row) for row in listeners.descriptors()] == [4, 4]
    assert all(sock.fileno() == -1 for sock in opened)
    listeners.grow(6)
    assert [len(row) for row in listeners.descriptors()] == [6, 6]


# what cannot be


def test_a_port_that_another_program_has_is_refused(make: Make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"listen\.quic.*another program"):
            make([taken.getsockname()])


def test_a_port_that_another_gateway_has_is_refused(make: Make) -> None:
    listeners = make()
    with pytest.raises(ConfigError, match="another toppy-gw"):
        make(listeners.addresses)


def test_an_address_of_another_host_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="does not have that address"):
        make([("192.0.2.1", 0)])


def test_what_was_bound_before_a_failure_is_given_up(make: Make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = free_port()
        with pytest.raises(ConfigError):
            make([("127.0.0.1", port), taken.getsockname()])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", port))


def test_a_closed_group_gives_its_port_up(make: Make) -> None:
    listeners = make()
    (address,) = listeners.addresses
    listeners.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(address)


def test_a_privileged_port_needs_a_capability(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listeners_module, "bind_udp", refuse)
    with pytest.raises(ConfigError, match="CAP_NET_BIND_SERVICE"):
        make([("127.0.0.1", 443)])


def test_a_group_that_cannot_be_bound_whole_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[socket.socket] = []

    def bind(*arguments: Any, **options: Any) -> socket.socket:
        if len(opened) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(bind_udp(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(listeners_module, "bind_udp", bind)
    with pytest.raises(ConfigError, match="Too many open files"):
        make()
    assert all(sock.fileno() == -1 for sock in opened)
