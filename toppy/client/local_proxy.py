"""``toppy proxy``: a local port that speaks SOCKS5, SOCKS4a and HTTP; each program's connection
becomes a tunnel through the gateway, which resolves the names.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, assert_never

from toppy.client.gateway_far_side import ask_for_stream
from toppy.client.session import GatewaySession
from toppy.client.socks_udp import SocksUdpRelay
from toppy.client.tunnel import Refusal
from toppy.client.udp_forward import ForwardCounters as DatagramCounters
from toppy.model.rate import NO_LIMITS, DirectionLimits
from toppy.model.target import Target
from toppy.net.acceptor import Acceptor
from toppy.net.stream_socket import SocketReader, StreamSocket
from toppy.net.tcp import peer_of, prepare_tcp, reset_tcp
from toppy.net.tcp_relay import ByteCounters
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.policy.ruleset import Decision
from toppy.protocol.local_proxy import (
    AssociateUdp,
    Close,
    Credentials,
    LocalProxyHandshake,
    Open,
    OpenFailure,
    Reply,
    ServePac,
    failure_of,
)
from toppy.wire.pac import encode_pac
from toppy.wire.proxy_status import parse_proxy_status

_READ_BYTES: Final = 4096
"""Of a handshake, at once."""
_PART_S: Final = 1.0
"""For a program to take its last answer and to go."""
_UDP_BUFFER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """How a local proxy behaves."""

    credentials: Credentials | None = None
    """What programs must know; None: nothing."""
    max_connections: int = 1024
    handshake_timeout_s: float = 10.0
    limits: DirectionLimits = NO_LIMITS
    """Of each connection, in each direction."""
    udp_max_targets: int = 128
    """Of each association."""
    udp_idle_s: float = 60.0
    pac_through: tuple[str, ...] = ()
    pac_direct: tuple[str, ...] = ()


@dataclass(slots=True)
class ProxyCounters(ByteCounters):
    """What has been, since the start."""

    connections: int = 0
    """Accepted."""
    failures: int = 0
    """Of these: no tunnel, no sense, or a reset."""
    datagrams: DatagramCounters = field(default_factory=DatagramCounters)


class ProxyEvents:
    """What somebody may want to hear of; the sentences are for people."""

    def opened(self, target: Target) -> None:
        """A program has a way to a target."""

    def denied(self, peer: str, target: Target, reason: str) -> None:
        """The client's or the gateway's policy does not allow it."""

    def refused(self, peer: str, target: Target, refusal: Refusal) -> None:
        """The gateway has no way to it."""

    def failed(self, peer: str, target: str, reason: str) -> None:
        """A connection did not end in order, or made no sense."""


class LocalProxy:
    """Accepts from one listening socket, which its caller owns. ``run`` until cancelled."""

    def __init__(
        self,
        listener: socket.socket,
        session: GatewaySession,
        decide: Callable[[Target], Awaitable[Decision]],
        options: ProxyOptions,
        events: ProxyEvents,
    ) -> None:
        """``decide`` is the client's own policy; the gateway has its own besides."""
        self._session = session
        self._decide = decide
        self._options = options
        self._events = events
        self._acceptor = Acceptor(
            listener, options.max_connections, lambda why: events.failed("", "", why)
        )
        self._undecided: dict[asyncio.Task[object], None] = {}
        """Connections that have not said what they want, the oldest first."""
        self.counters = ProxyCounters()

    @property
    def connections(self) -> int:
        """Open now."""
        return self._acceptor.open

    async def run(self) -> None:
        """Serve every connection; beyond the most, further ones wait to be accepted."""
        await self._acceptor.run(self.serve)

    async def serve(self, client: socket.socket) -> None:
        """One program's connection, to its end."""
        self.counters.connections += 1
        peer = peer_of(client)
        try:
            prepare_tcp(client)
            await self._serve(client, peer)
        except OSError as error:
            self._fail(peer, "", error.strerror or str(error))
        finally:
            reset_tcp(client)  # closed already where it ended in order

    async def _serve(self, client: socket.socket, peer: str) -> None:
        handshake = LocalProxyHandshake(credentials=self._options.credentials)
        try:
            with self._patience():
                async with asyncio.timeout(self._options.handshake_timeout_s):
                    action = await self._converse(client, handshake)
        except TimeoutError:
            self._fail(peer, "", "the program did not say in time what it wants")
            return
        except asyncio.CancelledError:
            self._fail(peer, "", "it had to make room: too many programs do not say what they want")
            raise
        match action:
            case Open():
                await self._serve_tunnel(client, peer, handshake, action)
            case AssociateUdp():
                await self._serve_datagrams(client, peer, handshake, action)
            case ServePac():
                address = str(Target(*client.getsockname()[:2]))
                options = self._options
                text = encode_pac(address, through=options.pac_through, direct=options.pac_direct)
                await self._part(client, handshake.serve_pac(text))
            case Close(reason=reason):
                self._fail(peer, "", reason)
                await self._part(client, b"")
            case _:
                assert_never(action)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Of those that have not said what they want only the newest are waited for: whoever is
        silent must not keep out those that speak.
        """
        task = asyncio.current_task()
        assert task is not None
        if len(self._undecided) >= max(1, self._options.max_connections // 2):
            oldest = next(iter(self._undecided))
            del self._undecided[oldest]
            oldest.cancel()
        self._undecided[task] = None
        try:
            yield
        finally:
            self._undecided.pop(task, None)

    @staticmethod
    async def _converse(
        client: socket.socket, handshake: LocalProxyHandshake
    ) -> Open | AssociateUdp | ServePac | Close:
        """Until the program has said what it wants. Raises ``OSError``."""
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(client, _READ_BYTES)
            for action in handshake.receive(data) if data else handshake.receive_end():
                if isinstance(action, Reply):
                    await loop.sock_sendall(client, action.data)
                else:
                    return action

    @staticmethod
    async def _part(client: socket.socket, answer: bytes) -> None:
        """Say a last thing and close; not before the program has gone, or a second: with unread
        bytes the kernel would send a reset, which may overtake the answer.
        """
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_PART_S):
                await loop.sock_sendall(client, answer)
                client.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(client, _READ_BYTES):
                    pass
        client.close()

    def _fail(self, peer: str, target: str, reason: str) -> None:
        self.counters.failures += 1
        self._events.failed(peer, target, reason)

    # TCP

    async def _serve_tunnel(
        self, client: socket.socket, peer: str, handshake: LocalProxyHandshake, wanted: Open
    ) -> None:
        target = wanted.target
        decision = await self._decide(target)
        if not decision.is_allowed:
            self.counters.failures += 1
            self._events.denied(peer, target, decision.reason)
            answer = handshake.failed(OpenFailure.NOT_ALLOWED, decision.reason)
            await self._part(client, answer)
            return
        stream = await ask_for_stream(self._session, target, limits=self._options.limits)
        if isinstance(stream, Refusal):
            self.counters.failures += 1
            if stream.status == 403:
                self._events.denied(peer, target, stream.explanation)
            else:
                self._events.refused(peer, target, stream)
            failure = failure_of(stream.status, parse_proxy_status(stream.proxy_status))
            answer = handshake.failed(failure, stream.explanation, proxy_status=stream.proxy_status)
            await self._part(client, answer)
            return
        self._events.opened(target)

        def make(reader: SocketReader) -> StreamSocket:
            return StreamSocket(client, reader)

        problem = await stream.carry(
            make,
            self.counters,
            reply=handshake.opened(),
            early=wanted.remaining,
            body=wanted.body,
        )
        if problem:
            self._fail(peer, str(target), problem)

    # UDP

    async def _serve_datagrams(
        self, client: socket.socket, peer: str, handshake: LocalProxyHandshake, wanted: AssociateUdp
    ) -> None:
        loop = asyncio.get_running_loop()
        options = self._options
        host = client.getsockname()[0]
        try:
            local = UdpSocket(bind_udp(host, 0, buffer_bytes=_UDP_BUFFER_BYTES, may_fragment=True))
        except OSError as error:
            self._fail(peer, "", f"no socket for datagrams: {error.strerror or error}")
            await self._part(client, handshake.failed(OpenFailure.GENERAL))
            return
        relay = SocksUdpRelay(
            self._session,
            local,
            # what it says of its address is not believed: it is where this connection is from
            (client.getpeername()[0], wanted.port),
            self._decide,
            max_targets=options.udp_max_targets,
            idle_timeout_s=options.udp_idle_s,
            rate=options.limits.bytes,
            on_opened=self._events.opened,
            on_denied=lambda target, reason: self._events.denied(peer, target, reason),
            on_refused=lambda target, refusal: self._events.refused(peer, target, refusal),
            counters=self.counters.datagrams,
        )
        relaying = loop.create_task(relay.run())
        try:
            await loop.sock_sendall(client, handshake.associated(*local.local_address))
            # the association lives as long as the connection (RFC 1928 section 7)
            while await loop.sock_recv(client, _READ_BYTES):
                pass
            client.close()
        finally:
            relaying.cancel()
            await asyncio.wait({relaying})
            local.close()
