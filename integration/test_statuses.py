"""What the gateway answers: the status, the reason in Proxy-Status, and for 403 the rule."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from dns.rcode import SERVFAIL

from integration.conftest import ENGINES, Peer, each_engine, name_server
from integration.masque_client import (
    CLIENTS,
    Answer,
    Client,
    HeaderList,
    ask,
    connected,
    connected_engine,
    connected_stranger,
    open_tunnel,
    ping,
    run,
)
from integration.processes import Gateway, running_gateway
from tests.net.dns_server import SILENT, DnsServer
from toppy.wire.connect_udp import request_headers

RULES = """
[[policy.rules]]
name = "diagnostics stay inside"
action = "deny"
ports = [7, 9]
[[policy.rules]]
name = "this host's echo"
action = "allow"
cidr = ["127.0.0.1/32"]
ports = ["1024-65535"]
[[policy.rules]]
name = "the internet"
action = "allow"
cidr = ["0.0.0.0/0", "::/0"]
ports = ["53", "1024-65535"]
"""
FORBIDDEN = {
    "127.0.0.2": "loopback",
    "::1": "loopback",
    "10.0.0.1": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "fd00::1": "unique-local",
    "169.254.1.1": "link-local",
    "fe80::1": "link-local",
    "169.254.169.254": "metadata service",
    "fd00:ec2::254": "metadata service",
    "100.64.0.1": "carrier-grade NAT",
    "224.0.0.251": "multicast",
    "ff02::1": "multicast",
    "0.0.0.0": "unspecified",
    "::": "unspecified",
    "255.255.255.255": "broadcast",
    "::ffff:10.0.0.1": "private",
    "::ffff:169.254.169.254": "metadata service",
    "64:ff9b::10.0.0.1": "private",
    "64:ff9b::7f00:2": "loopback",
    "2002:a00:1::1": "private",
    "2002:a9fe:a9fe::": "metadata service",
}
"""Addresses that no rule names, and what they are."""


@pytest.fixture(scope="module")
def names() -> Iterator[DnsServer]:
    server = DnsServer(
        records={
            ("rebound.example.test", "A"): ["10.1.2.3"],
            ("mixed.example.test", "A"): ["10.1.2.3", "127.0.0.1", "192.168.7.7"],
            ("broken.example.test", "A"): ["192.0.2.1"],
        },
        behaviours={"silent.example.test": SILENT, "broken.example.test": SERVFAIL},
    )
    with name_server(server) as running:
        yield running


@pytest.fixture(scope="module", params=each_engine("statuses"))
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, names: DnsServer
) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gw"),
        engine=request.param,
        rules=RULES,
        extra=f"""
[limits]
max_tunnels_per_connection = 3
[resolver]
nameservers = ["{names.address}"]
timeout_s = 1.0
""",
    ) as running:
        yield running


def answer_for(
    gateway: Gateway,
    host: str,
    port: int | str,
    *,
    token: str | None = "",
    forward: bool = False,
    kind: str = "auto",
) -> Answer:
    """What the gateway answers to a request for one target."""

    async def scenario() -> Answer:
        async with connected(gateway, kind) as client:
            return await ask(client, host, port, token=token, forward=forward).answer()

    return run(scenario())


def headers_for(client: Client, path: str) -> HeaderList:
    return request_headers(client.authority, path, client.token)


# 400 and 404


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1/0/",
        "127.0.0.1/65536/",
        "127.0.0.1/-1/",
        "127.0.0.1/domain/",
        "127.0.0.1//",
        "127.0.0.1/",
        "127.0.0.1/53/more/",
        "/53/",
        "127.1/53/",
        "0x7f.0.0.1/53/",
        "2130706433/53/",
        "127.0.0.256/53/",
        "fe80::1%25eth0/53/",
        "%5B::1%5D/53/",
        "exa%20mple/53/",
        "exa%zzmple/53/",
        "exa%2Fmple/53/",
        "%c3%a9.example/53/",
        "a..b/53/",
        f"{'a' * 64}.example/53/",
        "127.0.0.1/%35%33%00/",
    ],
)
@pytest.mark.parametrize("template", ["udp", "udp-forward"])
def test_a_target_that_is_none_is_400(gateway: Gateway, target: str, template: str) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            path = f"/.well-known/masque/{template}/{target}"
            answer = await client.request(headers_for(client, path)).answer()
            assert answer.status == 400
            assert answer.proxy_status.error == "http_request_error"
            assert answer.proxy_status.details

    run(scenario())


def test_a_bad_request_leaves_the_connection_and_its_tunnels_alone(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, echo.host, echo.port)
            assert (await ask(client, "127.0.0.1", 0).answer()).status == 400
            await tunnel.echo(b"still there")

    run(scenario())


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        (b":method", b"GET", 404),
        (b":protocol", b"connect-ip", 501),
        (b":protocol", b"websocket", 501),
        (b":path", b"/", 404),
        (b":path", b"/.well-known/masque/tcp/127.0.0.1/53/", 404),
        (b":path", b"/.well-known/masque/udpx/127.0.0.1/53/", 404),
    ],
)
def test_anything_else_than_a_tunnel_is_404_and_an_unknown_protocol_501(
    gateway: Gateway, field: bytes, value: bytes, status: int
) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            headers = headers_for(client, "/.well-known/masque/udp/127.0.0.1/5353/")
            changed = [(n, value if n == field else v) for n, v in headers]
            assert (await client.request(changed).answer()).status == status

    run(scenario())


def test_a_request_that_ends_before_its_tunnel_begins_is_400(gateway: Gateway) -> None:
    async def scenario() -> None:
        async with connected_stranger(gateway) as client:
            headers = headers_for(client, "/.well-known/masque/udp/127.0.0.1/5353/")
            tunnel = client.request(headers, end=True)
            assert (await tunnel.answer()).status == 400

    run(scenario())


def test_a_request_that_ends_while_it_waits_for_its_answer_is_400(gateway: Gateway) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = ask(client, "silent.example.test", 5353)
            await asyncio.sleep(0.05)
            tunnel.end()
            assert (await tunnel.answer()).status == 400

    run(scenario())


# 401


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("token", [None, "wrong-token", "x" * 8000])
def test_without_the_right_token_it_is_401_and_says_how_to_authenticate(
    gateway: Gateway, kind: str, token: str | None
) -> None:
    answer = answer_for(gateway, "127.0.0.1", 5353, token=token, kind=kind)
    assert answer.status == 401
    assert answer.fields["www-authenticate"] == 'Bearer realm="toppy"'
    assert answer.proxy_status.error == "http_request_denied"
    assert token is None or token not in answer.fields["proxy-status"]


def test_the_token_is_asked_for_before_the_policy_speaks(gateway: Gateway) -> None:
    assert answer_for(gateway, "10.0.0.1", 5353, token="wrong-token").status == 401


def test_nobody_without_a_token_makes_the_gateway_resolve_names(
    gateway: Gateway, names: DnsServer
) -> None:
    assert answer_for(gateway, "secret.example.test", 5353, token=None).status == 401
    assert not [name for name, _ in names.asked if name.startswith("secret")]


def test_a_bare_token_is_accepted_too(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> Answer:
        async with connected_engine(gateway) as client:
            path = f"/.well-known/masque/udp/{echo.host}/{echo.port}/"
            headers = request_headers(client.authority, path, None)
            headers.append((b"authorization", client.token.encode()))
            return await client.request(headers).answer()

    assert run(scenario()).status == 200


# 403


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(("host", "category"), FORBIDDEN.items())
def test_a_special_address_that_no_rule_names_is_403(
    gateway: Gateway, host: str, category: str, forward: bool
) -> None:
    answer = answer_for(gateway, host, 5353, forward=forward)
    assert answer.status == 403
    word = answer.proxy_status
    assert (word.error, word.rule) == ("destination_ip_prohibited", "default")
    assert category in word.details
    assert "not allowed" in word.details


def test_what_no_rule_allows_is_403_by_default(gateway: Gateway) -> None:
    word = answer_for(gateway, "198.18.0.1", 80).proxy_status
    assert (word.error, word.rule) == ("http_request_denied", "default")


def test_a_rule_that_denies_is_named(gateway: Gateway) -> None:
    answer = answer_for(gateway, "192.0.2.1", 9)
    assert answer.status == 403
    assert answer.proxy_status.rule == "diagnostics stay inside"


def test_a_name_that_leads_to_a_forbidden_address_is_403(gateway: Gateway) -> None:
    answer = answer_for(gateway, "rebound.example.test", 5353)
    assert answer.status == 403
    assert answer.proxy_status.error == "destination_ip_prohibited"


def test_of_a_names_addresses_only_the_allowed_one_is_connected(
    gateway: Gateway, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, "mixed.example.test", echo.port)
            await tunnel.echo(b"127.0.0.1 and no other")

    run(scenario())


# 429, 502, 504


@pytest.mark.parametrize("kind", CLIENTS)
def test_one_tunnel_too_many_is_429_and_room_is_made_by_closing(
    gateway: Gateway, kind: str, echo: Peer
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnels = [await open_tunnel(client, echo.host, echo.port) for _ in range(3)]
            refused = await ask(client, echo.host, echo.port).answer()
            assert refused.status == 429
            assert refused.proxy_status.error == "connection_limit_reached"
            tunnels[0].end()
            await tunnels[0].has_ended.wait()
            await open_tunnel(client, echo.host, echo.port)
            await tunnels[1].echo(b"not disturbed")

    run(scenario())


@pytest.mark.parametrize("name", ["nowhere.example.test", "broken.example.test"])
def test_a_name_that_does_not_resolve_is_502(gateway: Gateway, name: str) -> None:
    answer = answer_for(gateway, name, 5353)
    assert answer.status == 502
    assert answer.proxy_status.error == "dns_error"
    assert name in answer.proxy_status.details


def test_a_silent_name_server_is_504(gateway: Gateway) -> None:
    answer = answer_for(gateway, "silent.example.test", 5353)
    assert answer.status == 504
    assert answer.proxy_status.error == "dns_timeout"


def test_a_waiting_request_holds_nobody_up(gateway: Gateway, echo: Peer) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            waiting = ask(client, "silent.example.test", 5353)
            tunnel = await open_tunnel(client, echo.host, echo.port)
            await tunnel.echo(b"meanwhile")
            assert (await waiting.answer()).status == 504

    run(scenario())


def test_a_target_that_refuses_does_not_end_the_tunnel(gateway: Gateway) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            tunnel = await open_tunnel(client, "127.0.0.1", 64999)
            for _ in range(5):
                tunnel.send(b"is anybody there?")
                await asyncio.sleep(0.05)
            assert not tunnel.has_ended.is_set()

    run(scenario())


# the built-in echo and QUIC ping


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("port", [7, 9])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "127.9.9.9"])
def test_the_gateway_echoes_for_itself_on_ports_7_and_9(
    gateway: Gateway, kind: str, host: str, port: int
) -> None:
    async def scenario() -> None:
        async with connected(gateway, kind) as client:
            tunnel = await open_tunnel(client, host, port)
            for payload in (b"", b"\x00toppy-connect-udp-echo", bytes(1200), bytes(9000)):
                await tunnel.echo(payload)

    run(scenario())


def test_the_echo_answers_for_the_authority_that_the_client_uses(gateway: Gateway) -> None:
    async def scenario() -> None:
        async with connected_engine(gateway) as client:
            client.authority = "vpn.example.test:4433"
            tunnel = await open_tunnel(client, "vpn.example.test", 7)
            await tunnel.echo(b"by any name")

    run(scenario())


def test_the_echo_asks_for_the_token_too(gateway: Gateway) -> None:
    assert answer_for(gateway, "localhost", 9, token=None).status == 401


@pytest.mark.parametrize(("host", "port"), [("localhost", 10), ("192.0.2.1", 9)])
def test_the_echo_answers_for_nothing_else(gateway: Gateway, host: str, port: int) -> None:
    assert answer_for(gateway, host, port).status == 403


@pytest.mark.parametrize("port", [7, 9])
def test_udp_forward_never_echoes(gateway: Gateway, port: int) -> None:
    answer = answer_for(gateway, "127.0.0.1", port, forward=True)
    assert answer.status == 403
    assert answer.proxy_status.rule == "diagnostics stay inside"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ping_says_pong_to_the_token_and_unauthorized_to_anything_else(
    gateway: Gateway, engine: str
) -> None:
    good = gateway.token.encode()

    async def scenario() -> None:
        assert await ping(gateway, b"ping " + good, engine) == b"pong"
        assert await ping(gateway, b"ping  " + good + b"\n", engine) == b"pong"
        for said in (b"ping", b"ping wrong-token", b"pong " + good, b"", b"\xff\xfe", good):
            assert await ping(gateway, said, engine) == b"unauthorized"

    run(scenario())
