"""`toppy login` and a gateway with `[auth.oidc]` against a real OpenID provider."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from integration.masque_client import ask, connected_engine, run
from integration.oidc.browser import Browser
from integration.processes import (
    BIN,
    Gateway,
    Running,
    free_tcp_port,
    run_command,
    running_gateway,
    running_udp_client,
    start,
    write_client_config,
)

AUDIENCE = "urn:toppy:gw"
HERE = Path(__file__).parent
RULES = """
[[policy.rules]]
name = "operators may"
action = "allow"
cidr = ["127.0.0.0/8"]
roles = ["operator"]
"""
pytestmark = pytest.mark.xdist_group("oidc")


class Provider:
    """`oidc-provider`, with its keys, clock and lifetimes in our hands."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.issuer = f"http://127.0.0.1:{port}"
        self.running: Running

    def start(self) -> None:
        command: list[str | Path] = ["node", self.folder / "provider.mjs", str(self.port), AUDIENCE]
        self.running = start(command, self.folder / "provider.log")
        self.running.wait_for_output("ready")

    def stop(self) -> None:
        self.running.stop(signal.SIGKILL)

    def tell(self, what: str) -> None:
        httpx.get(f"{self.issuer}/test/{what}", trust_env=False).raise_for_status()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the provider's package."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node here (node, npm)")
    folder = tmp_path_factory.mktemp("provider")
    for name in ("package.json", "provider.mjs"):
        shutil.copy(HERE / name, folder / name)
    npm = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if npm.returncode:
        pytest.skip(f"npm cannot install oidc-provider: {npm.stderr.strip()[-200:]}")
    return folder


@pytest.fixture
def provider(installed: Path) -> Iterator[Provider]:
    made = Provider(installed, free_tcp_port())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def gateway(provider: Provider, directory: Path) -> Iterator[Gateway]:
    extra = f"""
[auth.oidc]
issuer = "{provider.issuer}"
audience = "{AUDIENCE}"
leeway_s = 0
[[auth.oidc.roles]]
role = "operator"
claim = "groups"
values = ["ops"]
"""
    with running_gateway(directory, rules=RULES, extra=extra) as running:
        yield running


class User:
    """Somebody with a home folder, a configuration and a browser."""

    def __init__(self, gateway: Gateway, provider: Provider, home: Path, mode: str) -> None:
        home.mkdir()
        self.gateway = gateway
        self.provider = provider
        self.home = home
        self.environ = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        client_id = "device" if mode == "oidc_device_code" else "browser"
        self.auth = f"""
[auth]
mode = "{mode}"
issuer = "{provider.issuer}"
client_id = "{client_id}"
audience = "{AUDIENCE}"
scope = "openid offline_access profile"
"""
        if client_id == "browser":
            self.auth += 'redirect_uri = "http://127.0.0.1:0/callback"\n'
        self.config = write_client_config(gateway, home / "config.toml", extra=self.auth)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_command("toppy", *arguments, "--config", str(self.config), env=self.environ)

    def start_login(self, *options: str) -> Running:
        command: list[str | Path] = [
            BIN / "toppy",
            "login",
            "--no-browser",
            *options,
            "--config",
            self.config,
        ]
        return start(command, self.home / "login.log", self.environ)

    def address_to_open(self, login: Running) -> str:
        login.wait_for_output(f"{self.provider.issuer}/")
        if "enter the code" in login.output() or "device" in login.output():
            login.wait_for_output("The code is good for")
            code = re.search(r"enter the code (\S+)", login.output())
            assert code is not None
            return f"{self.provider.issuer}/device?user_code={code[1]}"
        found = re.search(r"^(http\S+/auth\?\S+)$", login.output(), re.MULTILINE)
        assert found is not None
        return found[1]

    def log_in(self, name: str = "alice") -> str:
        """The whole login; what it said."""
        login = self.start_login()
        with contextlib.closing(Browser(name)) as browser:
            assert browser.visit(self.address_to_open(login)).status_code == 200
        assert login.process.wait(20) == 0, login.output()
        return login.output()

    def forwarding(self, port: int) -> contextlib.AbstractContextManager[tuple[int, Running]]:
        return running_udp_client(
            self.gateway, f"127.0.0.1:{port}", extra=self.auth, environ=self.environ
        )


@pytest.fixture
def user(gateway: Gateway, provider: Provider, tmp_path: Path) -> User:
    return User(gateway, provider, tmp_path / "home", "oidc_device_code")


@contextlib.contextmanager
def udp_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def reach(local_port: int, payload: bytes, target: socket.socket) -> int:
    """Send through the gateway; the port that the target sees."""
    with udp_socket() as app:
        app.sendto(payload, ("127.0.0.1", local_port))
        data, peer = target.recvfrom(2048)
        assert data == payload
        port: int = peer[1]
        return port


def can_reach(user: User) -> bool:
    with udp_socket() as target, user.forwarding(target.getsockname()[1]) as (port, _):
        target.settimeout(2)
        try:
            reach(port, b"hello", target)
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize("mode", ["oidc_device_code", "oidc_auth_code_pkce"])
def test_after_a_login_the_gateway_lets_one_in(
    gateway: Gateway, provider: Provider, tmp_path: Path, mode: str
) -> None:
    user = User(gateway, provider, tmp_path / "home", mode)
    said = user.log_in()
    assert "Logged in as alice" in said
    assert "eyJ" not in said
    assert can_reach(user)
    facts = json.loads(user.run("whoami", "--json").stdout)
    assert (facts["subject"], facts["audience"]) == ("alice", AUDIENCE)
    assert "auth.login: logged in" in user.run("doctor").stdout


def test_nobody_gets_in_without_a_login(user: User) -> None:
    said = user.run("udp", "--listen", "127.0.0.1:0", "--target", "127.0.0.1:9")
    assert said.returncode == 1
    assert "run toppy login" in said.stderr


def test_a_login_that_is_denied_is_exit_code_3(user: User) -> None:
    login = user.start_login()
    with contextlib.closing(Browser("alice")) as browser:
        browser.deny(user.address_to_open(login))
    assert login.process.wait(20) == 3
    assert "denied" in login.output()
    assert user.run("whoami").returncode == 2


def test_a_running_client_renews_its_login_and_no_tunnel_notices(
    user: User, provider: Provider, gateway: Gateway
) -> None:
    provider.tell("lifetime?access=10")
    user.log_in()
    with (
        udp_socket() as target,
        udp_socket() as app,
        user.forwarding(target.getsockname()[1]) as (port, client),
    ):
        peers, count, end = set(), 0, time.monotonic() + 18
        while time.monotonic() < end:
            payload = b"%d" % count
            app.sendto(payload, ("127.0.0.1", port))
            data, peer = target.recvfrom(2048)
            assert data == payload
            peers.add(peer)
            count += 1
            time.sleep(0.02)
        assert len(peers) == 1, "the tunnel was opened anew"
        assert "not renewed" not in client.output()
    assert gateway.metric("toppy_gw_tunnels_total") == 1


def test_new_signing_keys_are_taken_when_the_first_token_has_them(
    user: User, provider: Provider
) -> None:
    user.log_in()
    assert can_reach(user)
    time.sleep(10)  # the gateway asks for keys every ten seconds at most
    provider.tell("rotate")
    user.log_in()
    assert can_reach(user)


def test_while_the_provider_is_down_what_was_known_serves(user: User, provider: Provider) -> None:
    user.log_in()
    assert can_reach(user)
    provider.stop()
    assert can_reach(user)
    assert user.gateway.ask("POST", "/reload")["revision"] > 1
    assert can_reach(user)
    login = user.run("login")
    assert login.returncode == 3
    assert "cannot be reached" in login.stderr


def test_after_logging_out_the_login_cannot_be_renewed(user: User, provider: Provider) -> None:
    provider.tell("lifetime?access=4")
    user.log_in()
    cache = user.home / ".config" / "toppy" / "oidc-token.json"
    copy = cache.read_bytes()
    out = user.run("logout")
    assert (out.returncode, "not told" in out.stderr) == (0, False)
    assert not cache.exists()
    cache.write_bytes(copy)
    time.sleep(4)
    said = user.run("udp", "--listen", "127.0.0.1:0", "--target", "127.0.0.1:9")
    assert said.returncode == 1
    assert "does not renew it any more" in said.stderr


def test_a_role_that_a_client_gives_itself_is_none(user: User, gateway: Gateway) -> None:
    login = user.start_login("--print-token")
    with contextlib.closing(Browser("alice")) as browser:
        browser.visit(user.address_to_open(login))
    assert login.process.wait(20) == 0, login.output()
    found = re.search(r"^(eyJ\S+)$", login.output(), re.MULTILINE)
    assert found is not None
    good = found[1]
    claims = jwt.decode(good, options={"verify_signature": False})
    header, _, signature = good.split(".")
    # the same with another group, under the signature of the one that the provider gave
    claims["groups"] = ["ops", "admins"]
    changed = jwt.encode(claims, "x" * 32, "HS256").split(".")[1]
    own_key = ec.generate_private_key(ec.SECP256R1())
    forged = {
        "claims changed": f"{header}.{changed}.{signature}",
        "signed by himself": jwt.encode(
            claims, own_key, "ES256", headers={"kid": jwt.get_unverified_header(good)["kid"]}
        ),
        "with a secret of his own": jwt.encode(claims, "y" * 32, "HS256"),
        "not signed": jwt.encode(claims, "", "none"),
    }

    async def status(token: str) -> int:
        # a connection each: failed authentications close one
        async with connected_engine(gateway) as client:
            answer = await ask(client, "127.0.0.1", 9, token=token, forward=True).answer()
            return answer.status

    async def scenario() -> None:
        for name, token in forged.items():
            assert await status(token) == 401, name
        # who is somebody, and has no role, is denied by the rules
        assert await status(gateway.token) == 403
        assert await status(good) == 200

    run(scenario())


@pytest.mark.parametrize(("offset_s", "code"), [(45, 0), (-45, 0), (150, 3)])
def test_clocks_may_differ_by_a_minute_at_login(
    user: User, provider: Provider, offset_s: int, code: int
) -> None:
    provider.tell(f"offset?s={offset_s}")
    login = user.start_login()
    with contextlib.closing(Browser("alice")) as browser:
        browser.visit(user.address_to_open(login))
    assert login.process.wait(20) == code, login.output()
    assert ("not valid yet" in login.output()) == (code == 3)
