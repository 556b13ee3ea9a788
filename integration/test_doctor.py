"""``toppy doctor`` as a process, in a network of its own that has one thing wrong."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest

from integration.conftest import ENGINES
from integration.processes import (
    BIN,
    Gateway,
    run_command,
    running_gateway,
    write_client_config,
)
from tests.client.gateway import LoopbackGateway, write_config
from tests.quic.certificates import dated_pair
from toppy.client.doctor.report import Report

SECRET = "a secret that only the issuer knows"
RULES = """
[[policy.rules]]
name = "no secrets"
action = "deny"
cidr = ["127.0.0.7/32"]
[[policy.rules]]
name = "this host"
action = "allow"
cidr = ["127.0.0.0/8"]
"""
pytestmark = pytest.mark.xdist_group("doctor")

Checks = dict[str, dict[str, Any]]


class Place:
    """A network namespace that reaches this one by a cable, and nothing else."""

    def __init__(self) -> None:
        share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw9").removeprefix("gw")) % 10
        number = os.getpid() % 200
        self.name = f"toppy-dr-{os.getpid()}"
        self.here, self.there = f"tdr{os.getpid()}a", f"tdr{os.getpid()}b"
        self.gateway = f"10.{211 + share}.{number}.1"
        self.client = f"10.{211 + share}.{number}.2"
        self.seen = f"10.{211 + share}.{number}.3"
        """What a NAT makes of the client's address."""
        self.resolv = Path("/etc/netns") / self.name / "resolv.conf"

    def make(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.here, "type", "veth", "peer", self.there, "netns", self.name)
        ip("addr", "add", f"{self.gateway}/29", "dev", self.here)
        ip("link", "set", self.here, "up")
        for address in (self.client, self.seen):
            ip("-n", self.name, "addr", "add", f"{address}/29", "dev", self.there)
        for device in ("lo", self.there):
            ip("-n", self.name, "link", "set", device, "up")

    def remove(self) -> None:
        shutil.rmtree(self.resolv.parent, ignore_errors=True)
        with suppress(OSError):
            self.resolv.parent.parent.rmdir()  # only if nobody else has one
        for arguments in (("netns", "del", self.name), ("link", "del", self.here)):
            subprocess.run(["ip", *arguments], capture_output=True, check=False)

    def set_mtu(self, mtu: int) -> None:
        ip("link", "set", self.here, "mtu", str(mtu))
        ip("-n", self.name, "link", "set", self.there, "mtu", str(mtu))

    def filter(self, hook: str, rule: str) -> None:
        """One nftables rule in the namespace, instead of the one before."""
        kind = "nat" if "snat" in rule else "filter"
        rules = f"""
flush ruleset
table ip doctor {{
  chain only {{
    type {kind} hook {hook} priority 0;
    {rule}
  }}
}}
"""
        self.run("nft", "-f", "-", text=rules)

    def restore(self) -> None:
        self.set_mtu(1500)
        self.run("nft", "flush", "ruleset")

    def run(
        self, *arguments: str | Path, text: str = "", environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **(environ or {})},
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None:
        pytest.skip("making a network needs root, ip and nft")
    made = Place()
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"this host gives no network namespace: {error.stderr.decode().strip()}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def gateway(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("gw")
    (directory / "jwt-secret").write_text(SECRET)
    (directory / "jwt-secret").chmod(0o600)
    extra = '\n[auth.jwt]\nsecret_file = "jwt-secret"\n'
    with running_gateway(directory, host=place.gateway, rules=RULES, extra=extra) as running:
        yield running


@pytest.fixture
def network(place: Place) -> Iterator[Place]:
    """With nothing wrong yet."""
    yield place
    place.restore()


def doctor(place: Place, config: Path, *arguments: str, **environ: str) -> tuple[int, str, Checks]:
    """Exit code, overall status, and the checks by ID."""
    done = place.run(
        *(BIN / "toppy", "doctor", "--json", "--config", config),
        *arguments,
        environ={"TOPPY_DOCTOR_TUN": "pass", "HOME": str(config.parent), **environ},
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    msgspec.convert(report, Report)
    return done.returncode, report["overall"], {c["id"]: c for c in report["checks"]}


def configured(gateway: Gateway, path: Path, /, **changes: str) -> Path:
    """A client's file with keys changed."""
    write_client_config(gateway, path)
    lines = path.read_text().splitlines()
    for key, value in changes.items():
        lines = [line for line in lines if not line.startswith(f"{key} =")]
        lines.insert(0, f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    return path


def causes(checks: Checks) -> set[str]:
    """What failed by itself."""
    return {i for i, c in checks.items() if c["status"] == "fail" and c["because"] is None}


def test_on_a_good_way_everything_passes(network: Place, gateway: Gateway, tmp_path: Path) -> None:
    token = jwt.encode({"sub": "ann", "exp": int(time.time()) + 40 * 86_400}, SECRET)
    config = configured(gateway, tmp_path / "c.toml", auth_token=token)
    code, overall, checks = doctor(network, config, "--target", "127.0.0.1:5353")
    assert (code, overall) == (0, "pass"), checks
    assert {c["status"] for c in checks.values()} == {"pass"}
    assert checks["net.latency"]["facts"]["lost"] == 0
    assert checks["net.nat"]["facts"]["is_behind_nat"] is False
    assert checks["net.mtu.up"]["facts"]["largest_bytes"] == 1472
    assert checks["net.mtu.down"]["facts"]["largest_payload_bytes"] >= 1300
    assert checks["tls.certificate"]["facts"]["days_left"] > 30
    assert checks["gateway.version"]["facts"]["gateway_engine"] in ENGINES
    assert "39 days" in checks["auth.token"]["summary"]


def test_a_nat_on_the_way_is_seen(network: Place, gateway: Gateway, tmp_path: Path) -> None:
    rule = f"ip protocol udp snat to {network.seen}:40000-50000 random"
    network.filter("postrouting", rule)
    _, _, checks = doctor(network, configured(gateway, tmp_path / "c.toml"))
    assert checks["net.nat"]["facts"]["is_behind_nat"] is True
    assert checks["net.nat"]["facts"]["seen"].startswith(f"{network.seen}:4")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (("input", "meta l4proto udp drop"), "answers TCP, but no UDP"),
        (("output", "meta l4proto udp drop"), "this host cannot send UDP"),
        (("input", "drop"), "nothing at all comes back"),
    ],
    ids=["on the way", "here", "everything"],
)
def test_udp_that_is_blocked_says_where(
    network: Place, gateway: Gateway, tmp_path: Path, rule: tuple[str, str], said: str
) -> None:
    network.filter(*rule)
    code, _, checks = doctor(network, configured(gateway, tmp_path / "c.toml"))
    assert code == 1
    assert causes(checks) == {"net.udp"}
    assert said in checks["net.udp"]["summary"]
    assert checks["h3.connect"]["because"] == "net.udp"


def test_a_narrow_link_names_the_mtu_that_passes(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    network.set_mtu(1300)
    _, _, checks = doctor(network, configured(gateway, tmp_path / "c.toml"))
    assert checks["net.mtu.up"]["status"] in ("warn", "fail")
    assert checks["net.mtu.up"]["facts"]["largest_bytes"] == 1252
    assert "set mtu = 1252" in checks["net.mtu.up"]["remedy"]


def test_large_packets_that_vanish_on_the_way_back_are_told(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    network.filter("input", "meta l4proto udp meta length gt 1300 drop")
    _, _, checks = doctor(network, configured(gateway, tmp_path / "c.toml"))
    assert checks["net.mtu.up"]["status"] == "pass"
    told = [checks[i] for i in ("net.mtu.down", "h3.connect") if checks[i]["status"] != "pass"]
    assert any("initial_packet_bytes" in (check["remedy"] or "") for check in told), checks


def test_a_name_server_that_is_silent_is_named(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    network.resolv.parent.mkdir(parents=True)
    network.resolv.write_text(f"nameserver {network.gateway}\n")
    network.filter("input", "drop")
    config = configured(gateway, tmp_path / "c.toml", gateway="gw.example.test")
    code, _, checks = doctor(network, config)
    shutil.rmtree(network.resolv.parent)
    assert code == 1
    assert causes(checks) == {"net.dns"}
    assert "no answer in time" in checks["net.dns"]["summary"]


def test_a_provider_that_is_silent_stops_only_what_needs_its_token(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    issuer = f"https://{network.gateway}:9443"
    config = configured(gateway, tmp_path / "c.toml")
    text = "\n".join(x for x in config.read_text().splitlines() if "auth_token" not in x)
    config.write_text(
        f'{text}\n[auth]\nmode = "oidc_device_code"\nissuer = "{issuer}"\nclient_id = "me"\n'
        'token_cache_path = "tokens.json"\n'
    )
    now = int(time.time())
    (tmp_path / "tokens.json").write_text(
        json.dumps(
            {
                "cache_version": 1,
                "issuer": issuer,
                "client_id": "me",
                "audience": None,
                "access_token": "old",
                "refresh_token": "again",
                "token_type": "Bearer",
                "scope": None,
                "issued_at": now - 7200,
                "expires_at": now - 3600,
            }
        )
    )
    (tmp_path / "tokens.json").chmod(0o600)
    network.filter("input", "meta l4proto tcp drop")
    code, _, checks = doctor(network, config)
    assert code == 1
    assert causes(checks) == {"auth.login"}
    assert "does not answer in time" in checks["auth.login"]["summary"]
    assert checks["net.udp"]["status"] == "pass"
    assert checks["tls.certificate"]["status"] == "pass"


def test_a_name_that_the_certificate_lacks_is_named(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    config = configured(gateway, tmp_path / "c.toml", server_name="other.example")
    code, _, checks = doctor(network, config)
    assert code == 1
    assert causes(checks) == {"tls.certificate"}
    assert "localhost" in checks["tls.certificate"]["summary"]
    assert checks["h3.connect"]["because"] == "tls.certificate"


def test_a_token_that_has_expired_is_named(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    token = jwt.encode({"sub": "ann", "exp": int(time.time()) - 3600}, SECRET)
    code, _, checks = doctor(network, configured(gateway, tmp_path / "c.toml", auth_token=token))
    assert code == 1
    assert causes(checks) == {"auth.token"}
    assert "expired" in checks["auth.token"]["summary"]
    assert checks["h3.connect"]["because"] == "auth.token"
    assert checks["clock.skew"]["status"] == "pass"


def test_a_denied_target_names_the_gateways_rule(
    network: Place, gateway: Gateway, tmp_path: Path
) -> None:
    config = configured(gateway, tmp_path / "c.toml")
    code, _, checks = doctor(network, config, "--target", "127.0.0.7:5353")
    assert code == 1
    assert checks["policy.denied"]["status"] == "pass"
    assert causes(checks) == {"policy.gateway"}
    assert checks["policy.gateway"]["facts"]["udp_rule"] == "no secrets"


def test_an_expired_certificate_is_named_and_nothing_is_sent(tmp_path: Path) -> None:
    pair = dated_pair(-9, -2)

    async def scenario() -> tuple[bytes, int | None]:
        async with LoopbackGateway(pair=pair) as gateway:
            config = write_config(tmp_path, gateway.address)
            (tmp_path / "ca.pem").write_bytes(pair[0])
            command = (str(BIN / "toppy"), "doctor", "--json", "--config", str(config))
            process = await asyncio.create_subprocess_exec(
                *command,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "HOME": str(tmp_path)},
            )
            said, _ = await process.communicate()
            assert gateway.pings == []
            return said, process.returncode

    said, code = asyncio.run(scenario())
    checks = {c["id"]: c for c in json.loads(said)["checks"]}
    assert code == 1
    assert causes(checks) == {"tls.certificate"}
    assert "expired on" in checks["tls.certificate"]["summary"]


def test_people_read_the_cause_and_what_to_do(tmp_path: Path) -> None:
    done = run_command("toppy", "doctor", "--config", str(tmp_path / "none.toml"))
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0] == "doctor: fail"
    assert lines[1].startswith("version: ")
    assert lines[2].startswith("- [fail] cfg.load: there is no configuration")
    assert lines[3].startswith("    because of this also: net.dns, net.udp")
