"""The client's TCP tunnels: one request stream each, on the newest connection to the gateway.

TCP cannot move to another connection: what is open stays where it is until it ends; new ones go to
where the gateway sends its clients. No sockets and no clock here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from toppy.client.tunnel import Refusal
from toppy.client.tunnels import NO_CAPSULES, Tunnels
from toppy.errors import PeerError
from toppy.model.target import Target
from toppy.net.stream_relay import StreamRelay
from toppy.protocol.stream_tunnel import RESET_CODE, StreamTunnel
from toppy.quic.endpoint import (
    BodyReceived,
    Endpoint,
    EndpointEvent,
    HeadersReceived,
    StreamAborted,
)
from toppy.quic.engine import READ_TURN_BYTES, StreamsAvailable, StreamWritable
from toppy.quic.h3 import H3_REQUEST_CANCELLED, H3_REQUEST_REJECTED
from toppy.wire.capsule import RENEWAL_FIELD, encode_authorization
from toppy.wire.connect_tcp import StreamFraming, request_headers
from toppy.wire.connect_udp import expand_template
from toppy.wire.proxy_status import explain, parse_proxy_status, recommended_status

_HOLD_BYTES: Final = 2 * READ_TURN_BYTES
"""What comes between the answer and the local side's being ready: the stream is paused then."""


class TunnelUser(Protocol):
    """Who asked for a tunnel."""

    def opened(self) -> None:
        """The gateway said yes; ``TcpTunnel.relay`` may begin."""
        ...

    def refused(self, refusal: Refusal) -> None:
        """The gateway said no, or it ended before the tunnel was open."""
        ...

    def over(self, reason: str, *, in_order: bool) -> None:
        """It was open, and has ended."""
        ...

    def moved(self, to_socket: int, to_stream: int) -> None:
        """So many bytes of payload were handed on."""
        ...


class TcpTunnel:
    """One local connection's way to a target."""

    __slots__ = (
        "_tunnels",
        "authorization",
        "is_open",
        "relay",
        "takes_renewal",
        "target",
        "user",
    )

    def __init__(self, tunnels: TcpTunnels, target: Target, user: TunnelUser) -> None:
        self._tunnels = tunnels
        self.target = target
        self.user = user
        self.relay: StreamRelay | None = None
        """Once it was asked for."""
        self.is_open = False
        """The gateway said yes."""
        self.takes_renewal = False
        self.authorization: str | None = None
        """The token that the gateway has for it."""

    def moved(self, to_socket: int, to_stream: int) -> None:
        """See ``RelayOwner``."""
        self.user.moved(to_socket, to_stream)

    def over(self, reason: str, *, in_order: bool) -> None:
        """See ``RelayOwner``: the local side has broken off, or both have ended."""
        self._tunnels.finish(self, reason, in_order=in_order)

    def flush(self) -> None:
        """See ``RelayOwner``."""
        self._tunnels.flush()

    def close(self) -> None:
        """Give it up; nothing is called back."""
        self._tunnels.remove(self)


class TcpTunnels:
    """All TCP tunnels of one client. ``udp`` knows which connection takes requests."""

    def __init__(
        self,
        endpoint: Endpoint,
        udp: Tunnels,
        *,
        template: str,
        authorization: str | None,
        flush: Callable[[], None],
    ) -> None:
        self._endpoint = endpoint
        self._udp = udp
        self._template = template
        self._authorization = authorization
        self.flush = flush
        self._waiting: deque[TcpTunnel] = deque()
        """For a connection, or for a free stream on it."""
        self._asked: dict[tuple[int, int], TcpTunnel] = {}

    def __len__(self) -> int:
        """How many there are, those that wait included."""
        return len(self._waiting) + len(self._asked)

    def open(self, target: Target, user: TunnelUser) -> TcpTunnel:
        """Ask for a tunnel now, or as soon as there is a connection."""
        tunnel = TcpTunnel(self, target, user)
        self._waiting.append(tunnel)
        self.retry_waiting()
        return tunnel

    def remove(self, tunnel: TcpTunnel) -> None:
        """Give a tunnel up; nothing is called back."""
        if tunnel in self._waiting:
            self._waiting.remove(tunnel)
        relay = tunnel.relay
        if relay is not None and self._forget(tunnel):
            self._endpoint.abort_stream(relay.connection, relay.stream_id, RESET_CODE)
            self.flush()

    def set_authorization(self, token: str) -> None:
        """Use a newer token from now on, for open tunnels too."""
        self._authorization = token
        for tunnel in self._asked.values():
            self._renew(tunnel)

    def connected(self) -> None:
        """There is a connection, maybe a newer one."""
        self.retry_waiting()

    def disconnected(self, connection: int) -> None:
        """A connection is gone. What was open on it has broken; what was not is asked for again."""
        for tunnel in [each for (there, _), each in self._asked.items() if there == connection]:
            if tunnel.is_open:
                self.finish(tunnel, "the connection to the gateway was lost", in_order=False)
            else:
                self._ask_again(tunnel)

    def retry_waiting(self) -> None:
        """Ask for what waits, in order, as far as there are streams."""
        while self._waiting and self._ask(self._waiting[0]):
            self._waiting.popleft()

    def _ask(self, tunnel: TcpTunnel) -> bool:
        connection = self._udp.connection
        if connection is None:
            return False
        authority, path = expand_template(self._template, tunnel.target)
        headers = request_headers(authority, path, self._authorization)
        stream_id = self._endpoint.send_request(connection, headers)
        if stream_id is None:
            return False
        tunnel.authorization = self._authorization
        protocol = StreamTunnel(StreamFraming.CAPSULES, is_client=True, hold_bytes=_HOLD_BYTES)
        tunnel.relay = StreamRelay(self._endpoint, connection, stream_id, protocol, tunnel)
        self._asked[connection, stream_id] = tunnel
        self._udp.keep(connection)
        return True

    def _ask_again(self, tunnel: TcpTunnel) -> None:
        """Nothing was said about it where it was asked for."""
        self._forget(tunnel)
        self._waiting.append(tunnel)
        self.retry_waiting()

    def handle(self, event: EndpointEvent) -> None:
        """An event of one of the connections; others' are left alone."""
        match event:
            case HeadersReceived(connection=connection, stream_id=stream_id):
                tunnel = self._asked.get((connection, stream_id))
                if tunnel is not None and tunnel.is_open:  # trailers: there are none
                    self._break(tunnel, RESET_CODE, "the gateway broke the protocol")
                elif tunnel is not None:
                    self._receive_response(tunnel, event)
            case BodyReceived(connection=connection, stream_id=stream_id):
                tunnel = self._asked.get((connection, stream_id))
                if tunnel is not None and tunnel.relay is not None:
                    self._receive_body(tunnel, tunnel.relay, event)
            case StreamAborted(connection=connection, stream_id=stream_id):
                tunnel = self._asked.get((connection, stream_id))
                if tunnel is not None and tunnel.relay is not None:
                    self._receive_abort(tunnel, tunnel.relay, event)
            case StreamWritable(connection=connection, stream_id=stream_id):
                tunnel = self._asked.get((connection, stream_id))
                if tunnel is not None and tunnel.relay is not None:
                    tunnel.relay.receive_writable()
            case StreamsAvailable():
                self.retry_waiting()
            case _:
                pass

    def _receive_response(self, tunnel: TcpTunnel, event: HeadersReceived) -> None:
        connection, stream_id = event.connection, event.stream_id
        headers = dict(event.headers)
        status = int(headers[b":status"])
        if 200 <= status < 300 and status not in NO_CAPSULES and not event.ended:
            tunnel.is_open = True
            tunnel.takes_renewal = headers.get(RENEWAL_FIELD[0]) == RENEWAL_FIELD[1]
            self._renew(tunnel)
            # until the local side takes it
            self._endpoint.pause_reading(connection, stream_id)
            tunnel.user.opened()
            return
        self._endpoint.abort_stream(connection, stream_id, H3_REQUEST_CANCELLED)
        self._forget(tunnel)
        field = headers.get(b"proxy-status")
        text = field.decode("ascii", "replace") if field else ""
        said = parse_proxy_status(text) if text else None
        tunnel.user.refused(Refusal(status, explain(status, said), text))

    def _receive_body(self, tunnel: TcpTunnel, relay: StreamRelay, event: BodyReceived) -> None:
        protocol = relay.protocol
        try:
            relay.receive_body(event)
        except PeerError as error:
            self._break(tunnel, error.h3_error_code, _why(protocol) or str(error))
            return
        if protocol.is_wrapping_up:
            self._udp.leave(relay.connection)
        if protocol.closed_because is not None:
            self._break(tunnel, RESET_CODE, _why(protocol))

    def _receive_abort(self, tunnel: TcpTunnel, relay: StreamRelay, event: StreamAborted) -> None:
        if event.error_code == H3_REQUEST_REJECTED and not tunnel.is_open:
            self._udp.leave(relay.connection)
            self._ask_again(tunnel)
        elif relay.is_over_with(event):
            self._break(tunnel, RESET_CODE, "the target or the gateway broke it off")

    def _renew(self, tunnel: TcpTunnel) -> None:
        token, relay = self._authorization, tunnel.relay
        if relay is None or token is None or not tunnel.takes_renewal:
            return
        if tunnel.authorization != token:
            tunnel.authorization = token
            capsule = encode_authorization(token)
            self._endpoint.send_body(relay.connection, relay.stream_id, capsule)

    def _break(self, tunnel: TcpTunnel, error_code: int, reason: str) -> None:
        relay = tunnel.relay
        assert relay is not None
        self._endpoint.abort_stream(relay.connection, relay.stream_id, error_code)
        if tunnel.is_open:
            self.finish(tunnel, reason, in_order=False)
        else:
            self._forget(tunnel)
            tunnel.user.refused(Refusal(502, reason))

    def finish(self, tunnel: TcpTunnel, reason: str, *, in_order: bool) -> None:
        """It was open, and is no more."""
        if self._forget(tunnel):
            tunnel.user.over(reason, in_order=in_order)

    def _forget(self, tunnel: TcpTunnel) -> bool:
        """Whether it was still there."""
        relay = tunnel.relay
        assert relay is not None
        if self._asked.pop((relay.connection, relay.stream_id), None) is None:
            return False
        relay.release()
        self._udp.unkeep(relay.connection)
        self.retry_waiting()
        return True


def _why(protocol: StreamTunnel) -> str:
    """What the gateway said when it ended a tunnel; empty: nothing."""
    if protocol.closed_because is None:
        return ""
    said = parse_proxy_status(protocol.closed_because)
    return explain(recommended_status(said.error if said is not None else ""), said)
