"""``policy check`` at both ends: the answer, the rule, why, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner, Result

from toppy.cli import toppy, toppy_gw
from toppy.cli.policy_check import parse_claims
from toppy.errors import ConfigError

runner = CliRunner()

GATEWAY = """
[auth]
token = "long-enough-token"
[auth.oidc]
issuer = "https://login.example"
audience = "toppy"
[[auth.oidc.roles]]
role = "auditor"
claim = "realm_access.roles"
values = ["audit"]
[[policy.roles]]
role = "dba"
groups = ["databases"]
[[policy.rules]]
name = "databases"
action = "allow"
cidr = ["10.0.0.0/8"]
ports = [5432]
roles = ["dba", "auditor"]
when = { days = "mon-fri", hours = "08:00-18:00", zone = "Europe/Berlin" }
[[policy.rules]]
name = "internet"
action = "allow"
cidr = ["0.0.0.0/0", "::/0"]
protocol = "udp"
[[policy.rules]]
name = "level"
action = "allow"
cidr = ["127.0.0.1"]
claims = { level = 3 }
[[policy.rules]]
name = "not these"
action = "deny"
host = "*.bad.example"
"""
MONDAY = ("--at", "2026-03-02T09:00+01:00")
DATABASE = ("--target", "10.0.0.1:5432")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "gateway.toml"
    path.write_text(GATEWAY)
    return str(path)


def check(config: str, *arguments: str) -> Result:
    return runner.invoke(toppy_gw.app, ["policy", "check", "--config", config, *arguments])


def facts(config: str, *arguments: str) -> dict[str, Any]:
    protocol = () if "--protocol" in arguments else ("--protocol", "udp")
    result = check(config, *arguments, *protocol, "--json")
    assert result.exit_code in (0, 2), result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    assert said["allowed"] is (result.exit_code == 0)
    return said


class TestGateway:
    def test_an_allowed_target_is_0_and_names_the_rule_and_its_end(self, config: str) -> None:
        result = check(config, *DATABASE, "--subject", "alice", "--group", "databases", *MONDAY)
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [
            "allow: 10.0.0.1:5432 (udp and tcp) for alice",
            "rule: databases",
            "addresses: 10.0.0.1",
            "until: 2026-03-02T17:00:00Z, then live tunnels are closed",
        ]

    def test_both_protocols_are_asked_and_one_that_is_denied_is_2(self, config: str) -> None:
        result = check(config, "--target", "8.8.8.8:53")
        assert result.exit_code == 2
        assert result.stdout.splitlines() == [
            "allow: 8.8.8.8:53 (udp) for token",
            "rule: internet",
            "addresses: 8.8.8.8",
            "deny: 8.8.8.8:53 (tcp) for token",
            "rule: default",
            "reason: target 8.8.8.8:53 is not allowed: no rule allows it",
            "names: not resolved: no address could change the decision",
        ]
        assert check(config, "--target", "8.8.8.8:53", "--protocol", "udp").exit_code == 0
        assert check(config, "--target", "8.8.8.8:53", "--protocol", "tcp").exit_code == 2

    def test_the_facts_of_both_protocols_are_an_array(self, config: str) -> None:
        result = check(config, "--target", "8.8.8.8:53", "--json")
        said = json.loads(result.stdout)
        assert result.exit_code == 2
        assert [(each["protocol"], each["allowed"]) for each in said] == [
            ("udp", True),
            ("tcp", False),
        ]
        one = facts(config, "--target", "8.8.8.8:53", "--protocol", "tcp", "--at", said[1]["at"])
        assert one == said[1]

    def test_a_denied_target_is_2_and_says_why(self, config: str) -> None:
        result = check(config, *DATABASE, "--protocol", "udp", *MONDAY)
        assert result.exit_code == 2
        lines = result.stdout.splitlines()
        assert lines[:2] == ["deny: 10.0.0.1:5432 (udp) for token", "rule: default"]
        assert "10.0.0.1:5432 is not allowed" in lines[2]

    def test_every_rule_is_explained_in_order(self, config: str) -> None:
        result = check(
            config,
            *DATABASE,
            *("--group", "users", "--protocol", "udp", "--at", "2026-03-01T12:00Z", "--explain"),
        )
        said = result.stdout.partition("rules of")[2].splitlines()[1:]
        assert said == [
            "  allow databases: does not match: roles: has no role, needs any of dba, auditor; "
            "when: not at this time (sun 2026-03-01 13:00 Europe/Berlin)",
            "  allow internet: matches, but 10.0.0.1 is special (private): only a network within "
            "10.0.0.0/8 names it",
            "  allow level: does not match: claims: there is no claim level; "
            "cidr: 10.0.0.1 not in 127.0.0.1/32",
            "  deny  not these: does not match: host: 10.0.0.1 is not *.bad.example",
        ]

    @pytest.mark.parametrize(
        ("arguments", "rule"),
        [
            ((*DATABASE, "--group", "databases", *MONDAY), "databases"),
            ((*DATABASE, "--role", "dba", *MONDAY), "databases"),
            ((*DATABASE, "--claim", "realm_access.roles=audit", *MONDAY), "databases"),
            ((*DATABASE, "--claim", "role=dba", *MONDAY), "default"),
            ((*DATABASE, "--role", "dba", "--at", "2026-03-02T07:59+01:00"), "default"),
            ((*DATABASE, "--role", "dba", "--protocol", "tcp", *MONDAY), "databases"),
            (("--target", "8.8.8.8:53"), "internet"),
            (("--target", "8.8.8.8:53", "--protocol", "tcp"), "default"),
            (("--target", "127.0.0.1:53", "--claim", "level=3"), "level"),
            (("--target", "127.0.0.1:53", "--claim", 'level="3"'), "default"),
            (("--target", "127.0.0.1:53", "--claim", "level=3", "--claim", "level=4"), "default"),
            (("--target", "db.bad.example:53"), "not these"),
        ],
    )
    def test_the_rule_is_the_one_that_the_gateway_would_name(
        self, config: str, arguments: tuple[str, ...], rule: str
    ) -> None:
        assert facts(config, *arguments)["rule"] == rule

    def test_a_name_is_resolved_as_the_gateway_does_and_that_is_said(self, config: str) -> None:
        said = facts(config, "--target", "localhost:53", "--claim", "level=3")
        assert said["resolution"].startswith("resolved by this host's hosts file and nameservers")
        assert {"address": "127.0.0.1", "allowed": True} in said["addresses"]
        assert said["rule"] == "level"

    def test_a_name_that_is_denied_as_it_is_written_is_not_resolved(self, config: str) -> None:
        said = facts(config, "--target", "db.bad.example:53")
        assert said["resolution"] == "not resolved: no address could change the decision"
        assert said["addresses"] == []

    def test_facts_have_the_documented_keys(self, config: str) -> None:
        said = facts(config, *DATABASE, "--role", "dba", *MONDAY)
        assert said == said | {
            "reason": "",
            "subject": "token",
            "roles": ["dba"],
            "target": "10.0.0.1:5432",
            "protocol": "udp",
            "at": "2026-03-02T08:00:00Z",
            "until": "2026-03-02T17:00:00Z",
            "configuration": config,
        }
        assert said["rules"][0] == {
            "name": "databases",
            "action": "allow",
            "matches": True,
            "reasons": [],
        }
        page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
        assert [key for key in said if f"`{key}`" not in page] == []

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (("--target", "10.0.0.1"), "--target"),
            (("--target", "10.0.0.1:0"), "--target"),
            ((*DATABASE, "--at", "soon"), "--at"),
            ((*DATABASE, "--claim", "team"), "--claim"),
        ],
    )
    def test_what_cannot_be_asked_is_1(
        self, config: str, arguments: tuple[str, ...], part: str
    ) -> None:
        result = check(config, *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"toppy-gw policy check: {part}")
        assert "error" in json.loads(check(config, *arguments, "--json").stdout)

    def test_a_configuration_that_is_wrong_is_1_and_named(self, tmp_path: Path) -> None:
        path = tmp_path / "gateway.toml"
        path.write_text(GATEWAY.replace('"not these"', '"internet"'))
        result = check(str(path), *DATABASE)
        assert result.exit_code == 1
        assert "policy.rules: the name 'internet' is used twice, by rule " in result.stderr
        assert "PolicyRule" not in result.stderr

    def test_the_files_that_the_configuration_names_are_not_needed(self, tmp_path: Path) -> None:
        path = tmp_path / "gateway.toml"
        path.write_text(
            '[tls]\ncertificate = "none.pem"\nprivate_key = "none.pem"\n'
            '[auth]\ntoken_file = "none"\n[[policy.rules]]\naction = "allow"\n'
        )
        assert check(str(path), "--target", "8.8.8.8:53").exit_code == 0


def client(tmp_path: Path, policy: str, **claims: object) -> str:
    token = jwt.encode(claims, "nobody here knows the issuer" * 2, "HS256") if claims else "opaque"
    path = tmp_path / "config.toml"
    path.write_text(f'gateway = "gw.example"\nauth_token = "{token}"\n{policy}')
    path.chmod(0o600)
    return str(path)


def ask(config: str, *arguments: str) -> Result:
    return runner.invoke(toppy.app, ["policy", "check", "--config", config, *arguments])


MINE = '[[policy.allow]]\nname = "mine"\nhost = "db.example"\nports = [53]\nsubjects = ["alice"]\n'


class TestClient:
    def test_the_token_says_who_asks(self, tmp_path: Path) -> None:
        allowed = ask(client(tmp_path, MINE, sub="alice"), "--target", "db.example:53")
        assert allowed.exit_code == 0
        assert allowed.stdout.splitlines() == [
            "allow: db.example:53 (udp and tcp) for alice",
            "rule: mine",
            "names: the target is decided as it is written; the gateway resolves it",
        ]
        denied = ask(client(tmp_path, MINE, sub="bob"), "--target", "db.example:53", "--explain")
        assert denied.exit_code == 2
        assert "deny: db.example:53 (udp and tcp) for bob" in denied.stdout
        assert "mine: does not match: subjects: 'bob' is not alice" in denied.stdout

    def test_a_name_is_compared_with_networks_where_it_resolves(self, tmp_path: Path) -> None:
        policy = '[[policy.allow]]\ncidr = ["127.0.0.0/8", "::1"]\nports = [53]\n'
        config = client(tmp_path, policy)
        result = ask(config, "--target", "localhost:53", "--protocol", "udp", "--json")
        assert result.exit_code == 0
        said = json.loads(result.stdout)
        assert said["resolution"].startswith("localhost was resolved by this host")
        assert {each["allowed"] for each in said["addresses"]} == {True}
        unknown = ask(config, "--target", "name.invalid:53")
        assert unknown.exit_code == 2
        assert "name.invalid has no address here" in unknown.stdout

    def test_the_protocol_counts(self, tmp_path: Path) -> None:
        config = client(tmp_path, MINE + 'protocol = "tcp"\n', sub="alice")
        assert ask(config, "--target", "db.example:53").exit_code == 2
        assert ask(config, "--target", "db.example:53", "--protocol", "udp").exit_code == 2
        assert ask(config, "--target", "db.example:53", "--protocol", "tcp").exit_code == 0

    def test_without_a_policy_it_is_denied_and_said(self, tmp_path: Path) -> None:
        result = ask(client(tmp_path, ""), "--target", "192.0.2.1:53", "--explain")
        assert result.exit_code == 2
        assert "the configuration has no [policy]" in result.stdout
        assert "none: what no rule allows is denied" in result.stdout

    def test_a_rule_that_matches_nobody_is_warned_about(self, tmp_path: Path) -> None:
        policy = MINE + 'claims = { team = "ops" }\n'
        result = ask(client(tmp_path, policy), "--target", "db.example:53")
        assert "warning: policy rule 'mine' asks for claims" in result.stderr

    def test_no_token_is_shown(self, tmp_path: Path) -> None:
        config = client(tmp_path, MINE, sub="alice")
        token = Path(config).read_text().split('"')[3]
        result = ask(config, "--target", "db.example:53", "--json", "--explain")
        assert token not in result.output
        assert token.split(".")[1] not in result.output


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("a=ops", "ops"),
        ("a=3", 3),
        ("a=1.5", 1.5),
        ("a=true", True),
        ('a="3"', "3"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=null", "null"),
        ("a=[1]", "[1]"),
        ("a=NaN", "NaN"),
        ("a=1e999", "1e999"),
    ],
)
def test_a_claim_is_a_scalar(written: str, value: object) -> None:
    (found,) = parse_claims([written])["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("written", ["", "a", "=b"])
def test_a_claim_without_a_name_or_a_value_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="--claim"):
        parse_claims([written])
