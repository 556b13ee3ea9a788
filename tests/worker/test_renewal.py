"""A newer token for a tunnel that is open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.worker.bench import GRANT, LIMITS, UNIX_NOW, Bench
from toppy.model.grant import Denial, Grant
from toppy.wire.capsule import MAX_AUTHORIZATION_BYTES, encode_authorization
from toppy.wire.ipc_message import AdmissionRequest

DENIED = Denial(401, "http_request_denied", "the token has expired")
SOON = 20.0


@pytest.fixture(params=["native", "aioquic"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def open_tunnel(bench: Bench, grant: Grant = GRANT) -> int:
    stream_id = bench.request()
    bench.answer(grant)
    return stream_id


def renew(bench: Bench, stream_id: int, token: str = "newer") -> None:
    bench.send_body(stream_id, encode_authorization(token))
    bench.wait(1.1)


def expiring(bench: Bench, seconds: float = SOON, subject: str = GRANT.subject) -> Grant:
    now = UNIX_NOW + bench.link.now - 1000.0
    return replace(GRANT, expires_at=now + seconds, subject=subject)


def test_a_tunnel_lives_as_long_as_its_newer_token(bench: Bench) -> None:
    stream_id = open_tunnel(bench, expiring(bench))
    renew(bench, stream_id)
    question = bench.shell.asked[-1]
    assert isinstance(question, AdmissionRequest)
    assert question.authorization == "newer"
    assert question.address == bench.target.address
    bench.answer(expiring(bench, 60))
    bench.wait(SOON + 2)
    assert bench.router.tunnels == 1
    (live,) = bench.router.live_tunnels(with_authorization=True)
    assert live.authorization == "newer"
    bench.wait(45)
    assert bench.router.tunnels == 0


def test_a_token_that_is_refused_changes_nothing_before_the_old_one_ends(bench: Bench) -> None:
    stream_id = open_tunnel(bench, expiring(bench))
    renew(bench, stream_id)
    bench.answer(DENIED)
    assert bench.router.tunnels == 1
    bench.wait(SOON + 2)
    assert bench.router.tunnels == 0


def test_somebody_elses_token_renews_nothing(bench: Bench) -> None:
    stream_id = open_tunnel(bench, expiring(bench))
    renew(bench, stream_id)
    bench.answer(expiring(bench, 600, subject="mallory"))
    bench.wait(SOON + 2)
    assert bench.router.tunnels == 0


def test_the_control_plane_is_asked_once_however_many_tokens_come(bench: Bench) -> None:
    stream_id = open_tunnel(bench)
    asked = len(bench.shell.asked)
    for number in range(20):
        bench.send_body(stream_id, encode_authorization(f"token-{number}"))
    bench.wait(3)
    assert len(bench.shell.asked) == asked + 1
    assert bench.shell.asked[-1].authorization == "token-19"


def test_bad_tokens_on_a_tunnel_close_the_connection(bench: Bench) -> None:
    stream_id = open_tunnel(bench)
    for _ in range(LIMITS.max_failed_auth_per_connection):
        assert bench.client.closed is None
        renew(bench, stream_id)
        bench.answer(DENIED)
    assert bench.client.closed is not None


@pytest.mark.parametrize("size", [0, 1, MAX_AUTHORIZATION_BYTES])
def test_any_token_up_to_the_bound_is_put_to_the_control_plane(bench: Bench, size: int) -> None:
    stream_id = open_tunnel(bench)
    renew(bench, stream_id, "x" * size)
    assert bench.shell.asked[-1].authorization == "x" * size


def test_a_token_beyond_the_bound_ends_the_tunnel(bench: Bench) -> None:
    stream_id = open_tunnel(bench)
    renew(bench, stream_id, "x" * (MAX_AUTHORIZATION_BYTES + 1))
    assert bench.router.tunnels == 0
