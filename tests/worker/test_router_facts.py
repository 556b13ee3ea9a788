"""What a gateway says about itself in its answers, and to whom."""

from __future__ import annotations

import pytest

from tests.quic.link import CLIENT
from tests.worker.bench import DENIAL, ECHO, UNIX_NOW, Bench
from toppy import __version__
from toppy.model.grant import Denial
from toppy.wire.gateway_facts import GatewayFacts, parse_gateway_facts

ECHO_PATH = "/.well-known/masque/udp/localhost/9/"
ENGINES = ["native", "aioquic"]


def facts(bench: Bench, stream_id: int) -> GatewayFacts:
    fields = bench.fields(stream_id)
    return parse_gateway_facts((n.encode(), v.encode()) for n, v in fields.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_echo_tells_the_time_the_program_and_the_clients_address(engine: str) -> None:
    bench = Bench(engine)
    bench.tick()
    found = facts(bench, bench.open(ECHO, ECHO_PATH))
    assert (found.version, found.engine) == (__version__, engine)
    assert found.client_address == CLIENT
    assert found.unix_time is not None
    assert abs(found.unix_time - UNIX_NOW) < 5


@pytest.mark.parametrize("engine", ENGINES)
def test_other_tunnels_tell_nothing(engine: str) -> None:
    bench = Bench(engine)
    assert facts(bench, bench.open()) == GatewayFacts()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "denial", [DENIAL, Denial(401, "http_request_denied", "no token")], ids=["403", "401"]
)
def test_a_refusal_tells_the_time_and_nothing_else(engine: str, denial: Denial) -> None:
    bench = Bench(engine)
    bench.tick()
    stream_id = bench.request(ECHO_PATH)
    bench.answer(denial)
    assert bench.status(stream_id) == denial.status
    found = facts(bench, stream_id)
    assert found == GatewayFacts(unix_time=found.unix_time)
    assert found.unix_time is not None
