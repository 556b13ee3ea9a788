"""UDP sockets that send and receive batches: one system call for up to 64 KiB of datagrams.

The kernel cuts what is sent (UDP_SEGMENT, "GSO") and joins what is received (UDP_GRO). Where a
path or device refuses GSO, datagrams are sent one by one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from enum import Enum
from typing import Any, Final

from toppy.quic.engine import Address, Buffer

MAX_GSO_SEGMENTS: Final = 64
"""Linux took 64 before 6.9 and takes 128 since; the second half gains little."""
MAX_GSO_BYTES: Final = 65_000
"""An IP packet's length has 16 bits; this leaves room for every header."""
_MAX_GSO_SEGMENT_BYTES: Final = MAX_GSO_BYTES // 2
ALWAYS_FITTING_BYTES: Final = 1232
"""UDP payload of the smallest IPv6 MTU, 1,280 (RFC 8200 section 5): no device refuses it."""

# Linux's numbers: the socket module does not have them (include/uapi/linux/in.h, in6.h, udp.h)
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_IP_MTU = 14
_IPV6_MTU = 24
_PMTUDISC_WANT = 1
_PMTUDISC_PROBE = 3
_SOL_UDP = socket.IPPROTO_UDP
_UDP_SEGMENT = 103
_UDP_GRO = 104
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")
_MEMINFO_DROPS = 8

_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
_IPV6_PKTINFO = 50
_IN_PKTINFO = struct.Struct("=I4s4s")  # interface, source to use, destination it had
_IN6_PKTINFO = struct.Struct("=16sI")  # address, interface

_UINT16 = struct.Struct("=H")
_INT = struct.Struct("=i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_INT.size)

_ANCILLARY_WITH_ADDRESS_BYTES = _ANCILLARY_BYTES + socket.CMSG_SPACE(_IN6_PKTINFO.size)

_Target = tuple[Any, ...] | None
_Ancillary = tuple[tuple[int, int, bytes], ...]

BUSY_S: Final = 0.0003
"""A reader that was called so recently takes all that waits, and makes large batches of it. Called
less often it takes what came and leaves the question for more, a system call, to the event loop,
which asks anyway."""

MAX_REMEMBERED_PEERS: Final = 65_536
"""Peers whose way to us a wildcard socket remembers; beyond it the oldest is forgotten, and the
kernel chooses the source address of what goes there, until it sends again."""

# What a peer or a path can cause. Anything else (EBADF, EFAULT, …) is a mistake of ours: raised.
_UNREACHABLE = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENONET,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EACCES,
        errno.ETIMEDOUT,
    }
)
_FAILED = frozenset(
    {
        errno.EPERM,  # a packet filter
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.EIO,
        errno.EINVAL,  # for example port 0, or a link-local address without its zone
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
    }
)
_GSO_REFUSED = frozenset({errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE})

_PATH_TOO_SMALL = frozenset({errno.EINVAL, errno.EMSGSIZE})  # before Linux 6.14, and since

_ERRORS_PER_RECEIVE = 8
"""ICMP errors that one ``receive`` skips before other sockets get their turn."""

# One buffer for all sockets of the process: with one per tunnel, 10,000 tunnels would hold 640 MB.
_receive_buffer = memoryview(bytearray(1 << 16))
_receive_buffers = [_receive_buffer]


class SendResult(Enum):
    """What became of a ``send``."""

    SENT = "sent"
    WOULD_BLOCK = "would_block"
    """The socket's buffer is full; it polls writable when there is room."""
    UNREACHABLE = "unreachable"
    """No route, or an ICMP error. On a connected socket the error may be an earlier datagram's:
    nothing was sent, and sending again may work."""
    TOO_LARGE = "too_large"
    """Larger than a UDP datagram, or than the path's packets where those are never fragmented."""
    FAILED = "failed"
    """The kernel or a packet filter refused."""


def bind_udp(
    host: str,
    port: int,
    *,
    buffer_bytes: int,
    reuse_port: bool = False,
    may_fragment: bool = False,
) -> socket.socket:
    """A non-blocking socket bound to a numeric address (``fe80::1%eth0`` with its zone).

    Its packets carry DF and ignore the kernel's idea of the path MTU, as QUIC asks (RFC 9000
    section 14), unless ``may_fragment``: then 65,507 bytes can be sent. IPv6 sockets are IPv6
    only. ``buffer_bytes`` is asked for in each direction; the kernel may give less. Raises
    ``OSError``.
    """
    family, address = _socket_address(host, port, socket.AI_PASSIVE)
    sock = _open(family, buffer_bytes=buffer_bytes, may_fragment=may_fragment)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_udp(
    address: str, port: int, *, buffer_bytes: int, may_fragment: bool = True
) -> socket.socket:
    """A non-blocking socket that talks to one numeric address and hears nobody else.

    Raises ``OSError`` when there is no route.
    """
    family, peer = _socket_address(address, port, 0)
    sock = _open(family, buffer_bytes=buffer_bytes, may_fragment=may_fragment)
    try:
        sock.connect(peer)
    except BaseException:
        sock.close()
        raise
    return sock


class UdpSocket:
    """Batches in and out of one non-blocking UDP socket, which it owns.

    For one thread: all ``UdpSocket`` of a process receive into the same buffer.
    """

    __slots__ = (
        "_ancillary_bytes",
        "_drops_before",
        "_is_connected",
        "_max_gso_segment",
        "_reached_at",
        "_recvmsg_into",
        "_send_one",
        "_sendmsg",
        "_sendto",
        "_socket",
        "_source",
        "is_ipv6",
        "sent_bytes",
        "unreachable",
    )

    def __init__(
        self,
        sock: socket.socket,
        *,
        gso: bool = True,
        gro: bool = True,
        answers_from_same_address: bool = False,
    ) -> None:
        """``answers_from_same_address``: on a host with several addresses, a server's wildcard
        socket must answer from the one that it was asked on, or the peer drops the answer.
        """
        sock.setblocking(False)
        self._socket = sock
        self._recvmsg_into = sock.recvmsg_into
        self._sendmsg = sock.sendmsg
        self._send_one = sock.send
        self._sendto = sock.sendto
        self.is_ipv6 = sock.family == socket.AF_INET6
        self._is_connected = _is_connected(sock)
        self._max_gso_segment = _MAX_GSO_SEGMENT_BYTES if gso and _kernel_has_gso() else 0
        if gro:
            with contextlib.suppress(OSError):  # Linux before 5.0: datagrams come one by one
                sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        self._ancillary_bytes = _ANCILLARY_BYTES
        self._reached_at: dict[Address, _Ancillary] | None = None
        if answers_from_same_address and _is_wildcard(sock):
            if self.is_ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._ancillary_bytes = _ANCILLARY_WITH_ADDRESS_BYTES
            self._reached_at = {}
        self._source: _Ancillary = ()
        """The source address of the ``send`` under way, where it is not the kernel's choice."""
        self._drops_before = self._kernel_drops()
        self.unreachable = 0
        """How often the network said that something sent could not arrive."""
        self.sent_bytes = 0
        """After a ``send`` whose result is not SENT: how much of its payloads had gone out."""

    def fileno(self) -> int:
        """The descriptor, for the event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; take it out of the event loop first."""
        self._socket.close()

    @property
    def local_address(self) -> Address:
        """Where the socket is bound."""
        return _plain_address(self._socket.getsockname())

    @property
    def uses_gso(self) -> bool:
        """Whether sends still go out in batches; False once the path has refused them."""
        return self._max_gso_segment > 0

    @property
    def overflow(self) -> int:
        """Datagrams that the kernel dropped since this object was made: the buffer was full."""
        return (self._kernel_drops() - self._drops_before) & 0xFFFFFFFF

    def receive(self) -> tuple[memoryview, int, Address] | None:
        """What waits: (payloads, segment size, source), or None when nothing does.

        Each payload is ``segment size`` long, only the last may be shorter; 0 means one payload,
        perhaps empty. The view is valid until the next ``receive`` of *any* socket. ICMP errors
        are counted in ``unreachable`` and skipped. An IPv6 source that needs its zone has the
        interface's number as in ``fe80::1%3``.
        """
        for _ in range(_ERRORS_PER_RECEIVE):
            try:
                size, ancillary, _, address = self._recvmsg_into(
                    _receive_buffers, self._ancillary_bytes
                )
            except BlockingIOError:
                return None
            except OSError as error:
                self._count_receive_error(error)
                continue
            segment_size = 0
            for level, kind, data in ancillary:
                if kind == _UDP_GRO and level == _SOL_UDP:
                    segment_size = _INT.unpack(data)[0]
                    if segment_size >= size:
                        segment_size = 0
            if self.is_ipv6:
                address = (
                    address[:2] if not address[3] else (f"{address[0]}%{address[3]}", address[1])
                )
            if self._reached_at is not None:
                self._remember(address, ancillary)
            return _receive_buffer[:size], segment_size, address
        return None

    def _remember(self, peer: Address, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Which of our addresses ``peer`` talks to, in the form that a send takes."""
        assert self._reached_at is not None
        for level, kind, data in ancillary:
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                _, _, ours = _IN_PKTINFO.unpack(data)
                info = _IN_PKTINFO.pack(0, ours, bytes(4))
            elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                ours, interface = _IN6_PKTINFO.unpack(data)
                # only a link-local peer needs its interface; others follow the routes
                info = _IN6_PKTINFO.pack(ours, interface if "%" in peer[0] else 0)
            else:
                continue
            known = self._reached_at.get(peer)
            if known is not None and known[0][2] == info:
                return
            if known is None and len(self._reached_at) >= MAX_REMEMBERED_PEERS:
                del self._reached_at[next(iter(self._reached_at))]
            self._reached_at[peer] = ((level, kind, info),)

    def own_address_for(self, peer: Address) -> bytes:
        """Which of our addresses ``peer`` talks to, for another socket's ``answer_from``; empty
        where the socket is bound to one.
        """
        known = self._reached_at.get(peer) if self._reached_at is not None else None
        return known[0][2] if known is not None else b""

    def answer_from(self, own_address: bytes, peer: Address) -> None:
        """Send to ``peer`` from what another worker's socket says that it talks to."""
        if self._reached_at is None or not own_address:
            return
        kind = (
            (socket.IPPROTO_IPV6, _IPV6_PKTINFO)
            if self.is_ipv6
            else (socket.IPPROTO_IP, _IP_PKTINFO)
        )
        if peer not in self._reached_at and len(self._reached_at) >= MAX_REMEMBERED_PEERS:
            del self._reached_at[next(iter(self._reached_at))]
        self._reached_at[peer] = ((*kind, own_address),)

    def send(
        self, payloads: Buffer, segment_size: int, address: Address | None = None
    ) -> SendResult:
        """Send payloads of ``segment_size`` bytes each, the last may be shorter (0: one payload,
        perhaps empty), to ``address`` (numeric, an IPv6 zone too), or to the peer of a connected
        socket.

        On a result other than SENT the first ``sent_bytes`` have gone out all the same: a caller
        that tries again goes on from there.
        """
        if address is not None and self.is_ipv6 and "%" in address[0]:
            host, _, zone = address[0].partition("%")
            target: _Target = (host, address[1], 0, int(zone))
        else:
            target = address
        size = len(payloads)
        if self._reached_at is not None and address is not None:
            self._source = self._reached_at.get(address, ())
        if not segment_size or size <= segment_size:
            return self._send_single(payloads, target)
        if segment_size > self._max_gso_segment:
            return self._send_each(payloads, segment_size, target, 0)
        most = min(MAX_GSO_SEGMENTS, MAX_GSO_BYTES // segment_size) * segment_size
        if size <= most:
            return self._send_batch(payloads, segment_size, target, 0)
        return self._send_batches(payloads, segment_size, target, most)

    def _send_single(self, payload: Buffer, target: _Target) -> SendResult:
        try:
            if target is None:
                self._send_one(payload)
            elif self._source:
                self._sendmsg((payload,), self._source, 0, target)
            else:
                self._sendto(payload, target)
        except BlockingIOError:
            self.sent_bytes = 0
            return SendResult.WOULD_BLOCK
        except OSError as error:
            self.sent_bytes = 0
            if error.errno == errno.EMSGSIZE and target is None:
                return self._send_single_again(payload)
            return self._result(error)
        return SendResult.SENT

    def _send_single_again(self, payload: Buffer) -> SendResult:
        """A connected socket's EMSGSIZE may be the ICMP answer to an earlier, larger datagram."""
        try:
            self._send_one(payload)
        except BlockingIOError:
            return SendResult.WOULD_BLOCK
        except OSError as error:
            return self._result(error)
        return SendResult.SENT

    def _send_batch(
        self, payloads: Buffer, segment_size: int, target: _Target, done: int
    ) -> SendResult:
        """One system call; ``done`` bytes of the same ``send`` went out before."""
        ancillary = ((_SOL_UDP, _UDP_SEGMENT, _UINT16.pack(segment_size)), *self._source)
        try:
            if target is None:
                self._sendmsg((payloads,), ancillary)
            else:
                self._sendmsg((payloads,), ancillary, 0, target)
        except BlockingIOError:
            self.sent_bytes = done
            return SendResult.WOULD_BLOCK
        except OSError as error:
            if error.errno in _GSO_REFUSED:
                return self._send_refused_batch(error, payloads, segment_size, target, done)
            self.sent_bytes = done
            return self._result(error)
        return SendResult.SENT

    def _send_batches(
        self, payloads: Buffer, segment_size: int, target: _Target, most: int
    ) -> SendResult:
        view = memoryview(payloads)
        for start in range(0, len(view), most):
            chunk = view[start : start + most]
            result = self._send_chunk(chunk, segment_size, target, start)
            if result is SendResult.UNREACHABLE and start:
                # the error belongs to one of those that just went out
                result = self._send_chunk(chunk, segment_size, target, start)
            if result is not SendResult.SENT:
                return result
        return SendResult.SENT

    def _send_chunk(
        self, payloads: Buffer, segment_size: int, target: _Target, done: int
    ) -> SendResult:
        if len(payloads) <= segment_size or segment_size > self._max_gso_segment:
            return self._send_each(payloads, segment_size, target, done)
        return self._send_batch(payloads, segment_size, target, done)

    def _send_refused_batch(
        self, error: OSError, payloads: Buffer, segment_size: int, target: _Target, done: int
    ) -> SendResult:
        """The kernel would not segment: because it or the device cannot, or because a segment is
        larger than the path's packets (then the datagrams can only go as fragments).
        """
        result = self._send_each(payloads, segment_size, target, done)
        if result is not SendResult.SENT:
            return result
        unfragmented_bytes = self._unfragmented_bytes()
        if error.errno in _PATH_TOO_SMALL and segment_size > unfragmented_bytes:
            if self._is_connected:
                # one path only; on a socket with many, the others' batches shall not suffer
                self._max_gso_segment = min(self._max_gso_segment, unfragmented_bytes)
        elif error.errno != errno.EMSGSIZE:
            self._max_gso_segment = 0
        return result

    def _unfragmented_bytes(self) -> int:
        """The largest payload that the path is known to take in one packet."""
        if not self._is_connected:
            return ALWAYS_FITTING_BYTES
        if self.is_ipv6:
            return self._socket.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU) - 48
        return self._socket.getsockopt(socket.IPPROTO_IP, _IP_MTU) - 28

    def _send_each(
        self, payloads: Buffer, segment_size: int, target: _Target, done: int
    ) -> SendResult:
        view = memoryview(payloads)
        for start in range(0, len(view), segment_size):
            payload = view[start : start + segment_size]
            result = self._send_single(payload, target)
            if result is SendResult.UNREACHABLE and start:
                result = self._send_single(payload, target)  # as in _send_batches
            if result is not SendResult.SENT:
                self.sent_bytes = done + start
                return result
        return SendResult.SENT

    def _result(self, error: OSError) -> SendResult:
        if error.errno in _UNREACHABLE:
            self.unreachable += 1
            return SendResult.UNREACHABLE
        if error.errno == errno.EMSGSIZE:
            return SendResult.TOO_LARGE
        if error.errno in _FAILED:
            return SendResult.FAILED
        raise error

    def _count_receive_error(self, error: OSError) -> None:
        if error.errno in _UNREACHABLE or error.errno == errno.EMSGSIZE:
            self.unreachable += 1
        elif error.errno not in _FAILED:
            raise error

    def _kernel_drops(self) -> int:
        try:
            meminfo = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:
            return 0  # Linux before 4.12
        return int(_MEMINFO.unpack(meminfo)[_MEMINFO_DROPS]) if len(meminfo) >= 36 else 0


def _socket_address(
    host: str, port: int, flags: int
) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    found = socket.getaddrinfo(
        host, port, type=socket.SOCK_DGRAM, flags=flags | socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]


def _open(family: socket.AddressFamily, *, buffer_bytes: int, may_fragment: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        discover = _PMTUDISC_WANT if may_fragment else _PMTUDISC_PROBE
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, discover)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, discover)
        _set_buffer(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF, buffer_bytes)
        _set_buffer(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF, buffer_bytes)
    except BaseException:
        sock.close()
        raise
    return sock


def _set_buffer(sock: socket.socket, forced: int, ordinary: int, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, size)  # beyond net.core.[rw]mem_max
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, ordinary, size)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _is_wildcard(sock: socket.socket) -> bool:
    return sock.getsockname()[0] in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound


def _plain_address(address: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    if len(address) == 4 and address[3]:
        return f"{address[0]}%{address[3]}", address[1]
    return address[0], address[1]


@functools.cache
def _kernel_has_gso() -> bool:
    """Linux before 4.18 would ignore the request and send one huge datagram."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.getsockopt(_SOL_UDP, _UDP_SEGMENT)
        except OSError:
            return False
    return True
