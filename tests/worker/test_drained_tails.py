"""A drained worker closes no connection on which the end of a finished tunnel is under way."""

from __future__ import annotations

import pytest

from tests.worker.bench import LIMITS, Bench
from tests.worker.test_tcp_relay import TcpBench
from toppy.quic.endpoint import BodyReceived
from toppy.wire.connect_tcp import StreamFraming


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def drained(bench: Bench, framing: StreamFraming) -> TcpBench:
    """A tunnel of a worker that drains."""
    tcp = TcpBench(bench, framing)
    tcp.open()
    bench.router.drain(bench.link.now)
    bench.settle()
    return tcp


def test_in_capsules_it_waits_for_the_clients_end_of_the_stream(bench: Bench) -> None:
    tcp = drained(bench, StreamFraming.CAPSULES)
    flow = bench.shell.connecting[-1].flow
    tcp.finish()
    tcp.from_target_end(flow)
    assert tcp.read() == b""
    bench.wait(10)
    assert bench.client.closed is None
    assert bench.router.tunnels == 1
    tcp.end()
    assert bench.router.tunnels == 0
    bench.wait(10)
    assert bench.client.closed is not None


def test_a_raw_stream_is_sent_to_its_end(bench: Bench) -> None:
    tcp = drained(bench, StreamFraming.RAW)
    flow = bench.shell.connecting[-1].flow
    bench.client.endpoint.pause_reading(bench.client.connection, tcp.stream_id)
    size = 0
    while flow.tunnels.endpoint.stream_backlog_bytes(flow.connection, flow.stream_id) < 1 << 18:
        tcp.send_from(flow, bytes(1 << 18))
        size += 1 << 18
        bench.settle()
        assert size < 64 << 20
    tcp.finish()
    tcp.from_target_end(flow)
    assert bench.router.tunnels == 0
    bench.wait(20)
    assert bench.client.closed is None
    bench.client.endpoint.resume_reading(bench.client.connection, tcp.stream_id)
    bench.wait(20)
    bench.tick()
    events = [e for e in bench.client.of(BodyReceived) if e.stream_id == tcp.stream_id]
    assert sum(len(event.data) for event in events) == size
    assert events[-1].ended
    assert bench.client.closed is not None


def test_a_connection_that_becomes_idle_has_a_moment_to_leave_by_itself(bench: Bench) -> None:
    tcp = drained(bench, StreamFraming.RAW)
    bench.wait(10)
    tcp.finish()
    tcp.from_target_end(bench.shell.connecting[-1].flow)
    assert bench.router.tunnels == 0
    bench.tick()
    bench.tick()
    assert bench.client.closed is None  # less than a second
    bench.settle(1.0)
    bench.tick()
    assert bench.client.closed is not None


def test_why_an_idle_tunnel_was_ended_is_said(bench: Bench) -> None:
    tcp = TcpBench(bench, StreamFraming.CAPSULES)
    tcp.open()
    bench.router.tick(bench.link.now + LIMITS.tcp_idle_timeout_s + 1, 0.0)
    bench.settle()
    body = b"".join(e.data for e in bench.client.of(BodyReceived) if e.stream_id == tcp.stream_id)
    assert b"error=connection_read_timeout" in body
    assert b"it was idle" in body
