"""The gateway's UDP sockets: one SO_REUSEPORT group per listen address, a socket per slot.

The control plane keeps every descriptor for as long as it lives, so that a socket's index in its
group never changes and what is queued for a dead worker waits for the next one.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from toppy.errors import ConfigError
from toppy.model.target import Target
from toppy.net import steering
from toppy.net.udp_socket import bind_udp
from toppy.quic.engine import Address


class Listeners:
    """Sockets for ``slot_count`` slots on every address; at most 256 slots."""

    def __init__(self, addresses: Sequence[Address], slot_count: int, *, buffer_bytes: int) -> None:
        self.slot_count = slot_count
        self.is_steered = steering.is_supported()
        self._groups: list[list[socket.socket]] = []
        self.addresses: tuple[Address, ...] = ()
        port_for_zero = 0
        try:
            for host, port in addresses:
                wanted = port or port_for_zero
                group = _bind_group(host, wanted, slot_count, buffer_bytes)
                self._groups.append(group)
                bound = group[0].getsockname()[1]
                port_for_zero = port_for_zero or bound
                self.addresses += ((host, bound),)
        except BaseException:
            self.close()
            raise

    def steer(self, active_slots: Sequence[int]) -> None:
        """Send new connections to ``active_slots``, and every other packet to the slot that its
        connection ID names. Takes effect at once.
        """
        if not self.is_steered:
            return
        program = steering.build_program(
            slot_count=self.slot_count, active_slots=tuple(active_slots)
        )
        for group in self._groups:
            steering.attach(group[0], program)

    def descriptors(self, slot: int) -> tuple[int, ...]:
        """What the worker of ``slot`` reads.

        Without steering the kernel spreads packets over all sockets of a group, so the sockets of
        the spare slots are read too, each by one worker.
        """
        slots = [slot]
        if not self.is_steered:
            slots.append(slot + self.slot_count // 2)
        return tuple(group[s].fileno() for group in self._groups for s in slots)

    def close(self) -> None:
        """Give the port up."""
        for group in self._groups:
            for sock in group:
                sock.close()
        self._groups.clear()


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
