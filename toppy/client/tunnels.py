"""The client's tunnels on its one connection to the gateway: re-opened when the connection is new.

No sockets and no clock here; the session gives it endpoint events and it calls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toppy.errors import PeerError
from toppy.model.drop_reason import DropReason
from toppy.model.target import Target
from toppy.protocol.udp_tunnel import (
    Buffer,
    UdpTunnel,
    count_payloads,
    encode_datagram_capsules,
)
from toppy.quic.endpoint import (
    BodyReceived,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.h3 import H3_CONNECT_ERROR, H3_REQUEST_CANCELLED
from toppy.wire.connect_udp import expand_template, request_headers
from toppy.wire.proxy_status import explain, parse_proxy_status

HOLD_DATAGRAMS = 256
"""Payloads that wait per tunnel until the gateway has answered, or is back."""
HOLD_BYTES = 1 << 20
_CAPSULE_QUEUE_BYTES = 1 << 20
_NO_CAPSULES = (204, 205, 206)
"""With the Capsule Protocol these are malformed (RFC 9297 section 3.2)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The gateway said no."""

    status: int
    explanation: str
    """A plain sentence: what, which rule, what to do next."""


class ClientTunnel:
    """One local peer's way to a target. Survives reconnects."""

    __slots__ = (
        "datagrams_from_gateway",
        "datagrams_to_gateway",
        "deliver",
        "ended",
        "protocol",
        "stream_id",
        "target",
    )

    def __init__(
        self,
        target: Target,
        deliver: Callable[[Buffer, int], None],
        ended: Callable[[Refusal | None], None],
    ) -> None:
        self.target = target
        self.deliver = deliver
        self.ended = ended
        self.stream_id: int | None = None
        self.protocol = UdpTunnel(hold_datagrams=HOLD_DATAGRAMS, hold_bytes=HOLD_BYTES)
        self.datagrams_to_gateway = 0
        self.datagrams_from_gateway = 0


class Tunnels:
    """All tunnels of one client.

    ``deliver(payloads, segment_size)`` of a tunnel is called with what its target sent; ``ended``
    once, with the refusal, or None when an open tunnel was ended by the gateway.
    """

    def __init__(self, endpoint: Endpoint, *, template: str, authorization: str | None) -> None:
        self._endpoint = endpoint
        self._engine = endpoint.engine
        self._template = template
        self._authorization = authorization
        self._connection: int | None = None
        self._tunnels: list[ClientTunnel] = []
        self._by_stream: dict[int, ClientTunnel] = {}
        self._capsules_only = False
        self.drops: dict[DropReason, int] = {}

    def add(self, tunnel: ClientTunnel) -> None:
        """Open ``tunnel`` now, or as soon as there is a connection."""
        self._tunnels.append(tunnel)
        self._request(tunnel)

    def remove(self, tunnel: ClientTunnel) -> None:
        """Close ``tunnel``; nothing is called back."""
        if tunnel not in self._tunnels:
            return
        self._forget(tunnel)
        if tunnel.stream_id is not None and self._connection is not None:
            if tunnel.protocol.is_open:
                self._endpoint.send_body(self._connection, tunnel.stream_id, b"", end=True)
            else:
                self._endpoint.abort_stream(
                    self._connection, tunnel.stream_id, H3_REQUEST_CANCELLED
                )
        self.retry_waiting()

    def connected(self, connection: int) -> None:
        """A connection is ready: ask for every tunnel on it."""
        self._connection = connection
        self._capsules_only = not self._endpoint.may_send_datagrams(connection)
        self.retry_waiting()

    def disconnected(self) -> None:
        """The connection is gone: tunnels wait for the next one, and hold what they are given."""
        self._connection = None
        self._by_stream.clear()
        for tunnel in self._tunnels:
            tunnel.stream_id = None
            if tunnel.protocol.is_open:
                tunnel.protocol = UdpTunnel(hold_datagrams=HOLD_DATAGRAMS, hold_bytes=HOLD_BYTES)

    def send(self, tunnel: ClientTunnel, payloads: Buffer, segment_size: int) -> None:
        """Payloads of the local peer, on their way to the target."""
        if not tunnel.protocol.is_open:
            dropped = tunnel.protocol.hold(payloads, segment_size)
            self._drop(DropReason.NO_CONNECTION, dropped)
            return
        connection, stream_id = self._connection, tunnel.stream_id
        assert connection is not None
        assert stream_id is not None
        count = count_payloads(len(payloads), segment_size)
        largest = segment_size or len(payloads)
        if not self._capsules_only and largest <= self._engine.max_payload_bytes(
            connection, stream_id // 4
        ):
            self._engine.send_datagrams(connection, stream_id // 4, payloads, segment_size)
        else:
            backlog = self._engine.stream_backlog_bytes(connection, stream_id)
            if backlog + len(payloads) > _CAPSULE_QUEUE_BYTES:
                self._drop(DropReason.CAPSULE_QUEUE_FULL, count)
                return
            capsules = encode_datagram_capsules(payloads, segment_size)
            self._endpoint.send_body(connection, stream_id, capsules)
        tunnel.datagrams_to_gateway += count

    def handle(self, event: EndpointEvent) -> None:
        """An event of the current connection."""
        match event:
            case HeadersReceived():
                tunnel = self._by_stream.get(event.stream_id)
                if tunnel is not None and tunnel.protocol.is_open:  # trailers: there are none
                    self._endpoint.abort_stream(event.connection, event.stream_id, H3_CONNECT_ERROR)
                    self._end(tunnel, None)
                elif tunnel is not None:
                    self._receive_response(tunnel, event)
            case BodyReceived():
                tunnel = self._by_stream.get(event.stream_id)
                if tunnel is not None:
                    self._receive_body(tunnel, event)
            case StreamAborted(stream_id=stream_id, connection=connection):
                tunnel = self._by_stream.get(stream_id)
                if tunnel is not None:
                    self._endpoint.abort_stream(connection, stream_id, H3_REQUEST_CANCELLED)
                    self._end(tunnel, None)
            case _:
                pass

    def receive_datagrams(self, quarter_stream_id: int, payloads: bytes, segment_size: int) -> None:
        """Payloads that arrived in DATAGRAM frames of the current connection."""
        tunnel = self._by_stream.get(quarter_stream_id * 4)
        count = count_payloads(len(payloads), segment_size)
        if tunnel is None:
            self._drop(DropReason.UNKNOWN_STREAM, count)
            return
        tunnel.datagrams_from_gateway += count
        tunnel.deliver(payloads, segment_size)

    def _request(self, tunnel: ClientTunnel) -> None:
        if self._connection is None:
            return
        authority, path = expand_template(self._template, tunnel.target)
        headers = request_headers(authority, path, self._authorization)
        stream_id = self._endpoint.send_request(self._connection, headers)
        if stream_id is not None:  # otherwise it waits until another tunnel ends
            tunnel.stream_id = stream_id
            self._by_stream[stream_id] = tunnel

    def retry_waiting(self) -> None:
        """Ask for tunnels that found no free stream; call it now and then."""
        for tunnel in self._tunnels:
            if tunnel.stream_id is None:
                self._request(tunnel)

    def _receive_response(self, tunnel: ClientTunnel, event: HeadersReceived) -> None:
        headers = dict(event.headers)
        status = int(headers[b":status"])
        if 200 <= status < 300 and status not in _NO_CAPSULES and not event.ended:
            for payloads, segment_size in tunnel.protocol.open():
                self.send(tunnel, payloads, segment_size)
            return
        proxy_status = headers.get(b"proxy-status")
        said = parse_proxy_status(proxy_status.decode("ascii", "replace")) if proxy_status else None
        if event.ended:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
        else:
            self._endpoint.abort_stream(event.connection, event.stream_id, H3_REQUEST_CANCELLED)
        self._end(tunnel, Refusal(status, explain(status, said)))

    def _receive_body(self, tunnel: ClientTunnel, event: BodyReceived) -> None:
        unknown_before = tunnel.protocol.unknown_contexts
        try:
            payloads = tunnel.protocol.receive_body(event.data, ended=event.ended)
        except PeerError as error:
            self._endpoint.abort_stream(event.connection, event.stream_id, error.h3_error_code)
            self._end(tunnel, None)
            return
        self._drop(DropReason.UNKNOWN_CONTEXT, tunnel.protocol.unknown_contexts - unknown_before)
        for payload in payloads:
            tunnel.datagrams_from_gateway += 1
            tunnel.deliver(payload, len(payload))
        if event.ended:
            self._endpoint.send_body(event.connection, event.stream_id, b"", end=True)
            self._end(tunnel, None)

    def _end(self, tunnel: ClientTunnel, refusal: Refusal | None) -> None:
        for payloads, segment_size in tunnel.protocol.discard_held():
            self._drop(DropReason.TUNNEL_REFUSED, count_payloads(len(payloads), segment_size))
        self._forget(tunnel)
        tunnel.ended(refusal)
        self.retry_waiting()

    def _forget(self, tunnel: ClientTunnel) -> None:
        self._tunnels.remove(tunnel)
        if tunnel.stream_id is not None:
            self._by_stream.pop(tunnel.stream_id, None)

    def _drop(self, reason: DropReason, count: int) -> None:
        if count:
            self.drops[reason] = self.drops.get(reason, 0) + count
