"""The PAC file: what goes through the proxy, as a browser would work it out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppy.errors import ConfigError
from toppy.wire.pac import encode_pac


def lines(**patterns: list[str]) -> list[str]:
    return [line.strip() for line in encode_pac("127.0.0.1:1080", **patterns).splitlines()]


def test_without_patterns_all_but_this_machine_goes_through() -> None:
    assert lines()[-4:] == [
        'if (isName("localhost") || isBelow(".localhost") || isIn("127.0.0.0", "255.0.0.0")'
        ' || isName("::1")) return "DIRECT";',
        'if (true) return "PROXY 127.0.0.1:1080";',
        'return "DIRECT";',
        "}",
    ]


def test_what_is_direct_is_asked_before_what_goes_through() -> None:
    direct, through = lines(
        through=["*.corp.example", "192.0.2.0/24"], direct=["www.corp.example"]
    )[-4:-2]
    assert direct.endswith(' || isName("www.corp.example")) return "DIRECT";')
    assert through == (
        'if (isBelow(".corp.example") || isIn("192.0.2.0", "255.255.255.0"))'
        ' return "PROXY 127.0.0.1:1080";'
    )


def test_there_is_no_way_around_a_proxy_that_does_not_answer() -> None:
    assert "; DIRECT" not in encode_pac("127.0.0.1:1080")


def test_an_ipv6_proxy_stands_in_brackets() -> None:
    assert '"PROXY [::1]:1080"' in encode_pac("[::1]:1080")


@pytest.mark.parametrize("proxy", ["", "127.0.0.1", "::1:1080", 'x":1', "a:0", "a\n:1"])
def test_a_proxy_without_host_and_port_is_refused(proxy: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        encode_pac(proxy)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        "*.",
        "a.*",
        "*.192.0.2.1",
        "*.::1",
        "192.0.2.1/24",
        "192.0.2.0/33",
        "2001:db8::/32",
        'a"',
        "a\\",
        "a\n",
        "127.1",
    ],
)
def test_another_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="must be a name"):
        encode_pac("127.0.0.1:1080", through=[pattern])


@settings(deadline=None)
@given(st.text(max_size=30))
def test_no_pattern_breaks_out_of_its_string(pattern: str) -> None:
    try:
        pac = encode_pac("127.0.0.1:1080", direct=[pattern])
    except ConfigError:
        return
    condition = pac.splitlines()[-4]
    assert condition.count('"') % 2 == 0
    assert "\\" not in condition
