"""The client's connection to its gateway: dialled, watched, dialled again when it is lost, and
left for a new one, without a gap, when the gateway says that it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from toppy.client.lookup import NameLookupError, look_up
from toppy.client.tcp_tunnels import TcpTunnels
from toppy.client.tunnels import Tunnels
from toppy.errors import ConfigError
from toppy.model.drop_reason import DropReason
from toppy.net.quic_driver import QuicDriver
from toppy.net.udp_socket import UdpSocket, bind_udp, connect_udp
from toppy.protocol.backoff import Backoff
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import H3_ALPN, ConnectionOpened, Endpoint
from toppy.quic.engine import (
    Address,
    CongestionControl,
    ConnectionClosed,
    Engine,
    EngineConfig,
)
from toppy.quic.h3 import H3_NO_ERROR
from toppy.wire.version_negotiation import MIN_PROBE_BYTES, PROBE_ID_BYTES, encode_version_probe

DIAL_TIMEOUT_S = 5.0
"""From the first packet to the gateway's SETTINGS."""
ATTEMPT_DELAY_S = 0.25
"""Before the next address is tried beside the one under way (RFC 8305 section 5)."""
KEEP_ALIVE_S = 5.0
IDLE_TIMEOUT_S = 20.0
"""A gateway that is silent for so long, keep-alives included, is gone."""
STABLE_S = 1.0
"""A connection that lasted so long was a good one: the next attempt comes soon."""
_CLOSE_GRACE_S = 0.05
_ASKING_S = 0.3
"""For an ICMP message, after an attempt that met with silence."""
_ASKING_BUFFER_BYTES = 1 << 16
_NO_ANSWER = "no answer (is UDP blocked on the way, or the gateway down? `toppy doctor` finds out)"
_UNKNOWN_ISSUER = ("UnknownIssuer", "unable to get local issuer certificate")
"""In the words of the one engine and the other."""
CERTIFICATE_REQUIRED = 0x0174
"""The TLS alert of that name as a QUIC error code (RFC 8446 section 6, RFC 9001 section 4.8)."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How to reach the gateway, and as whom."""

    host: str
    port: int
    server_name: str
    template: str
    """URI template of RFC 9298 section 2."""
    tcp_template: str
    """The same for TCP (draft-ietf-httpbis-connect-tcp)."""
    ca_certificates_pem: bytes | None
    authorization: str | None = field(repr=False)
    certificate_chain_pem: bytes = b""
    """What this client shows to a gateway that asks; empty: nothing."""
    private_key_pem: bytes = field(default=b"", repr=False)
    engine: str = "auto"
    congestion_control: CongestionControl = "bbr"
    initial_packet_bytes: int = 1350
    buffer_bytes: int = 4 << 20


class SessionState(Enum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    """Between two attempts."""


@dataclass(frozen=True, slots=True)
class ConnectFailure:
    """One attempt failed, or the connection was lost."""

    reason: str
    retry_in_s: float
    is_relaying: bool = False
    """An earlier connection, which the gateway wants to end, still carries the tunnels."""


class GatewaySession:
    """Keeps one connection to the gateway, and with it its ``tunnels``.

    ``run`` until cancelled. ``on_failure`` hears of every attempt that failed and every connection
    that was lost; the session goes on by itself. When the gateway sends its clients away (GOAWAY,
    WRAP_UP), a new connection is dialled while the old one goes on relaying. Raises
    ``ConfigError`` for settings that no engine can work with.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        on_state: Callable[[SessionState], None] = lambda _: None,
        on_failure: Callable[[ConnectFailure], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._on_state = on_state
        self._on_failure = on_failure
        engine = make_client_engine(settings, H3_ALPN, time.monotonic())
        self._sockets = open_sockets(settings.buffer_bytes)
        self.engine_name = engine.name
        self._endpoint = Endpoint(engine, is_client=True)
        self.tunnels = Tunnels(
            self._endpoint,
            template=settings.template,
            authorization=settings.authorization,
            on_leave=self._leave,
        )
        self.streams = TcpTunnels(
            self._endpoint,
            self.tunnels,
            template=settings.tcp_template,
            authorization=settings.authorization,
            flush=self.flush_soon,
        )
        self._driver = QuicDriver(self._endpoint, self._sockets, self._pump)
        self.state = SessionState.CONNECTING
        self._connection: int | None = None
        self._connections: set[int] = set()
        """The current one, and those that tunnels are still leaving."""
        self._attempts: set[int] = set()
        self._has_untried = False
        self._opened: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[str] = loop.create_future()
        """Done when the current connection is gone: why."""
        self._left: asyncio.Future[str] = loop.create_future()
        """Done when the gateway wants the current connection to be left."""
        self._last_reason = ""
        self._is_first_dial = True
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    @property
    def round_trip_s(self) -> float:
        """Smoothed round-trip time to the gateway; 0.0 while there is no connection."""
        if self._connection is None:
            return 0.0
        return self._endpoint.engine.round_trip_s(self._connection)

    @property
    def drops(self) -> dict[DropReason, int]:
        """Datagrams not delivered since the start, by reason."""
        for reason, count in self._endpoint.take_drops().items():
            self.tunnels.drops[reason] = self.tunnels.drops.get(reason, 0) + count
        return self.tunnels.drops

    def set_authorization(self, token: str) -> None:
        """Show a newer token from now on; open tunnels go on with it."""
        self.tunnels.set_authorization(token)
        self.streams.set_authorization(token)
        self.flush_soon()

    def flush_soon(self) -> None:
        """Call it after giving ``tunnels`` something to do."""
        self._arm()
        self._driver.flush_soon()

    async def run(self) -> None:
        """Connect, stay connected, move, reconnect; until cancelled."""
        backoff = Backoff(random.random)
        self._set_state(SessionState.CONNECTING)
        try:
            while True:
                try:
                    await self._dial()
                except _DialError as error:
                    await self._pause(str(error), backoff.next_delay_s())
                    continue
                since = time.monotonic()
                await asyncio.wait({self._lost, self._left}, return_when=asyncio.FIRST_COMPLETED)
                delay_s = 0.0
                if time.monotonic() - since >= STABLE_S:
                    backoff.reset()
                else:
                    delay_s = backoff.next_delay_s()
                reason = ""
                if self._lost.done():
                    reason = f"the connection to the gateway was lost: {self._lost.result()}"
                await self._pause(reason, delay_s)
        finally:
            await self._close()

    async def _pause(self, reason: str, delay_s: float) -> None:
        """Between two attempts. A connection that is lost meanwhile cuts the wait short."""
        is_relaying = self._connection is not None
        if not is_relaying:
            self._set_state(SessionState.WAITING)
        if reason:
            self._on_failure(ConnectFailure(reason, delay_s, is_relaying))
        if is_relaying:
            await asyncio.wait({self._lost}, timeout=delay_s)
        else:
            await asyncio.sleep(delay_s)
        if self._connection is None:
            self._set_state(SessionState.CONNECTING)

    async def _dial(self) -> None:
        settings = self._settings
        addresses = await self._resolve()
        before = self._connection
        self._opened = asyncio.get_running_loop().create_future()
        self._last_reason = _NO_ANSWER
        where = f"{settings.host}:{settings.port}"
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                for index, address in enumerate(addresses, start=1):
                    self._has_untried = index < len(addresses)
                    now = time.monotonic()
                    self._attempts.add(self._endpoint.connect(address, settings.server_name, now))
                    self._driver.flush_soon()
                    done, _ = await asyncio.wait({self._opened}, timeout=ATTEMPT_DELAY_S)
                    if done:
                        break
                else:
                    await self._give_up_early(addresses)
                await self._opened
        except TimeoutError:
            if self._last_reason == _NO_ANSWER:
                await self._ask_kernel(addresses)
            if self._connection not in (None, before):
                return  # it came in the very turn in which the time was up
            raise _DialError(f"cannot connect to {where}: {self._last_reason}") from None
        finally:
            self._opened = None
            self._abandon_attempts()

    async def _give_up_early(self, addresses: list[Address]) -> None:
        """Whoever starts a client hears at once that there is no gateway. Later attempts go on for
        their whole time: a gateway that starts again is back before.
        """
        is_first, self._is_first_dial = self._is_first_dial, False
        if not is_first or self._last_reason != _NO_ANSWER:
            return
        await self._ask_kernel(addresses)
        if self._last_reason == _NO_ANSWER or self._opened is None or self._opened.done():
            return
        where = f"{self._settings.host}:{self._settings.port}"
        raise _DialError(f"cannot connect to {where}: {self._last_reason}")

    async def _ask_kernel(self, addresses: list[Address]) -> None:
        """Say so where an ICMP message tells that nothing listens: the kernel passes it on to
        sockets that are connected, which the session's are not.
        """
        answers = await asyncio.gather(*(_is_refused(address) for address in addresses))
        # meanwhile an attempt may have got an answer that says more
        if all(answers) and self._last_reason == _NO_ANSWER:
            self._last_reason = (
                f"nothing listens at UDP port {self._settings.port}: start the gateway (toppy-gw "
                "status there), or mend port"
            )

    def _abandon_attempts(self) -> None:
        attempts, self._attempts = self._attempts, set()
        for connection in attempts:
            self._endpoint.close(connection, H3_NO_ERROR, "", time.monotonic())
        self._driver.flush_soon()

    async def _resolve(self) -> list[Address]:
        settings = self._settings
        try:
            found = await look_up(settings.host, settings.port)
        except NameLookupError as error:
            raise _DialError(f"cannot resolve {settings.host}: {error}") from None
        addresses = reachable(found, self._sockets)
        if not addresses:
            raise _DialError(f"{settings.host} has no address that this host can reach")
        return addresses

    def _pump(self, now: float) -> None:
        for event in self._endpoint.poll_events(now):
            match event:
                case ConnectionOpened(connection=connection):
                    if connection in self._attempts and self._opened is not None:
                        self._receive_opened(connection)
                case ConnectionClosed(connection=connection):
                    why = why_closed(event, has_ca=self._settings.ca_certificates_pem is not None)
                    self._receive_closed(connection, why)
                case _:
                    if event.connection in self._connections:
                        self.tunnels.handle(event, now)
                        self.streams.handle(event)
        for (
            connection,
            quarter_stream_id,
            payloads,
            segment_size,
        ) in self._endpoint.poll_datagrams():
            if connection in self._connections:
                self.tunnels.receive_datagrams(
                    connection, quarter_stream_id, payloads, segment_size, now
                )
        self._close_deserted(now)
        self._arm()

    def _close_deserted(self, now: float) -> None:
        for connection in self.tunnels.take_deserted():
            self._endpoint.close(connection, H3_NO_ERROR, "", now)

    def _arm(self) -> None:
        due = self.tunnels.next_timeout()
        if due is None or (self._timer is not None and self._timer_due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, due - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        self.tunnels.handle_timeout(now)
        self._close_deserted(now)
        self.flush_soon()

    def _receive_opened(self, connection: int) -> None:
        assert self._opened is not None
        if self._opened.done():
            return  # another address was faster; this one is closed with the rest
        if not self._endpoint.may_connect(connection):
            self._last_reason = "it speaks HTTP/3, but takes no MASQUE requests"
            return
        self._attempts.discard(connection)
        self._connection = connection
        self._connections.add(connection)
        loop = asyncio.get_running_loop()
        self._lost = loop.create_future()
        self._left = loop.create_future()
        self._opened.set_result(None)
        self.tunnels.connected(connection)
        self.streams.connected()
        self._set_state(SessionState.CONNECTED)

    def _leave(self) -> None:
        if not self._left.done():
            self._left.set_result("")

    def _receive_closed(self, connection: int, reason: str) -> None:
        if connection in self._attempts:
            self._attempts.discard(connection)
            self._last_reason = reason
            if (
                not self._attempts
                and not self._has_untried
                and self._opened is not None
                and not self._opened.done()
            ):
                self._opened.set_exception(
                    _DialError(
                        f"cannot connect to {self._settings.host}:{self._settings.port}: {reason}"
                    )
                )
        if connection in self._connections:
            self._connections.discard(connection)
            if connection == self._connection:
                self._connection = None
                self._lost.set_result(reason or "closed by the gateway")
                if self._opened is not None:  # on the move
                    self._set_state(SessionState.CONNECTING)
            self.tunnels.disconnected(connection)
            self.streams.disconnected(connection)

    def _set_state(self, state: SessionState) -> None:
        self.state = state
        self._on_state(state)

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for connection in self._connections:
            self._endpoint.close(connection, H3_NO_ERROR, "", time.monotonic())
        self._abandon_attempts()
        self._driver.flush_now()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_CLOSE_GRACE_S)
        if self._timer is not None:
            self._timer.cancel()
        self._driver.close()
        for sock in self._sockets:
            sock.close()


class _DialError(Exception):
    """One attempt to reach the gateway failed."""


async def _is_refused(address: Address) -> bool:
    """Whether the address says that nothing listens at its port."""
    own_id, other_id = secrets.token_bytes(PROBE_ID_BYTES), secrets.token_bytes(PROBE_ID_BYTES)
    question = encode_version_probe(MIN_PROBE_BYTES, other_id, own_id)
    try:
        sock = connect_udp(*address, buffer_bytes=_ASKING_BUFFER_BYTES)
    except OSError:
        return False
    try:
        async with asyncio.timeout(_ASKING_S):
            sock.send(question)
            await asyncio.get_running_loop().sock_recv(sock, MIN_PROBE_BYTES)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    finally:
        sock.close()
    return False


def why_closed(event: ConnectionClosed, *, has_ca: bool = True) -> str:
    """Why a connection ended, with what to do about it where that is the configuration.

    ``has_ca``: the configuration names who issues the gateway's certificate.
    """
    if not (has_ca or event.by_peer) and any(each in event.reason for each in _UNKNOWN_ISSUER):
        return f"{event.reason}: set ca_cert_path to the gateway's ca.pem"
    if event.by_peer and event.error_code == CERTIFICATE_REQUIRED:
        return f"{event.reason}: set client_certificate and client_key"
    return event.reason


def make_client_engine(settings: GatewaySettings, alpn_protocol: str, now: float) -> Engine:
    """An engine that dials the gateway. Raises ``ConfigError`` for what it cannot work with."""
    config = EngineConfig(
        is_client=True,
        alpn_protocols=(alpn_protocol,),
        ca_certificates_pem=settings.ca_certificates_pem,
        certificate_chain_pem=settings.certificate_chain_pem,
        private_key_pem=settings.private_key_pem,
        idle_timeout_s=IDLE_TIMEOUT_S,
        keep_alive_s=KEEP_ALIVE_S,
        congestion_control=settings.congestion_control,
        initial_packet_bytes=settings.initial_packet_bytes,
    )
    try:
        return make_engine(settings.engine, config, now=now)
    except ValueError as error:
        text = str(error).replace("ca_certificates_pem", "ca_cert_path: the file", 1)
        raise ConfigError(text, key="ca_cert_path") from None


def reachable(addresses: list[Address], sockets: list[UdpSocket]) -> list[Address]:
    """Those of a family that one of ``sockets`` has; 0.0.0.0, which filtering name servers answer,
    is nobody's.
    """
    families = {sock.is_ipv6 for sock in sockets}
    return [
        address
        for address in addresses
        if (":" in address[0]) in families and address[0] not in ("0.0.0.0", "::")  # noqa: S104
    ]


def open_sockets(buffer_bytes: int) -> list[UdpSocket]:
    """A wildcard socket per address family: they follow route changes, as a roaming host needs."""
    sockets = []
    for host in ("0.0.0.0", "::"):  # noqa: S104  # a client's ephemeral port
        try:
            sock = bind_udp(host, 0, buffer_bytes=buffer_bytes)
        except OSError:
            continue  # this host does not have that family
        sockets.append(UdpSocket(sock))
    return sockets
