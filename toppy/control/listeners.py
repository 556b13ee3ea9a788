"""The gateway's UDP sockets: one SO_REUSEPORT group per listen address, a socket per slot.

The control plane keeps every descriptor for as long as it lives, and every worker holds them too:
so a socket's index in its group never changes, and what is queued for a dead worker waits for the
next one. Without steering there are as many sockets as workers, and generations read the same ones
in turn.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Mapping, Sequence

from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.net import steering
from toppy.net.udp_socket import bind_udp
from toppy.quic.engine import Address
from toppy.wire.connection_id import MAX_SLOTS

_NAME = "quic"


class Listeners:
    """Sockets for ``slot_count`` slots on every address; at most 256 slots.

    ``inherited`` are sockets of an earlier control plane by ``names``; those that fit are taken,
    all others are left alone.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        slot_count: int,
        worker_count: int,
        *,
        buffer_bytes: int,
        is_steered: bool,
        inherited: Mapping[str, socket.socket] | None = None,
    ) -> None:
        """Raises ``ConfigError``."""
        self.is_steered = is_steered and steering.is_supported()
        self.slot_count = slot_count if self.is_steered else worker_count
        """Sockets per address."""
        self.is_inherited = False
        """The sockets are an earlier control plane's."""
        self._buffer_bytes = buffer_bytes
        self._groups: list[list[socket.socket]] = []
        self.addresses: tuple[Address, ...] = ()
        port_for_zero = 0
        found = _inherited_groups(inherited or {}, addresses)
        if found and (self.is_steered or len({len(group) for group in found}) == 1):
            self._groups = found
            self.addresses = tuple(_address(group[0]) for group in found)
            self.slot_count = max(len(group) for group in found)
            self.is_inherited = True
            if self.is_steered:
                self._complete(slot_count)
            return
        try:
            for host, port in addresses:
                wanted = port or port_for_zero
                group = _bind_group(host, wanted, self.slot_count, buffer_bytes)
                self._groups.append(group)
                bound = group[0].getsockname()[1]
                port_for_zero = port_for_zero or bound
                self.addresses += ((host, bound),)
        except BaseException:
            self.close()
            raise

    def grow(self, slot_count: int) -> None:
        """More slots, at most 256: a newcomer to a group goes last, so no index changes. Raises
        ``OSError``; then nothing has changed.
        """
        slot_count = max(self.slot_count, min(slot_count, MAX_SLOTS))
        added: list[list[socket.socket]] = []
        try:
            for (host, port), group in zip(self.addresses, self._groups, strict=True):
                added.append([])
                for _ in range(slot_count - len(group)):
                    added[-1].append(
                        bind_udp(host, port, reuse_port=True, buffer_bytes=self._buffer_bytes)
                    )
        except OSError:
            # the last one first: what leaves a group in its midst changes the index of another
            for newcomers in added:
                for sock in reversed(newcomers):
                    sock.close()
            raise
        for group, newcomers in zip(self._groups, added, strict=True):
            group.extend(newcomers)
        self.slot_count = slot_count

    def _complete(self, slot_count: int) -> None:
        """Of an earlier control plane's groups some may be short: it died while they grew."""
        try:
            self.grow(slot_count)
        except OSError as error:
            raise ConfigError(
                f"listen.quic: no more sockets on the listen addresses: {error.strerror}",
                key="listen.quic",
            ) from None

    def steer(self, active_slots: Sequence[int], live_slots: Sequence[int]) -> None:
        """Send new connections to ``active_slots``, and every other packet to the slot that its
        connection ID names, where that one is among ``live_slots``. Takes effect at once. Raises
        ``OSError``.
        """
        if not self.is_steered:
            return
        program = steering.build_program(
            slot_count=self.slot_count,
            active_slots=tuple(active_slots),
            live_slots=tuple(live_slots),
        )
        for group in self._groups:
            steering.attach(group[0], program)

    def descriptors(self) -> tuple[tuple[int, ...], ...]:
        """All sockets, one row per listen address."""
        return tuple(tuple(sock.fileno() for sock in group) for group in self._groups)

    def read_by(self, slot: int, place: int, workers: int) -> tuple[int, ...]:
        """Which of each row a worker reads: its slot's, or without steering its share; it has
        ``place`` among the ``workers`` of its generation.
        """
        if self.is_steered:
            return (slot,)
        return tuple(range(place, self.slot_count, workers)) or (place % self.slot_count,)

    def by_name(self) -> dict[str, socket.socket]:
        """Every socket by a name that says its place, for whoever keeps them meanwhile."""
        return {
            f"{_NAME}.{row}.{index}": sock
            for row, group in enumerate(self._groups)
            for index, sock in enumerate(group)
        }

    def close(self) -> None:
        """Give the port up."""
        for group in self._groups:
            for sock in group:
                sock.close()
        self._groups.clear()


def named(rows: Sequence[Sequence[int]]) -> dict[str, socket.socket]:
    """Descriptors that a worker handed over, named as ``Listeners.by_name`` does."""
    return {
        f"{_NAME}.{row}.{index}": socket.socket(fileno=descriptor)
        for row, group in enumerate(rows)
        for index, descriptor in enumerate(group)
    }


def _inherited_groups(
    inherited: Mapping[str, socket.socket], addresses: Sequence[Address]
) -> list[list[socket.socket]]:
    """The groups of an earlier control plane, if they are on these addresses; the last sockets of
    one may be missing, no others.
    """
    groups: list[list[socket.socket]] = []
    for host, port in addresses:
        row = len(groups)
        group: list[socket.socket] = []
        while (sock := inherited.get(f"{_NAME}.{row}.{len(group)}")) is not None:
            group.append(sock)
        if not group or not all(_is_bound_to(sock, (host, port)) for sock in group):
            return []
        if len(group) != sum(name.startswith(f"{_NAME}.{row}.") for name in inherited):
            return []
        groups.append(group)
    return groups


def addresses_of(inherited: Mapping[str, socket.socket]) -> list[Address]:
    """Where an earlier control plane listened."""
    addresses: list[Address] = []
    while (sock := inherited.get(f"{_NAME}.{len(addresses)}.0")) is not None:
        addresses.append(_address(sock))
    return addresses


def is_at(bound: Address, wanted: Address) -> bool:
    """Whether a socket is where a configuration wants it; port 0 is any."""
    return bound[0] == wanted[0].partition("%")[0] and wanted[1] in (0, bound[1])


def _is_bound_to(sock: socket.socket, wanted: Address) -> bool:
    with contextlib.suppress(OSError):
        return sock.type == socket.SOCK_DGRAM and is_at(_address(sock), wanted)
    return False


def _address(sock: socket.socket) -> Address:
    host, port = sock.getsockname()[:2]
    return host, port


def close_all(sockets: Mapping[str, socket.socket]) -> None:
    """Those that nobody took."""
    for sock in sockets.values():
        sock.close()


def _bind_group(host: str, port: int, count: int, buffer_bytes: int) -> list[socket.socket]:
    where = Target(host, port)
    group: list[socket.socket] = []
    try:
        # a socket without SO_REUSEPORT finds out whether somebody else has the port; joining
        # another gateway's group would take packets away from it
        probe = bind_udp(host, port, buffer_bytes=buffer_bytes)
        port = probe.getsockname()[1]
        probe.close()
        for _ in range(count):
            group.append(bind_udp(host, port, reuse_port=True, buffer_bytes=buffer_bytes))
    except OSError as error:
        for sock in group:
            sock.close()
        advice = ""
        if error.errno == errno.EADDRINUSE:
            advice = ": another program (perhaps another toppy-gw) has this UDP port"
        elif error.errno == errno.EACCES:
            advice = ": ports below 1024 need the capability CAP_NET_BIND_SERVICE"
        elif error.errno == errno.EADDRNOTAVAIL:
            advice = ": this host does not have that address"
        raise ConfigError(
            f"listen.quic: cannot listen on {where}: {error.strerror}{advice}", key="listen.quic"
        ) from None
    return group
