"""``toppy up``: a local TCP port whose connections reach one target, the *far side*.

The far side is an interface: the target itself (``DirectFarSide``), or a way through the gateway.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from toppy.client.lookup import NameLookupError, look_up
from toppy.errors import DeniedError, TargetError, ToppyError
from toppy.model.target import Target
from toppy.net.acceptor import Acceptor
from toppy.net.copy import CopyRelay
from toppy.net.tcp import connect_tcp, peer_of, prepare_tcp, reset_tcp
from toppy.net.tcp_relay import ByteCounters, Rate, TcpRelay
from toppy.policy.ruleset import Decision
from toppy.quic.engine import Address


class FarStream(Protocol):
    """A way to the target that is open, for one connection."""

    async def relay(self, client: socket.socket, counters: ByteCounters) -> str:
        """Relay until both directions have ended or one side was reset; owns and closes ``client``,
        which is non-blocking and connected.

        Returns why it was reset, or nothing when all ended in order. Ends and resets are passed on.
        Cancelled, it resets both sides.
        """
        ...


class FarSide(Protocol):
    """Where a local port leads."""

    async def open(self) -> FarStream:
        """A way for one more connection. Within a deadline; raises ``ToppyError``."""
        ...

    def close(self) -> None:
        """No stream of it is left."""
        ...


@dataclass(slots=True)
class ForwardCounters(ByteCounters):
    """What has been, since the start."""

    connections: int = 0
    """Accepted."""
    failures: int = 0
    """Of these: no way to the target, or a reset."""


class TcpForward:
    """Accepts from one listening socket, which its caller owns. ``run`` until cancelled."""

    def __init__(
        self,
        listener: socket.socket,
        far: FarSide,
        *,
        max_connections: int,
        on_refused: Callable[[str, ToppyError], None] = lambda peer, error: None,
        on_problem: Callable[[str, str], None] = lambda peer, problem: None,
    ) -> None:
        """``on_refused``: no way could be opened for this peer; ``on_problem``: its connection did
        not end in order. Beyond ``max_connections`` further ones wait to be accepted.
        """
        self._listener = listener
        self._far = far
        self._on_refused = on_refused
        self._on_problem = on_problem
        self._acceptor = Acceptor(
            listener, max_connections, lambda problem: self._on_problem("", problem)
        )
        self.counters = ForwardCounters()

    @property
    def connections(self) -> int:
        """Open now."""
        return self._acceptor.open

    async def run(self) -> None:
        """Serve every connection."""
        await self._acceptor.run(self.serve)

    async def run_once(self) -> bool:
        """Serve one connection; whether it reached the target and ended in order."""
        client = await self._acceptor.accept()
        self._listener.close()
        self._acceptor.open += 1
        try:
            return await self.serve(client)
        finally:
            self._acceptor.open -= 1

    async def serve(self, client: socket.socket) -> bool:
        """Carry one connection to its end; whether all went well."""
        self.counters.connections += 1
        peer = peer_of(client)
        try:
            prepare_tcp(client)
            stream = await self._far.open()
        except ToppyError as error:
            reset_tcp(client)
            self.counters.failures += 1
            self._on_refused(peer, error)
            return False
        except OSError as error:
            reset_tcp(client)
            self.counters.failures += 1
            self._on_problem(peer, error.strerror or str(error))
            return False
        except BaseException:
            reset_tcp(client)
            raise
        problem = await stream.relay(client, self.counters)
        if problem:
            self.counters.failures += 1
            self._on_problem(peer, problem)
        return not problem


def tcp_relay() -> TcpRelay:
    """The best that this system has."""
    if hasattr(os, "splice"):
        from toppy.net.splice import SpliceRelay  # noqa: PLC0415  # it imports what Linux alone has

        return SpliceRelay()
    return CopyRelay()


class DirectFarSide:
    """The target itself, without a gateway; to be made on the event loop.

    Its name is resolved here for every connection and each address is asked about, because what a
    name stands for may change: only allowed ones are connected to (T-040). A connection lives no
    longer than the time in which its rule allows it.
    """

    def __init__(
        self,
        target: Target,
        decide: Callable[[Sequence[str], float], Decision],
        *,
        rate: Rate | None,
        connect_timeout_s: float,
        relay: TcpRelay | None = None,
        resolve: Callable[[str, int], Awaitable[Sequence[Address]]] = look_up,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``decide`` is asked which of the addresses are allowed at a Unix time. ``rate`` is that
        of each connection.
        """
        self._target = target
        self._decide = decide
        self._rate = rate
        self._connect_timeout_s = connect_timeout_s
        self._relay = relay or tcp_relay()
        self._resolve = resolve
        self._wall_clock = wall_clock

    async def open(self) -> FarStream:
        """See ``FarSide``. Raises ``DeniedError`` or ``TargetError``."""
        addresses = await self._addresses()
        decision = self._decide(addresses, self._wall_clock())
        if not decision.is_allowed:
            raise DeniedError(decision.reason, rule=decision.rule)
        sock = await connect_tcp(
            decision.addresses, self._target.port, timeout_s=self._connect_timeout_s
        )
        left_s = None if decision.until is None else decision.until - self._wall_clock()
        return _DirectStream(self._relay, sock, self._rate, left_s)

    def close(self) -> None:
        """See ``FarSide``."""
        self._relay.close()

    async def _addresses(self) -> Sequence[str]:
        try:
            ipaddress.ip_address(self._target.host)
        except ValueError:
            pass
        else:
            return (self._target.host,)
        try:
            found = await self._resolve(self._target.host, self._target.port)
        except NameLookupError as error:
            raise TargetError(
                f"the name {self._target.host} cannot be resolved here: {error}",
                proxy_status="dns_error",
            ) from None
        return [address for address, _ in found]


class _DirectStream:
    """One connection to the target."""

    def __init__(
        self, relay: TcpRelay, sock: socket.socket, rate: Rate | None, left_s: float | None
    ) -> None:
        self._relay = relay
        self._sock = sock
        self._rate = rate
        self._left_s = left_s

    async def relay(self, client: socket.socket, counters: ByteCounters) -> str:
        """See ``FarStream``."""
        try:
            async with asyncio.timeout(self._left_s):
                return await self._relay.relay(client, self._sock, self._rate, counters)
        except TimeoutError:
            return "the time in which its rule allows it is over"
