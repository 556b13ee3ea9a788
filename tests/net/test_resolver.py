from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

import dns.rcode
import dns.resolver
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.net.dns_server import GARBAGE, SILENT, TRUNCATED, DnsServer, serve
from toppy.errors import ConfigError, TargetError
from toppy.net import resolver as resolver_module
from toppy.net.resolver import Resolver, parse_hosts, parse_nameserver

TIMEOUT_S = 5.0
SHORT_S = 0.3


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def with_server(
    server: DnsServer,
    check: Callable[[Resolver], Awaitable[None]],
    *,
    timeout_s: float = TIMEOUT_S,
    clock: Clock | None = None,
) -> None:
    async def run() -> None:
        async with serve(server):
            await check(Resolver([server.address], timeout_s, clock=clock or Clock()))

    asyncio.run(run())


def resolve(server: DnsServer, name: str, *, timeout_s: float = TIMEOUT_S) -> tuple[str, ...]:
    found: list[tuple[str, ...]] = []

    async def check(resolver: Resolver) -> None:
        found.append(await resolver.resolve(name))

    with_server(server, check, timeout_s=timeout_s)
    return found[0]


def failure(server: DnsServer, name: str, *, timeout_s: float = TIMEOUT_S) -> TargetError:
    with pytest.raises(TargetError) as caught:
        resolve(server, name, timeout_s=timeout_s)
    return caught.value


def both_families() -> DnsServer:
    return DnsServer(
        {
            ("app.test", "A"): ["192.0.2.1", "192.0.2.2"],
            ("app.test", "AAAA"): ["2001:db8::1"],
            ("four.test", "A"): ["192.0.2.4"],
            ("six.test", "AAAA"): ["2001:db8::6"],
            ("text.test", "TXT"): ["hello"],
        }
    )


# answers


def test_both_families_are_asked_and_take_turns() -> None:
    server = both_families()
    found = resolve(server, "app.test")
    assert found[0] == "2001:db8::1"
    assert set(found[1:]) == {"192.0.2.1", "192.0.2.2"}
    assert server.asked == {("app.test", "A"): 1, ("app.test", "AAAA"): 1}


@pytest.mark.parametrize(
    ("name", "address"), [("four.test", "192.0.2.4"), ("six.test", "2001:db8::6")]
)
def test_one_family_is_enough(name: str, address: str) -> None:
    assert resolve(both_families(), name) == (address,)


def test_case_and_a_trailing_dot_make_no_difference() -> None:
    assert resolve(both_families(), "FOUR.Test.") == ("192.0.2.4",)


def test_a_numeric_address_is_its_own_answer() -> None:
    server = both_families()
    assert resolve(server, "192.0.2.77") == ("192.0.2.77",)
    assert resolve(server, "2001:DB8:0::7") == ("2001:db8::7",)
    assert not server.asked


@pytest.mark.parametrize("follows_aliases", [True, False], ids=["server follows", "we follow"])
def test_aliases_are_followed(follows_aliases: bool) -> None:
    server = both_families()
    server.follows_aliases = follows_aliases
    server.aliases = {"www.test": "web.test", "web.test": "four.test"}
    assert resolve(server, "www.test") == ("192.0.2.4",)


def test_a_loop_of_aliases_ends() -> None:
    server = both_families()
    server.follows_aliases = False
    server.aliases = {"one.test": "two.test", "two.test": "one.test"}
    error = failure(server, "one.test")
    assert (error.status, error.proxy_status) == (502, "dns_error")
    assert "aliases" in str(error)


def test_a_name_with_very_many_addresses_gives_sixteen_of_both_families() -> None:
    server = DnsServer(
        {
            ("many.test", "A"): [f"192.0.2.{n}" for n in range(1, 60)],
            ("many.test", "AAAA"): [f"2001:db8::{n:x}" for n in range(1, 60)],
        }
    )
    found = resolve(server, "many.test")
    assert len(found) == 16
    assert len(set(found)) == 16
    assert sum(":" in address for address in found) == 8


def test_a_truncated_answer_is_asked_for_again_over_tcp() -> None:
    server = both_families()
    server.behaviours = {"four.test": TRUNCATED}
    assert resolve(server, "four.test") == ("192.0.2.4",)
    assert server.asked["four.test", "A"] == 2


def test_a_lost_query_is_repeated_within_the_deadline() -> None:
    server = both_families()
    server.lose_first = 2
    assert resolve(server, "four.test", timeout_s=1.5) == ("192.0.2.4",)


def test_garbage_before_the_answer_does_no_harm() -> None:
    server = both_families()
    server.behaviours = {("app.test", "AAAA"): GARBAGE}
    assert set(resolve(server, "app.test", timeout_s=2.0)) == {"192.0.2.1", "192.0.2.2"}


def test_a_server_that_never_answers_aaaa_delays_little() -> None:
    server = both_families()
    server.behaviours = {("app.test", "AAAA"): SILENT}

    async def check(resolver: Resolver) -> None:
        # far less than the resolver's own deadline
        found = await asyncio.wait_for(resolver.resolve("app.test"), 30)
        assert set(found) == {"192.0.2.1", "192.0.2.2"}

    with_server(server, check, timeout_s=60)


# failures (RFC 9209 sections 2.3.1 and 2.3.2)


def test_an_unknown_name_is_a_dns_error() -> None:
    error = failure(both_families(), "nobody.test")
    assert (error.status, error.proxy_status) == (502, "dns_error")
    assert "nobody.test" in str(error)
    assert "NXDOMAIN" in str(error)


def test_a_name_without_addresses_is_a_dns_error() -> None:
    error = failure(both_families(), "text.test")
    assert (error.status, error.proxy_status) == (502, "dns_error")
    assert "NODATA" in str(error)


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
def test_a_failing_nameserver_is_a_dns_error_with_its_code(rcode: dns.rcode.Rcode) -> None:
    server = both_families()
    server.behaviours = {"four.test": rcode}
    error = failure(server, "four.test")
    assert (error.status, error.proxy_status) == (502, "dns_error")
    assert dns.rcode.to_text(rcode) in str(error)


def test_silence_is_a_dns_timeout() -> None:
    server = both_families()
    server.behaviours = {"app.test": SILENT}
    error = failure(server, "app.test", timeout_s=SHORT_S)
    assert (error.status, error.proxy_status) == (504, "dns_timeout")
    assert "0.3 s" in str(error)


def test_silence_for_the_only_family_that_could_exist_is_a_dns_timeout() -> None:
    server = both_families()
    server.behaviours = {("six.test", "AAAA"): SILENT}
    assert failure(server, "six.test", timeout_s=SHORT_S).status == 504


def test_a_nameserver_that_is_not_there_is_a_failure_that_says_so() -> None:
    async def run() -> None:
        async with serve(DnsServer()) as server:
            gone = server.address
        await Resolver([gone], SHORT_S).resolve("app.test")

    with pytest.raises(TargetError) as caught:
        asyncio.run(run())
    assert caught.value.proxy_status in {"dns_error", "dns_timeout"}


@pytest.mark.parametrize(
    "name", ["", "a..b", "x" * 64 + ".test", ".".join(["long"] * 60), "a\\999"]
)
def test_what_is_no_name_is_a_dns_error(name: str) -> None:
    assert failure(both_families(), name).proxy_status == "dns_error"


def test_without_any_nameserver_names_fail_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_resolv_conf(*_: object) -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.resolver.BaseResolver, "read_resolv_conf", no_resolv_conf)
    resolver = Resolver((), SHORT_S, hosts_file=tmp_path / "none")
    with pytest.raises(TargetError, match="no nameserver to ask"):
        asyncio.run(resolver.resolve("app.test"))


@given(st.binary(max_size=80), st.integers(0, 1))
def test_any_answer_is_an_answer_or_a_target_error(junk: bytes, keeps_id: int) -> None:
    class Junk(DnsServer):
        def answer(self, wire: bytes, *, over_tcp: bool) -> bytes | None:
            return (wire[:2] if keeps_id else b"") + junk

    async def run() -> None:
        async with serve(Junk()) as server:
            await Resolver([server.address], 0.02).resolve("app.test")

    with pytest.raises(TargetError):
        asyncio.run(run())


# the cache


def test_an_answer_is_kept_for_its_ttl() -> None:
    server = both_families()
    server.ttl_s = 20
    clock = Clock()

    async def check(resolver: Resolver) -> None:
        for later, asked in ((0.0, 1), (19.9, 1), (0.2, 2)):
            clock.now += later
            assert await resolver.resolve("four.test") == ("192.0.2.4",)
            assert server.asked["four.test", "A"] == asked

    with_server(server, check, clock=clock)


def test_no_answer_is_kept_for_more_than_a_minute() -> None:
    server = both_families()
    server.ttl_s = 86400
    clock = Clock()

    async def check(resolver: Resolver) -> None:
        for later, asked in ((0.0, 1), (59.0, 1), (1.5, 2)):
            clock.now += later
            await resolver.resolve("four.test")
            assert server.asked["four.test", "A"] == asked

    with_server(server, check, clock=clock)


def test_an_answer_without_a_ttl_is_not_kept() -> None:
    server = both_families()
    server.ttl_s = 0

    async def check(resolver: Resolver) -> None:
        await resolver.resolve("four.test")
        await resolver.resolve("four.test")
        assert server.asked["four.test", "A"] == 2

    with_server(server, check)


def test_failures_are_not_kept() -> None:
    server = both_families()

    async def check(resolver: Resolver) -> None:
        with pytest.raises(TargetError):
            await resolver.resolve("new.test")
        server.records["new.test", "A"] = ["192.0.2.9"]
        assert await resolver.resolve("new.test") == ("192.0.2.9",)

    with_server(server, check)


def test_the_cache_forgets_the_name_that_was_used_least_recently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver_module, "MAX_CACHED_NAMES", 2)
    server = DnsServer({(f"{n}.test", "A"): ["192.0.2.1"] for n in "abc"})

    async def check(resolver: Resolver) -> None:
        for name in ("a.test", "b.test", "a.test", "c.test", "a.test", "b.test"):
            await resolver.resolve(name)
        asked = {name: server.asked[name, "A"] for name in ("a.test", "b.test", "c.test")}
        assert asked == {"a.test": 1, "b.test": 2, "c.test": 1}

    with_server(server, check)


# several askers


def test_the_same_name_is_asked_for_once_at_a_time() -> None:
    server = both_families()
    server.ttl_s = 0

    async def check(resolver: Resolver) -> None:
        found = await asyncio.gather(*(resolver.resolve("four.test") for _ in range(20)))
        assert set(found) == {("192.0.2.4",)}
        assert server.asked["four.test", "A"] == 1

    with_server(server, check)


def test_all_askers_are_told_of_a_failure() -> None:
    server = both_families()

    async def check(resolver: Resolver) -> None:
        asked = [resolver.resolve("nobody.test") for _ in range(5)]
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, TargetError)
            assert error.proxy_status == "dns_error"
        assert server.asked["nobody.test", "A"] == 1

    with_server(server, check)


def test_an_asker_that_gives_up_takes_nobody_with_it() -> None:
    server = both_families()

    async def check(resolver: Resolver) -> None:
        first = asyncio.ensure_future(resolver.resolve("four.test"))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(resolver.resolve("four.test")) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.gather(*others) == [("192.0.2.4",)] * 3
        assert first.cancelled()

    with_server(server, check)


def test_lookups_at_once_are_bounded_and_waiting_counts_against_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver_module, "MAX_LOOKUPS", 1)
    server = both_families()
    server.behaviours = {"app.test": SILENT}

    async def check(resolver: Resolver) -> None:
        slow = asyncio.ensure_future(resolver.resolve("app.test"))
        await asyncio.sleep(0)
        with pytest.raises(TargetError) as caught:
            await resolver.resolve("four.test")
        assert caught.value.status == 504
        with pytest.raises(TargetError):
            await slow
        assert not server.asked["four.test", "A"]
        assert await resolver.resolve("four.test") == ("192.0.2.4",)

    with_server(server, check, timeout_s=SHORT_S)


# the hosts file


def test_the_systems_resolver_reads_the_hosts_file_and_its_changes(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.10 printer.lan printer\n")
    resolver = Resolver(hosts_file=hosts)
    assert asyncio.run(resolver.resolve("Printer.lan")) == ("192.0.2.10",)
    hosts.write_text("192.0.2.110 printer.lan\n2001:db8::10 printer.lan\n")
    assert asyncio.run(resolver.resolve("printer.lan")) == ("192.0.2.110", "2001:db8::10")


def test_given_nameservers_take_the_place_of_the_hosts_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("192.0.2.99 four.test\n")

    async def run() -> None:
        async with serve(both_families()) as server:
            resolver = Resolver([server.address], TIMEOUT_S, hosts_file=hosts)
            assert await resolver.resolve("four.test") == ("192.0.2.4",)

    asyncio.run(run())


def test_localhost_is_never_asked_for() -> None:
    server = both_families()
    assert resolve(server, "localhost") == ("127.0.0.1", "::1")
    assert resolve(server, "app.localhost") == ("127.0.0.1", "::1")
    assert not server.asked


def test_comments_zones_and_nonsense_in_a_hosts_file_are_skipped() -> None:
    text = """
    # a comment
    127.0.0.1\tlocalhost Alias. # the usual
    ::1 localhost
    fe80::1%lo0 localhost
    not-an-address name
    192.0.2.1
    """
    assert parse_hosts(text) == {"localhost": ("127.0.0.1", "::1"), "alias": ("127.0.0.1",)}


@given(st.text(max_size=200))
def test_any_hosts_file_gives_addresses(text: str) -> None:
    for name, addresses in parse_hosts(text).items():
        assert name == name.lower()
        for address in addresses:
            ipaddress.ip_address(address)


# nameservers


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("192.0.2.53", ("192.0.2.53", 53)),
        ("192.0.2.53:5353", ("192.0.2.53", 5353)),
        ("2001:db8::53", ("2001:db8::53", 53)),
        ("[2001:db8::53]", ("2001:db8::53", 53)),
        ("[2001:db8::53]:5353", ("2001:db8::53", 5353)),
    ],
)
def test_a_nameserver_is_an_address_with_or_without_a_port(
    text: str, parsed: tuple[str, int]
) -> None:
    assert parse_nameserver(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "dns.test", "192.0.2.53:", "192.0.2.53:0", "1.2.3.4:65536", "[::1", "[::1]x", "::1]:5"],
)
def test_another_nameserver_is_a_configuration_error_that_names_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Resolver([text])
    assert caught.value.key == "resolver.nameservers"
    assert f'"{text}"' in str(caught.value)


@given(st.text(max_size=40))
def test_any_nameserver_is_parsed_or_a_configuration_error(text: str) -> None:
    try:
        address, port = parse_nameserver(text)
    except ConfigError:
        return
    ipaddress.ip_address(address)
    assert 1 <= port <= 65535
