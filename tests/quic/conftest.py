"""Every engine, and every pair of a client's and a server's engine."""

from __future__ import annotations

import pytest

from tests.quic.link import Pair, connect_pair

ENGINES = ["aioquic", "native"]
PAIRS = [(client, server) for client in ENGINES for server in ENGINES]
IDS = [f"{client}-to-{server}" for client, server in PAIRS]


@pytest.fixture(params=PAIRS, ids=IDS)
def engines(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(client's engine, server's engine)."""
    names: tuple[str, str] = request.param
    return names


@pytest.fixture
def pair(engines: tuple[str, str]) -> Pair:
    """A connection with the usual settings, ready for use."""
    return connect_pair(*engines)


@pytest.fixture(params=ENGINES)
def server_engine(request: pytest.FixtureRequest) -> str:
    """A server's engine, for tests whose client is no engine."""
    name: str = request.param
    return name
