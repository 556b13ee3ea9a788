"""The client's ``[[forward]]`` and ``[proxy]``: what is taken, what is refused and how."""

from __future__ import annotations

import pytest

from toppy.config.client import ClientConfig, parse_client_config
from toppy.errors import ConfigError


def parse(text: str, **environ: str) -> ClientConfig:
    return parse_client_config(f'gateway = "gw.example"\n{text}', "c.toml", environ)


def test_an_entry_is_tcp_through_the_gateway_unless_it_says_otherwise() -> None:
    (entry,) = parse('[[forward]]\nlisten = "127.0.0.1:1"\ntarget = "db.example:5432"').forward
    assert (entry.protocol, entry.direct) == ("tcp", False)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ('listen = "127.0.0.1"\ntarget = "a.example:1"', "forward[0].listen"),
        ('listen = ":53"\ntarget = "a.example:1"', "names no address; write 127.0.0.1:53 for"),
        ('listen = "[]:53"\ntarget = "a.example:1"', "names no address"),
        ('listen = "127.0.0.1:1"\ntarget = "a.example:0"', "from 1 to 65535"),
        ('listen = "127.0.0.1:1"\ntarget = "127.1:5"', "forward[0].target"),
        ('listen = "127.0.0.1:1"', "target"),
        ('listen = "127.0.0.1:1"\ntarget = "a:1"\nprotocol = "sctp"', "protocol"),
        ('listen = "127.0.0.1:1"\ntarget = "a:1"\nprotocol = "udp"\ndirect = true', "for TCP only"),
        ('listen = "127.0.0.1:1"\ntarget = "a:1"\ndirekt = true', "did you mean direct"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entry: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"[[forward]]\n{entry}")
    assert part in str(raised.value)


def test_a_port_stands_once_for_each_protocol() -> None:
    entry = '[[forward]]\nlisten = "127.0.0.1:53"\ntarget = "a.example:53"\n'
    assert len(parse(entry + entry + 'protocol = "udp"\n').forward) == 2
    with pytest.raises(ConfigError, match="stands twice for tcp"):
        parse(entry + entry)
    free = entry.replace(":53", ":0", 1)
    assert len(parse(free + free).forward) == 2


def test_the_proxy_listens_on_loopback_for_everybody_here() -> None:
    proxy = parse("").proxy
    assert (proxy.listen, proxy.user, proxy.password) == ("127.0.0.1:1080", None, None)


def test_the_environment_sets_user_and_password() -> None:
    proxy = parse(
        "", TOPPY_PROXY_USER="me", TOPPY_PROXY_PASSWORD="s3cret", TOPPY_PROXY_LISTEN="[::1]:1"
    ).proxy
    assert proxy.password is not None
    assert (proxy.user, proxy.password.get_secret_value()) == ("me", "s3cret")
    assert proxy.listen == "[::1]:1"
    assert "s3cret" not in repr(proxy)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('user = "me"', "go together"),
        ('password_file = "f"', "go together"),
        ('user = "me"\npassword = "p"\npassword_file = "f"', "set one of them"),
        ('listen = "nonsense"', "proxy.listen"),
        ('listen = ":1080"', "names no address"),
        ("max_connections = 0", "proxy.max_connections"),
        ("handshake_timeout_s = 0", "proxy.handshake_timeout_s"),
        ('pac_through = ["a b"]', "must be a name"),
        ('pac_direct = "10.0.0.1/8"', "no host bits"),
    ],
)
def test_a_proxy_that_makes_no_sense_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f"[proxy]\n{text}")
    assert part in str(raised.value)


def test_a_password_is_in_no_error() -> None:
    for text in ('password = "s3cret"', 'user = "me"\npassword = 5', 'passwrod = "s3cret"'):
        with pytest.raises(ConfigError) as raised:
            parse(f"[proxy]\n{text}")
        assert "s3cret" not in str(raised.value)
