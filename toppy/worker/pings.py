"""``toppy-ping``: a client asks whether the gateway is there and takes its token (T-064)."""

from __future__ import annotations

from toppy.model.counters import WorkerCounters
from toppy.quic.endpoint import Endpoint, RawStreamReceived
from toppy.quic.h3 import H3_EXCESSIVE_LOAD
from toppy.wire.ipc_message import TokenRequest
from toppy.worker.guesses import Guesses
from toppy.worker.questions import Questions
from toppy.worker.tunnel import Peer, Ping

_PING_BYTES = 8192 + 5
_PINGS_AT_ONCE = 8
"""Of one connection, that the control plane has not answered yet."""


class Pings:
    """Answers pings; ``peers`` are the router's own."""

    def __init__(
        self,
        endpoint: Endpoint,
        questions: Questions,
        guesses: Guesses,
        counters: WorkerCounters,
        peers: dict[int, Peer],
    ) -> None:
        self._endpoint = endpoint
        self._questions = questions
        self._guesses = guesses
        self._counters = counters
        self._peers = peers

    def receive(self, event: RawStreamReceived, now: float) -> bool:
        """Bytes of a ping; False when it is refused unasked, which is a failed authentication."""
        peer = self._peers.get(event.connection)
        if peer is None or peer.pings is None:
            return True
        said = peer.pings.pop(event.stream_id, b"") + event.data
        if len(said) > _PING_BYTES:
            self._endpoint.close(event.connection, H3_EXCESSIVE_LOAD, "the ping is too long", now)
            return True
        if not event.ended:
            peer.pings[event.stream_id] = said
            return True
        self._counters.pings += 1
        word, _, token = said.decode("utf-8", "replace").strip().partition(" ")
        source = self._endpoint.engine.peer_address(event.connection)
        request = TokenRequest(
            request=self._questions.next_number,
            authorization=token.strip() or None,
            source=source[0] if source is not None else "",
            certificate=peer.certificate,
        )
        if (
            word != "ping"
            or self._guesses.denial(request, now) is not None
            or peer.pings_asked >= _PINGS_AT_ONCE
            or not self._questions.ask(Ping(event.connection, event.stream_id, request))
        ):
            self._answer(event.connection, event.stream_id, is_valid=False)
            return False
        peer.pings_asked += 1
        return True

    def receive_answer(self, asked: Ping, *, is_valid: bool) -> None:
        """The control plane's word about its token."""
        peer = self._peers.get(asked.connection)
        if peer is not None:
            peer.pings_asked -= 1
        self._answer(asked.connection, asked.stream_id, is_valid=is_valid)

    def _answer(self, connection: int, stream_id: int, *, is_valid: bool) -> None:
        answer = b"pong" if is_valid else b"unauthorized"
        self._endpoint.engine.send_stream(connection, stream_id, answer, end=True)
