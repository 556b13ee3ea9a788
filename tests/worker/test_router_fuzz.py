"""Whatever clients, targets and the control plane do, in whatever order, the router stays whole."""

from __future__ import annotations

import pytest
from aioquic.h3.connection import HeadersState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.worker.bench import DENIAL, ECHO, GRANT, UNIX_NOW, Bench
from toppy.model.grant import Denial, Grant
from toppy.wire.capsule import DATAGRAM, encode_capsule
from toppy.wire.ipc_message import Admitted

PATHS = (
    "/.well-known/masque/udp/dns.example/53/",
    "/.well-known/masque/udp/localhost/9/",
    "/.well-known/masque/udp/dns.example/0/",
    "/elsewhere",
)
DECISIONS: tuple[Grant | Denial | None, ...] = (
    GRANT,
    ECHO,
    DENIAL,
    Grant(("192.0.2.1",), 53, "token", "short", 1, expires_at=UNIX_NOW + 1),
    None,
)
BODIES = (
    encode_capsule(DATAGRAM, b"\x00payload"),
    encode_capsule(DATAGRAM, b"\x02of another context"),
    encode_capsule(DATAGRAM, bytes(3000)),
    encode_capsule(0x77, bytes(50)),
    encode_capsule(DATAGRAM, b"\x00cut off")[:-3],
    b"\x00\xff\xff\xff\xff\xff\xff\xff\xff",
    b"",
)
STREAMS = st.integers(0, 7)
STEPS = st.one_of(
    st.tuples(st.just("request"), st.sampled_from(PATHS)),
    st.tuples(st.just("body"), STREAMS, st.sampled_from(BODIES), st.booleans()),
    st.tuples(st.just("datagram"), STREAMS, st.integers(0, 1500)),
    st.tuples(st.just("trailers"), STREAMS, st.booleans()),
    st.tuples(st.just("abort"), STREAMS),
    st.tuples(st.just("raw"), st.binary(max_size=40), st.booleans()),
    st.tuples(st.just("answer"), STREAMS, st.sampled_from(DECISIONS)),
    st.tuples(st.just("target"), STREAMS, st.integers(0, 5000)),
    st.tuples(st.just("wait"), st.sampled_from((0.0, 2.0, 11.0))),
    st.tuples(st.just("settle"), st.sampled_from((0.0, 0.05))),
)


def take(bench: Bench, step: tuple[object, ...]) -> None:
    """One step; most do nothing when there is no such stream, question or target."""
    client, endpoint = bench.client, bench.client.endpoint
    match step:
        case ("request", str(path)):
            if client.closed is None:
                bench.request(path)
        case ("body", int(number), bytes(data), bool(end)):
            if _is_sendable(bench, number * 4):
                endpoint.send_body(client.connection, number * 4, data, end=end)
        case ("datagram", int(number), int(size)):
            client.engine.send_datagrams(client.connection, number, bytes(size), size)
        case ("trailers", int(number), bool(end)):
            if _is_sendable(bench, number * 4):
                endpoint.send_headers(client.connection, number * 4, [(b"x", b"y")], end=end)
        case ("abort", int(number)):
            endpoint.abort_stream(client.connection, number * 4, 0x10C)
        case ("raw", bytes(data), bool(end)):
            stream_id = client.engine.open_stream(client.connection)
            if stream_id is not None:
                client.engine.send_stream(client.connection, stream_id, data, end=end)
        case ("answer", int(number), decision):
            if number < len(bench.shell.asked):
                bench.router.receive_answer(
                    Admitted(
                        bench.shell.asked[number].request,
                        decision if isinstance(decision, Grant) else None,
                        decision if isinstance(decision, Denial) else None,
                    ),
                    bench.link.now,
                )
        case ("target", int(number), int(size)):
            targets = [target for target in bench.shell.targets if not target.is_closed]
            if number < len(targets):
                bench.router.receive_from_target(
                    targets[number].tunnel, bytes(size), size, bench.link.now
                )
        case ("wait", float(duration_s)):
            bench.wait(duration_s)
        case ("settle", float(duration_s)):
            bench.settle(duration_s)


def _is_sendable(bench: Bench, stream_id: int) -> bool:
    """Whether the client may send on a stream; if so, it may send anything, rules or not."""
    session = bench.client.endpoint._sessions.get(bench.client.connection)
    if session is None or not session._is_sendable(stream_id):
        return False
    session._h3._stream[stream_id].headers_send_state = HeadersState.AFTER_HEADERS
    return True


@pytest.mark.parametrize("engine", ["native", "aioquic"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=40))
def test_no_order_of_things_breaks_the_router(engine: str, steps: list[tuple[object, ...]]) -> None:
    bench = Bench(engine)
    for step in steps:
        take(bench, step)
        counters = bench.router.snapshot()
        assert counters.tunnels_open == bench.router.tunnels <= 3
        assert counters.tunnels_total == counters.admissions.get("granted", 0)
        still_open = [target for target in bench.shell.targets if not target.is_closed]
        assert len(still_open) <= counters.tunnels_open
    bench.client.endpoint.close(bench.client.connection, 0x100, "", bench.link.now)
    bench.settle()
    bench.wait(30.0)
    assert bench.router.tunnels == 0
    assert all(target.is_closed for target in bench.shell.targets)
    assert bench.router.snapshot().connections_open == 0
    assert not bench.router._questions
    assert not bench.router._peers
