"""Small MASQUE clients for tests: one on toppy's own engines, one on plain aioquic (a stranger).

Unlike ``toppy udp`` they show every answer and let a test send what no honest client would.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, H3Event
from aioquic.h3.events import HeadersReceived as H3HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    DatagramFrameReceived,
    QuicEvent,
    StreamReset,
)

from integration.conftest import ENGINES
from integration.processes import Gateway
from tests.quic.stranger import _ShortIds
from toppy.net.quic_driver import QuicDriver
from toppy.net.udp_socket import UdpSocket, bind_udp
from toppy.protocol.udp_tunnel import encode_datagram_capsules, split_payloads
from toppy.quic.choose import make_engine
from toppy.quic.endpoint import (
    H3_ALPN,
    PING_ALPN,
    BodyReceived,
    ConnectionOpened,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    RawStreamReceived,
    StreamAborted,
)
from toppy.quic.engine import ConnectionClosed, EngineConfig
from toppy.wire.capsule import DATAGRAM, CapsuleParser
from toppy.wire.connect_udp import (
    ECHO_PATH_PREFIX,
    FORWARD_PATH_PREFIX,
    request_headers,
)
from toppy.wire.http_datagram import parse_http_datagram
from toppy.wire.proxy_status import ProxyStatus, parse_proxy_status

DEADLINE_S = 15.0
"""For any answer, on a loaded machine."""
CLIENTS = (*ENGINES, "stranger")
T = TypeVar("T")
HeaderList = list[tuple[bytes, bytes]]


def run(scenario: Coroutine[Any, Any, T], deadline_s: float = 60.0) -> T:
    """A scenario to its end; ``TimeoutError`` when it takes longer than ``deadline_s``."""

    async def bounded() -> T:
        async with asyncio.timeout(deadline_s):
            return await scenario

    return asyncio.run(bounded())


class ClosedError(Exception):
    """The tunnel or its connection ended while a test waited for something."""


class NoStreamError(AssertionError):
    """There is no room for one more request now."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and fields of a response."""

    status: int
    fields: dict[str, str]

    @property
    def proxy_status(self) -> ProxyStatus:
        """The gateway's word, which must be there."""
        found = parse_proxy_status(self.fields["proxy-status"])
        assert found is not None
        return found


def connect_udp_path(host: str, port: int | str, *, forward: bool = False) -> str:
    """A path of the default templates."""
    prefix = FORWARD_PATH_PREFIX if forward else ECHO_PATH_PREFIX
    return f"{prefix}{quote(host, safe='')}/{port}/"


class Tunnel:
    """One request, its answer and what came through it."""

    def __init__(self, client: Client, stream_id: int) -> None:
        self.client = client
        self.stream_id = stream_id
        self.payloads: asyncio.Queue[bytes] = asyncio.Queue()
        self.capsules = CapsuleParser(70_000)
        self.capsules_received = 0
        self.has_ended = asyncio.Event()
        """The gateway closed the stream, or the connection is gone."""
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    async def answer(self) -> Answer:
        """The response's header section."""
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.shield(self._answer)

    def send(self, payload: bytes) -> None:
        """One UDP payload, in a DATAGRAM frame where it fits, otherwise in a capsule."""
        self.client.send_payloads(self.stream_id, payload, len(payload))

    def send_many(self, payloads: Sequence[bytes]) -> None:
        """Payloads of one size, as one batch."""
        self.client.send_payloads(self.stream_id, b"".join(payloads), len(payloads[0]))

    def end(self) -> None:
        """Close our side: the tunnel is over."""
        self.client.send_body(self.stream_id, b"", end=True)

    async def receive(self, timeout_s: float = DEADLINE_S) -> bytes:
        """The next payload; ``ClosedError`` when the tunnel ends instead."""
        waiting = asyncio.ensure_future(self.payloads.get())
        ending = asyncio.ensure_future(self.has_ended.wait())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise ClosedError("the tunnel ended")
        finally:
            waiting.cancel()
            ending.cancel()

    async def echo(self, payload: bytes, tries: int = 3) -> None:
        """Send and wait until it is back; like any UDP application, ask again when it is lost."""
        for attempt in range(tries):
            self.send(payload)
            with contextlib.suppress(TimeoutError):
                while await self.receive(DEADLINE_S / tries) != payload:
                    pass  # a late answer to an earlier attempt
                return
            assert attempt < tries
        raise TimeoutError(f"no echo of {len(payload)} bytes after {tries} tries")

    # called by the client

    def received_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        fields = {name.decode(): value.decode() for name, value in headers}
        if not self._answer.done():
            self._answer.set_result(Answer(int(fields.pop(":status")), fields))

    def received_body(self, data: bytes) -> None:
        for capsule in self.capsules.receive(data):
            if capsule.capsule_type == DATAGRAM:
                context_id, payload = parse_http_datagram(capsule.value)
                assert context_id == 0
                self.capsules_received += 1
                self.payloads.put_nowait(bytes(payload))

    def ended(self, reason: str) -> None:
        self.has_ended.set()
        if not self._answer.done():
            self._answer.set_exception(ClosedError(reason))
            self._answer.exception()  # nobody may be waiting for it


class Client(Protocol):
    """What tests do with either client."""

    authority: str
    token: str
    tunnels: dict[int, Tunnel]
    closed: asyncio.Future[str]
    """Done, with the reason, once the connection is gone."""

    def request(self, headers: HeaderList) -> Tunnel: ...
    def send_payloads(self, stream_id: int, payloads: bytes, segment_size: int) -> None: ...
    def send_frame(self, stream_id: int, context_id: int, payload: bytes) -> None:
        """An HTTP Datagram of any context."""
        ...

    def send_body(self, stream_id: int, data: bytes, *, end: bool = False) -> None: ...
    def abort(self, stream_id: int, error_code: int) -> None: ...


def ask(
    client: Client, host: str, port: int | str, *, token: str | None = "", forward: bool = False
) -> Tunnel:
    """Request a tunnel without waiting; ``token`` "" means the good one, None sends none."""
    path = connect_udp_path(host, port, forward=forward)
    credential = client.token if token == "" else token
    return client.request(request_headers(client.authority, path, credential))


async def open_tunnel(client: Client, host: str, port: int, *, forward: bool = False) -> Tunnel:
    """A tunnel that the gateway granted."""
    tunnel = ask(client, host, port, forward=forward)
    answer = await tunnel.answer()
    assert answer.status == 200, answer
    return tunnel


@dataclass
class EngineClient:
    """A client on one of toppy's engines; see ``connected``."""

    address: tuple[str, int]
    token: str
    ca: Path
    engine_name: str
    alpn: str = H3_ALPN
    authority: str = ""
    tunnels: dict[int, Tunnel] = field(default_factory=dict)
    raw: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[str] = loop.create_future()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.raw_ended: asyncio.Queue[int] = asyncio.Queue()
        self.engine = make_engine(
            self.engine_name,
            EngineConfig(
                is_client=True,
                alpn_protocols=(self.alpn,),
                ca_certificates_pem=self.ca.read_bytes(),
                keep_alive_s=2.0,
            ),
            now=time.monotonic(),
        )
        self.endpoint = Endpoint(self.engine, is_client=True)
        host = "::" if ":" in self.address[0] else "0.0.0.0"
        self.socket = UdpSocket(bind_udp(host, 0, buffer_bytes=8 << 20))
        self.driver = QuicDriver(self.endpoint, [self.socket], self._pump)
        self.connection = self.endpoint.connect(self.address, "localhost", time.monotonic())
        self.driver.flush_soon()

    def _pump(self, now: float) -> None:
        for event in self.endpoint.poll_events(now):
            self._handle(event)
        for _, quarter_stream_id, payloads, segment_size in self.endpoint.poll_datagrams():
            tunnel = self.tunnels.get(quarter_stream_id * 4)
            if tunnel is not None:
                for payload in split_payloads(payloads, segment_size):
                    tunnel.payloads.put_nowait(bytes(payload))

    def _handle(self, event: EndpointEvent) -> None:
        match event:
            case ConnectionOpened():
                self.opened.set_result(None)
            case ConnectionClosed(reason=reason):
                self.closed.set_result(reason)
                if not self.opened.done():
                    self.opened.set_exception(ClosedError(reason))
                for tunnel in self.tunnels.values():
                    tunnel.ended(reason)
            case RawStreamReceived(stream_id=stream_id, data=data, ended=ended):
                self.raw[stream_id] = self.raw.get(stream_id, b"") + data
                if ended:
                    self.raw_ended.put_nowait(stream_id)
            case HeadersReceived() | BodyReceived() | StreamAborted():
                if event.stream_id in self.tunnels:
                    self._handle_tunnel(self.tunnels[event.stream_id], event)
            case _:
                pass

    @staticmethod
    def _handle_tunnel(
        tunnel: Tunnel, event: HeadersReceived | BodyReceived | StreamAborted
    ) -> None:
        match event:
            case HeadersReceived(headers=headers):
                tunnel.received_headers(headers)
            case BodyReceived(data=data):
                tunnel.received_body(data)
            case StreamAborted(error_code=code):
                tunnel.ended(f"stream aborted with {code:#x}")
                return
        if event.ended:
            tunnel.ended("the response ended")

    def request(self, headers: HeaderList) -> Tunnel:
        stream_id = self.endpoint.send_request(self.connection, headers)
        if stream_id is None:
            raise NoStreamError("the gateway allows no more streams")
        tunnel = self.tunnels[stream_id] = Tunnel(self, stream_id)
        if self.closed.done():
            tunnel.ended(self.closed.result())
        self.driver.flush_soon()
        return tunnel

    def send_payloads(self, stream_id: int, payloads: bytes, segment_size: int) -> None:
        quarter = stream_id // 4
        if segment_size <= self.engine.max_payload_bytes(self.connection, quarter):
            self.engine.send_datagrams(self.connection, quarter, payloads, segment_size)
            self.driver.flush_soon()
        else:
            self.send_body(stream_id, encode_datagram_capsules(payloads, segment_size))

    def send_frame(self, stream_id: int, context_id: int, payload: bytes) -> None:
        raise NotImplementedError("toppy's engines send context ID 0 only; use the stranger")

    def send_body(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.endpoint.send_body(self.connection, stream_id, data, end=end)
        self.driver.flush_soon()

    def abort(self, stream_id: int, error_code: int) -> None:
        self.endpoint.abort_stream(self.connection, stream_id, error_code)
        self.driver.flush_soon()

    def close(self) -> None:
        """Say goodbye and let go of the socket."""
        self.endpoint.close(self.connection, 0x100, "", time.monotonic())
        self.driver.flush_now()
        self.driver.close()
        self.socket.close()


class _DatagramH3(H3Connection):
    """aioquic announces HTTP Datagrams only together with WebTransport."""

    def _get_local_settings(self) -> dict[int, int]:
        return {**super()._get_local_settings(), 0x33: 1}


class Stranger(QuicConnectionProtocol):
    """RFC 9298 as anybody would write it with aioquic alone."""

    authority: str
    token: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.http = _DatagramH3(self._quic)
        self.tunnels: dict[int, Tunnel] = {}
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[str] = loop.create_future()

    def quic_event_received(self, event: QuicEvent) -> None:
        match event:
            case ConnectionTerminated():
                self.closed.set_result(event.reason_phrase)
                for tunnel in self.tunnels.values():
                    tunnel.ended(event.reason_phrase)
            case StreamReset():
                if event.stream_id in self.tunnels:
                    self.tunnels[event.stream_id].ended(
                        f"stream aborted with {event.error_code:#x}"
                    )
            case DatagramFrameReceived():
                self._receive_frame(event.data)
                return
        happened: list[H3Event] = self.http.handle_event(event)
        if self.http.received_settings is not None and not self.opened.done():
            self.opened.set_result(None)
        for item in happened:
            if isinstance(item, H3HeadersReceived | DataReceived):
                self._receive_http(item)

    def _receive_frame(self, data: bytes) -> None:
        quarter_stream_id, rest = parse_http_datagram(data)
        context_id, payload = parse_http_datagram(bytes(rest))
        tunnel = self.tunnels.get(quarter_stream_id * 4)
        if tunnel is not None and context_id == 0:
            tunnel.payloads.put_nowait(bytes(payload))

    def _receive_http(self, item: H3HeadersReceived | DataReceived) -> None:
        tunnel = self.tunnels.get(item.stream_id)
        if tunnel is None:
            return
        if isinstance(item, H3HeadersReceived):
            tunnel.received_headers(item.headers)
        else:
            tunnel.received_body(item.data)
        if item.stream_ended:
            tunnel.ended("the response ended")

    def request(self, headers: HeaderList, *, end: bool = False) -> Tunnel:
        stream_id = self._quic.get_next_available_stream_id()
        tunnel = self.tunnels[stream_id] = Tunnel(self, stream_id)
        self.http.send_headers(stream_id, headers, end)
        self.transmit()
        return tunnel

    def send_payloads(self, stream_id: int, payloads: bytes, segment_size: int) -> None:
        for payload in split_payloads(payloads, segment_size):
            # a frame that fits no packet would block aioquic's queue for good (1,200 B packets)
            if len(payload) <= 1150:
                self.send_frame(stream_id, 0, bytes(payload))
            else:
                self.send_body(stream_id, encode_datagram_capsules(payload, len(payload)))

    def send_frame(self, stream_id: int, context_id: int, payload: bytes) -> None:
        head = encode_uint_var(stream_id // 4) + encode_uint_var(context_id)
        self._quic.send_datagram_frame(head + payload)
        self.transmit()

    def send_body(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.http.send_data(stream_id, data, end)
        self.transmit()

    def abort(self, stream_id: int, error_code: int) -> None:
        self._quic.reset_stream(stream_id, error_code)
        self.transmit()

    @property
    def may_open_stream(self) -> bool:
        """Whether the gateway allows one more; aioquic would open it all the same."""
        opened: int = self._quic._local_next_stream_id_bidi // 4
        return opened < self._quic._remote_max_streams_bidi

    def send_raw(
        self, data: bytes, *, is_unidirectional: bool = False, end: bool = False
    ) -> Tunnel:
        """Any bytes on a new stream, HTTP/3 or not."""
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional)
        tunnel = self.tunnels[stream_id] = Tunnel(self, stream_id)
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()
        return tunnel


@contextlib.asynccontextmanager
async def connected_engine(
    gateway: Gateway,
    engine: str = "auto",
    *,
    alpn: str = H3_ALPN,
    address: tuple[str, int] | None = None,
) -> AsyncIterator[EngineClient]:
    """A client on one of toppy's engines, with the gateway's SETTINGS in hand.

    ``address`` is where to send instead of the gateway's own: a NAT in between.
    """
    client = EngineClient(
        address or (gateway.host, gateway.port),
        gateway.token,
        gateway.directory / "ca.pem",
        engine,
        alpn,
        authority=f"localhost:{gateway.port}",
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            await client.opened
        yield client
    finally:
        client.close()


@contextlib.asynccontextmanager
async def connected_stranger(
    gateway: Gateway, *, address: tuple[str, int] | None = None, **settings: Any
) -> AsyncIterator[Stranger]:
    """A plain aioquic client; ``settings`` are aioquic's."""
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=[H3_ALPN],
        server_name="localhost",
        max_datagram_frame_size=65535,
    )
    for name, value in settings.items():
        assert hasattr(configuration, name)
        setattr(configuration, name, value)
    configuration.load_verify_locations(str(gateway.directory / "ca.pem"))
    peer = address or (gateway.host, gateway.port)
    make = QuicConnection if configuration.connection_id_length >= 8 else _ShortIds
    quic = make(configuration=configuration)
    local = "::1" if ":" in peer[0] else "127.0.0.1"
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Stranger(quic), sock=bind_udp(local, 0, buffer_bytes=8 << 20)
    )
    protocol.authority = f"localhost:{gateway.port}"
    protocol.token = gateway.token
    try:
        # aioquic compares whole socket addresses
        protocol.connect((*peer, 0, 0) if ":" in peer[0] else peer)
        async with asyncio.timeout(DEADLINE_S):
            await protocol.opened
        yield protocol
    finally:
        protocol.close()
        await asyncio.sleep(0)
        transport.close()


@contextlib.asynccontextmanager
async def connected(
    gateway: Gateway, kind: str = "auto", *, address: tuple[str, int] | None = None
) -> AsyncIterator[Client]:
    """A client of one of the ``CLIENTS``, or on the best engine that there is."""
    if kind == "stranger":
        async with connected_stranger(gateway, address=address) as stranger:
            yield stranger
    else:
        async with connected_engine(gateway, kind, address=address) as client:
            yield client


async def ping(gateway: Gateway, said: bytes, engine: str = "auto") -> bytes:
    """One QUIC ping (ALPN ``toppy-ping``): what the gateway answered."""
    async with connected_engine(gateway, engine, alpn=PING_ALPN) as client:
        stream_id = client.engine.open_stream(client.connection)
        assert stream_id is not None
        client.engine.send_stream(client.connection, stream_id, said, end=True)
        client.driver.flush_soon()
        async with asyncio.timeout(DEADLINE_S):
            ended = await client.raw_ended.get()
        return client.raw[ended]
