"""Packets that reached a worker but belong to another one: handed over on unix datagram sockets.

Where the kernel steers by connection ID there are few: connection attempts that were in the queue
of a worker when it began to drain. Where it does not, every packet is looked at. A packet is handed
on once at most.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from toppy.ipc.worker_sockets import stray_path
from toppy.net.quic_driver import ReceiveBatch
from toppy.net.steering import HASHED_BYTES, choose_active
from toppy.net.udp_socket import UdpSocket
from toppy.protocol.udp_tunnel import count_payloads
from toppy.quic.engine import Address, Buffer
from toppy.quic.gate import ConnectionGate
from toppy.wire.connection_id import (
    WorkerAddress,
    destination_connection_id,
    parse_connection_id,
)

_HEADER = struct.Struct("!BHHBB")  # row of the socket, segment size, port, two lengths
_MAX_STRAY_BYTES = 65_536 + 256
_LONG_HEADER = 0x80


class Strays:
    """One worker's part. ``sort`` looks at what its sockets received; ``receive`` takes what other
    workers handed over.
    """

    def __init__(
        self,
        runtime_dir: str,
        own: WorkerAddress,
        rows: Sequence[Sequence[UdpSocket]],
        gate: ConnectionGate,
        receive: ReceiveBatch,
    ) -> None:
        """``rows`` are the sockets that this worker uses, one row per listen address; ``receive``
        gives a packet to its engine.
        """
        self._runtime_dir = runtime_dir
        self._own = own
        self._rows = tuple(rows)
        self._row_of = {id(sock): row for row, socks in enumerate(rows) for sock in socks}
        self._gate = gate
        self._receive = receive
        self._active: tuple[int, ...] = ()
        self._generations: Mapping[int, int] = {}
        self.handed_over = 0
        self.lost = 0
        """Packets for a worker whose queue was full, or that was gone."""
        self._path = stray_path(runtime_dir, own.slot)
        Path(self._path).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(self._path)

    def fileno(self) -> int:
        """The descriptor, for the event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Be found no more."""
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)

    def learn(self, active: tuple[int, ...], generations: Mapping[int, int]) -> None:
        """Which slots take new connections, and which generation serves each slot."""
        self._active = active
        self._generations = generations

    def sort(
        self, sock: UdpSocket, buffer: Buffer, segment_size: int, source: Address, now: float
    ) -> None:
        """Give the engine what is ours, others what is theirs."""
        view = memoryview(buffer)
        step = segment_size or len(view) or 1
        # a stretch that goes one way stays together: the queues of unix sockets are short
        start, way = 0, self._own.slot

        def pass_on(stretch: memoryview) -> None:
            if not stretch:
                return
            if way == self._own.slot:
                self._receive(sock, stretch, segment_size, source, now)
            else:
                self._hand_over(way, sock, stretch, segment_size, source)

        for at in range(0, len(view), step):
            packet = view[at : at + step]
            owner = self._owner(bytes(packet[:32]))
            is_attempt = owner == self._own.slot and self._gate.is_draining and _is_long(packet)
            if owner == way and not is_attempt:
                continue
            pass_on(view[start:at])
            start, way = at, owner
            if is_attempt:
                self._offer(sock, packet, source, now)
                start = at + step
        pass_on(view[start:])

    def _owner(self, head: bytes) -> int:
        """The slot of the worker that issued the packet's connection ID, where it is alive; ours
        for all other packets.
        """
        connection_id = destination_connection_id(head)
        issued_by = parse_connection_id(connection_id) if connection_id is not None else None
        if issued_by is None:
            return self._own.slot
        generation = self._generations.get(issued_by.slot)
        if generation is None or generation % 256 != issued_by.generation:
            return self._own.slot
        return issued_by.slot

    def _offer(self, sock: UdpSocket, packet: memoryview, source: Address, now: float) -> None:
        """A packet of a handshake under way is ours; a new attempt is for an active worker."""
        before = self._gate.turned_away
        self._receive(sock, packet, 0, source, now)
        if self._gate.turned_away == before:
            return
        connection_id = destination_connection_id(bytes(packet[:32]))
        if self._active and connection_id is not None and len(connection_id) >= HASHED_BYTES:
            slot = choose_active(connection_id, self._active)
            if slot != self._own.slot:
                self._hand_over(slot, sock, packet, 0, source)

    def _hand_over(
        self,
        slot: int,
        sock: UdpSocket,
        payloads: memoryview,
        segment_size: int,
        source: Address,
    ) -> None:
        host = source[0].encode()
        count = count_payloads(len(payloads), segment_size)
        own_address = sock.own_address_for(source)
        header = _HEADER.pack(
            self._row_of[id(sock)], segment_size, source[1], len(host), len(own_address)
        )
        try:
            self._socket.sendmsg(
                (header, host, own_address, payloads),
                (),
                socket.MSG_DONTWAIT,
                stray_path(self._runtime_dir, slot),
            )
        except OSError:
            self.lost += count
        else:
            self.handed_over += count

    def receive(self, now: float) -> bool:
        """One stretch that another worker handed over, to the engine; False when none waits."""
        try:
            data = self._socket.recv(_MAX_STRAY_BYTES)
        except OSError:
            return False
        if len(data) < _HEADER.size:
            return True
        row, segment_size, port, host_bytes, own_bytes = _HEADER.unpack_from(data)
        host_end = _HEADER.size + host_bytes
        packet_at = host_end + own_bytes
        if row >= len(self._rows):
            return True
        source = (data[_HEADER.size : host_end].decode("ascii", "replace"), port)
        sock = self._rows[row][0]
        sock.answer_from(data[host_end:packet_at], source)
        self._receive(sock, data[packet_at:], segment_size, source, now)
        return True


def _is_long(packet: memoryview) -> bool:
    return len(packet) > 0 and bool(packet[0] & _LONG_HEADER)
