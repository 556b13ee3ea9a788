"""A deny wins, then the first that allows; default deny; special addresses only when named."""

from __future__ import annotations

import ipaddress
import re
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppy.config.policy import PolicyRule
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.address_guard import embedded_address, special
from toppy.policy.ruleset import DEFAULT_RULE, Decision, Ruleset

NOW = 1_700_000_000.0
ALICE = Identity("alice", "jwt", {"team": "ops", "level": 3, "admin": True})


def rules(*tables: dict[str, Any], **options: Any) -> Ruleset:
    return Ruleset(
        [PolicyRule.model_validate({"action": "allow"} | table) for table in tables], **options
    )


def decide(
    ruleset: Ruleset,
    host: str,
    port: int = 53,
    *,
    addresses: tuple[str, ...] = (),
    who: Identity = ALICE,
    own: frozenset[str] = frozenset(),
    now: float = NOW,
) -> Decision:
    return ruleset.decide(who, Target(host, port), addresses or (host,), own, now=now)


def is_special(text: str) -> bool:
    return special(ipaddress.ip_address(text)) is not None


PUBLIC = "93.184.215.14"
PUBLIC_6 = "2606:4700::1111"


class TestRules:
    def test_no_rule_denies_and_the_reason_names_the_target(self) -> None:
        decision = decide(rules(), PUBLIC)
        assert not decision.is_allowed
        assert decision.rule == DEFAULT_RULE
        assert f"{PUBLIC}:53 is not allowed" in decision.reason

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_deny_wins_wherever_it_stands(self, order: int) -> None:
        tables = [
            {"name": "not this", "action": "deny", "cidr": PUBLIC},
            {"name": "the rest", "cidr": "0.0.0.0/0"},
        ]
        ruleset = rules(*tables[::order])
        assert decide(ruleset, PUBLIC).rule == "not this"
        assert "'not this'" in decide(ruleset, PUBLIC).reason
        assert decide(ruleset, "93.184.215.15").rule == "the rest"

    @pytest.mark.parametrize("action", ["allow", "deny"])
    def test_the_first_of_several_that_match_is_the_one_that_is_named(self, action: str) -> None:
        both = {"action": action, "cidr": "0.0.0.0/0"}
        ruleset = rules(
            {"action": action, "ports": [1]}, {"name": "first", **both}, {"name": "second", **both}
        )
        assert decide(ruleset, PUBLIC).rule == "first"

    @pytest.mark.parametrize(
        ("rule", "is_allowed"),
        [
            ({}, True),
            ({"ports": [53]}, True),
            ({"ports": ["50-60"]}, True),
            ({"ports": [54, "100-200"]}, False),
            ({"protocol": "udp"}, True),
            ({"protocol": ["tcp"]}, False),
            ({"subjects": "alice"}, True),
            ({"subjects": ["bob", "al*"]}, True),
            ({"subjects": ["bob", "al"]}, False),
            ({"subjects": "a.*"}, False),
            ({"claims": {"team": "ops"}}, True),
            ({"claims": {"team": ["net", "ops"], "level": 3}}, True),
            ({"claims": {"team": "net"}}, False),
            ({"claims": {"missing": "x"}}, False),
            ({"claims": {"admin": 1}}, False),
            ({"cidr": "93.184.0.0/16", "ports": [54]}, False),
            ({"cidr": "93.185.0.0/16"}, False),
            ({"host": "*"}, True),
            ({"host": "db.example"}, False),
        ],
    )
    def test_every_given_criterion_must_match(self, rule: dict[str, Any], is_allowed: bool) -> None:
        assert decide(rules(rule), PUBLIC).is_allowed is is_allowed

    @pytest.mark.parametrize(
        ("pattern", "host", "is_allowed"),
        [
            ("db.example.com", "db.example.com", True),
            ("DB.example.com.", "db.example.com", True),
            ("*.example.com", "db.example.com", True),
            ("*.example.com", "a.b.example.com", True),
            ("*.example.com", "example.com", False),
            ("*.example.com", "evilexample.com", False),
            ("example.com", "db.example.com", False),
        ],
    )
    def test_host_patterns(self, pattern: str, host: str, is_allowed: bool) -> None:
        ruleset = rules({"host": pattern})
        assert decide(ruleset, host, addresses=(PUBLIC,)).is_allowed is is_allowed
        assert ruleset.may_resolve(ALICE, Target(host, 53), now=NOW).is_allowed is is_allowed

    def test_only_the_allowed_ones_of_several_addresses_are_granted_in_order(self) -> None:
        ruleset = rules({"cidr": ["93.184.0.0/16", "2606::/16"]})
        decision = decide(
            ruleset, "name.example", addresses=("10.0.0.1", PUBLIC_6, "8.8.8.8", PUBLIC)
        )
        assert decision.addresses == (PUBLIC_6, PUBLIC)

    def test_a_name_that_no_rule_could_allow_is_not_resolved(self) -> None:
        ruleset = rules({"host": "*.corp.example"}, {"ports": [443]})
        assert not ruleset.may_resolve(ALICE, Target("db.other.example", 53), now=NOW).is_allowed
        assert ruleset.may_resolve(ALICE, Target("db.other.example", 443), now=NOW).is_allowed

    def test_a_deny_of_a_name_stands_before_resolution(self) -> None:
        ruleset = rules({"host": "*"}, {"name": "no", "action": "deny", "host": "bad.example"})
        decision = ruleset.may_resolve(ALICE, Target("bad.example", 53), now=NOW)
        assert not decision.is_allowed
        assert decision.rule == "no"

    def test_rules_without_a_name_are_numbered_from_one(self) -> None:
        assert decide(rules({"ports": [1]}, {}), PUBLIC).rule == "rule 2"


SPECIAL = [
    *("127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1"),
    *("172.31.255.255", "192.168.1.1", "169.254.1.1", "169.254.169.254", "100.64.0.1"),
    *("100.100.100.200", "224.0.0.1", "239.255.255.255", "255.255.255.255", "240.0.0.1"),
    *("192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
    *("::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
    *("100::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::10.0.0.1", "64:ff9b::a00:1"),
    *("64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:a00:1::1", "2002:7f00:1::"),
    *("::ffff:0:127.0.0.1", "2001:0:0:0:0:0:f5ff:fffe", "fe80::5efe:10.0.0.1"),
    *("2606:4700::5efe:a00:1", "168.63.129.16", "fe80::5efe:8.8.8.8", "ff0e::200:5efe:8.8.8.8"),
    *("fd12::5efe:8.8.8.8", "200::1", "4000::1", "a000::1", "::2", "::8.8.8.8", "100:0:0:1::1"),
    *("64:ff9b:1::808:808", "64:ff9b:1:8:8:800::", "fe80::a9fe:a9fe", "fd00:42::42"),
]


class TestSpecialAddresses:
    @pytest.mark.parametrize("address", SPECIAL)
    def test_a_special_address_needs_a_rule_that_names_it(self, address: str) -> None:
        text = str(ipaddress.ip_address(address))
        for rule in ({}, {"cidr": ["0.0.0.0/0", "::/0"]}, {"host": "*"}):
            decision = decide(rules(rule), text)
            assert not decision.is_allowed
            assert decision.category or "no rule" in decision.reason

    @pytest.mark.parametrize(
        "address",
        [PUBLIC, PUBLIC_6, "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "8.8.8.8"],
    )
    def test_a_public_address_needs_no_more_than_an_ordinary_rule(self, address: str) -> None:
        text = str(ipaddress.ip_address(address))
        assert decide(rules({"cidr": ["0.0.0.0/0", "::/0"]}), text).is_allowed

    @pytest.mark.parametrize(
        ("cidr", "address", "is_allowed"),
        [
            ("10.1.0.0/16", "10.1.2.3", True),
            ("10.0.0.0/8", "10.1.2.3", True),
            ("8.0.0.0/6", "10.1.2.3", False),
            ("127.0.0.1", "127.0.0.1", True),
            ("169.254.0.0/16", "169.254.169.254", False),
            ("169.254.169.254", "169.254.169.254", True),
            ("100.64.0.0/10", "100.100.100.200", False),
            ("10.0.0.0/8", "::ffff:10.0.0.1", True),
            ("::ffff:10.0.0.0/104", "::ffff:10.0.0.1", True),
            ("::/0", "::ffff:10.0.0.1", False),
            ("64:ff9b::/96", "64:ff9b::a00:1", False),
            ("64:ff9b::a00:0/104", "64:ff9b::a00:1", True),
            ("64:ff9b::a00:0/104", "64:ff9b::a9fe:a9fe", False),
            ("::ffff:0:0/96", "127.0.0.1", False),
            ("::ffff:10.0.0.0/104", "10.0.0.1", True),
            ("2002::/16", "2002:a00:1::1", False),
            ("2002:a00:1::/48", "2002:a00:1::1", True),
            ("2001::/32", "2001:0:808:808:0:0:f5ff:fffe", False),
            ("2001::f5ff:fffe", "2001::f5ff:fffe", True),
            ("64:ff9b:1::/96", "64:ff9b:1::808:808", True),
            ("64:ff9b:1::/96", "64:ff9b:1::a9fe:a9fe", False),
            ("64:ff9b:1::/48", "64:ff9b:1:8:8:800::", False),
            ("64:ff9b:1:8:8:800::", "64:ff9b:1:8:8:800::", True),
            ("8.8.8.8", "fe80::5efe:808:808", False),
            ("8.8.8.8", "2600::5efe:808:808", False),
            ("10.0.0.1", "2600::200:5efe:a00:1", False),
            ("2600::200:5efe:a00:1", "2600::200:5efe:a00:1", True),
            ("2600::/16", "2600::5efe:808:808", True),
            ("fe80::/10", "fe80::5efe:808:808", True),
            ("fe80::/10", "fe80::a9fe:a9fe", False),
            ("200::/7", "201::1", True),
            ("fd00::/8", "fd00:1::1", True),
            ("fd00::/8", "fd00:ec2::254", False),
            ("::1", "::1", True),
        ],
    )
    def test_a_rule_names_what_lies_inside_the_special_range(
        self, cidr: str, address: str, is_allowed: bool
    ) -> None:
        assert decide(rules({"cidr": cidr}), address).is_allowed is is_allowed

    def test_who_gives_his_host_an_allowed_hosts_isatap_address_is_not_allowed(self) -> None:
        # the prefix is anybody's; only a deny rule takes the identifier at its word
        allowed = {"cidr": ["8.8.8.8", "2600::/16"]}
        denied = {"action": "deny", "cidr": "8.8.8.8"}
        assert not decide(rules({"cidr": "8.8.8.8"}), "2a00::5efe:808:808").is_allowed
        assert decide(rules(allowed), "2600::5efe:808:808").is_allowed
        assert not decide(rules(allowed, denied), "2600::5efe:808:808").is_allowed

    def test_a_name_alone_does_not_open_a_private_address(self) -> None:
        by_name = rules({"host": "db.corp.example"})
        assert not decide(by_name, "db.corp.example", addresses=("10.0.0.5",)).is_allowed
        both = rules({"host": "db.corp.example", "cidr": "10.0.0.0/8"})
        assert decide(both, "db.corp.example", addresses=("10.0.0.5",)).is_allowed
        assert not decide(both, "other.example", addresses=("10.0.0.5",)).is_allowed

    def test_the_gateways_own_public_address_needs_naming(self) -> None:
        own = frozenset({PUBLIC})
        assert not decide(rules({"cidr": "0.0.0.0/0"}), PUBLIC, own=own).is_allowed
        assert decide(rules({"cidr": PUBLIC}), PUBLIC, own=own).is_allowed

    def test_a_deny_rule_needs_no_naming(self) -> None:
        ruleset = rules(
            {"name": "no", "action": "deny", "cidr": "0.0.0.0/0"}, {"cidr": "10.0.0.0/8"}
        )
        assert decide(ruleset, "10.0.0.1").rule == "no"

    def test_a_deny_of_ipv4_covers_the_forms_that_embed_it(self) -> None:
        ruleset = rules(
            {"name": "no", "action": "deny", "cidr": "8.8.8.8"},
            {"cidr": ["0.0.0.0/0", "::/0"]},
        )
        for form in ("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"):
            assert decide(ruleset, str(ipaddress.ip_address(form))).rule == "no"

    def test_a_client_does_not_judge_addresses_that_are_not_its_own(self) -> None:
        assert decide(rules({"cidr": "0.0.0.0/0"}, guards_special=False), "10.0.0.1").is_allowed

    @given(st.ip_addresses(v=4))
    def test_every_embedded_form_is_judged_like_what_it_embeds(
        self, address: ipaddress.IPv4Address
    ) -> None:
        bits = int(address)
        forms = [
            ipaddress.IPv6Address(0xFFFF << 32 | bits),
            ipaddress.IPv6Address((0x64FF9B << 96) | bits),
            ipaddress.IPv6Address((0x2002 << 112) | bits << 80),
        ]
        for form in forms:
            assert embedded_address(form) == address
            assert (special(form) is None) == (special(address) is None)

    @given(st.ip_addresses())
    def test_what_python_calls_private_is_special(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address
    ) -> None:
        if embedded_address(address) is None and (
            address.is_private or address.is_multicast or address.is_link_local
        ):
            assert is_special(str(address))

    @given(st.ip_addresses(), st.booleans())
    def test_without_an_allow_rule_nothing_is_allowed(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, guards: bool
    ) -> None:
        ruleset = rules({"action": "deny", "ports": [1]}, guards_special=guards)
        assert not decide(ruleset, str(address)).is_allowed


class TestNames:
    @pytest.mark.parametrize("host", ["8.8.8.8", "2001:db8::8.8"])
    def test_a_pattern_of_names_matches_no_address(self, host: str) -> None:
        assert not rules({"host": "*.8.8"}).may_resolve(ALICE, Target(host, 53), now=NOW).is_allowed

    @pytest.mark.parametrize(
        ("tables", "is_allowed"),
        [
            ([], False),
            ([{"host": "db.example"}], True),
            ([{"host": "other.example"}], False),
            ([{"cidr": "10.0.0.0/8"}], None),
            ([{"cidr": "10.0.0.0/8"}, {"host": "db.example"}], True),
            ([{"action": "deny", "cidr": "10.0.0.0/8"}, {"host": "db.example"}], None),
            ([{"host": "db.example"}, {"action": "deny", "cidr": "10.0.0.0/8"}], None),
            ([{"cidr": "10.0.0.0/8"}, {"action": "deny", "host": "db.example"}], False),
            ([{"action": "deny", "cidr": "10.0.0.0/8"}], False),
            ([{"action": "deny", "host": "*"}, {"cidr": "10.0.0.0/8"}], False),
            ([{"host": "db.example", "cidr": "10.0.0.0/8"}], None),
            ([{"host": "other.example", "cidr": "10.0.0.0/8"}], False),
        ],
    )
    def test_a_client_decides_by_name_what_no_address_can_change(
        self, tables: list[dict[str, Any]], is_allowed: bool | None
    ) -> None:
        decision = rules(*tables, guards_special=False).decide_name(
            ALICE, Target("db.example", 53), now=NOW
        )
        assert (decision.is_allowed if decision is not None else None) is is_allowed

    def test_a_gateway_never_allows_by_name_alone(self) -> None:
        assert rules({"host": "*"}).decide_name(ALICE, Target("db.example", 53), now=NOW) is None

    def test_a_name_without_an_address_is_denied(self) -> None:
        decision = rules({}).decide(ALICE, Target("db.example", 53), (), now=NOW)
        assert not decision.is_allowed
        assert "db.example:53 is not allowed: it has no address" in decision.reason

    def test_the_refusal_that_tells_most_is_given(self) -> None:
        ruleset = rules({"cidr": "10.0.0.0/7", "ports": [53]})
        decision = decide(ruleset, "db.example", addresses=("8.8.8.8", "10.0.0.1", "9.9.9.9"))
        assert decision.category == "private"
        assert "10.0.0.1" in decision.reason
        assert "db.example:53 is not allowed" in decision.reason


class TestExplanations:
    @pytest.mark.parametrize(
        ("rule", "reason"),
        [
            ({"protocol": "tcp"}, "protocol: udp is not tcp"),
            ({"ports": [1, "60-70"]}, "ports: 53 is not any of 1, 60-70"),
            ({"host": "db.example"}, f"host: {PUBLIC} is not db.example"),
            ({"subjects": "bob"}, "subjects: 'alice' is not bob"),
            ({"roles": "dba"}, "roles: has no role, needs dba"),
            ({"claims": {"team": "net"}}, "claims: team is 'ops', not 'net'"),
            ({"claims": {"x": [1, 2]}}, "claims: there is no claim x"),
            ({"cidr": "10.0.0.0/8"}, f"cidr: {PUBLIC} not in 10.0.0.0/8"),
        ],
    )
    def test_each_criterion_says_why_it_does_not_match(
        self, rule: dict[str, Any], reason: str
    ) -> None:
        (finding,) = rules(rule).explain(ALICE, Target(PUBLIC, 53), [PUBLIC], now=NOW)
        assert (finding.matches, finding.reasons) == (False, (reason,))

    def test_every_criterion_is_told(self) -> None:
        rule = {"protocol": "tcp", "ports": [1], "subjects": "bob", "cidr": "10.0.0.0/8"}
        (finding,) = rules(rule).explain(ALICE, Target(PUBLIC, 53), [PUBLIC], now=NOW)
        keys = [reason.partition(":")[0] for reason in finding.reasons]
        assert keys == ["protocol", "ports", "subjects", "cidr"]

    def test_a_rule_that_matches_and_does_not_open_a_special_address_says_so(self) -> None:
        (finding,) = rules({}).explain(ALICE, Target("10.0.0.1", 53), ["10.0.0.1"], now=NOW)
        assert finding.matches
        assert "10.0.0.1 is special (private)" in finding.reasons[0]

    def test_without_an_address_a_network_is_left_out_and_that_is_said(self) -> None:
        ruleset = rules({"cidr": "10.0.0.0/8"})
        (finding,) = ruleset.explain(ALICE, Target("db.example", 53), (), now=NOW)
        assert finding.matches
        assert "not compared" in finding.reasons[0]


class TestSubjects:
    @given(
        st.text("ab*", min_size=1, max_size=8),
        st.text("ab", max_size=10),
    )
    def test_a_pattern_matches_like_the_regular_expression(self, pattern: str, text: str) -> None:
        wanted = re.fullmatch(pattern.replace("*", ".*"), text) is not None
        found = decide(rules({"subjects": pattern}), PUBLIC, who=Identity(text, "jwt"))
        assert found.is_allowed is wanted

    def test_no_subject_makes_a_pattern_slow(self) -> None:
        # a backtracking matcher would need about 10^19 steps
        who = Identity("a" * 8000, "jwt")
        assert not decide(rules({"subjects": "*a*a*a*a*b"}), PUBLIC, who=who).is_allowed


networks = st.one_of(
    st.builds(
        lambda a, n: ipaddress.ip_network((int(a), n), strict=False),
        st.ip_addresses(v=4),
        st.integers(0, 32),
    ),
    st.builds(
        lambda a, n: ipaddress.ip_network((a, n), strict=False),
        st.ip_addresses(v=6),
        st.integers(0, 128),
    ),
    st.sampled_from(["10.0.0.0/8", "127.0.0.0/8", "0.0.0.0/0", "::/0", "64:ff9b::/96"]).map(
        ipaddress.ip_network
    ),
)
tables = st.fixed_dictionaries(
    {"action": st.sampled_from(["allow", "deny"])},
    optional={
        "cidr": st.lists(networks.map(str), min_size=1, max_size=3),
        "host": st.sampled_from(["*", "*.example", "db.example"]),
        "ports": st.sampled_from([[53], ["1-100"], [443]]),
        "subjects": st.sampled_from(["alice", "bob", "a*"]),
        "protocol": st.sampled_from(["udp", "tcp"]),
    },
)
rule_lists = st.lists(tables, max_size=5)
answers = st.lists(
    st.one_of(st.ip_addresses(), st.sampled_from(["10.0.0.1", "127.0.0.1", "64:ff9b::a00:1"])).map(
        str
    ),
    max_size=4,
)
hosts = st.sampled_from(["db.example", "a.b.example", "other.test"])


class TestProperties:
    @given(rule_lists, hosts, answers)
    def test_only_given_addresses_are_allowed_and_their_order_is_kept(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        decision = rules(*given_rules).decide(ALICE, Target(host, 53), addresses, now=NOW)
        assert decision.is_allowed is bool(decision.addresses)
        rest = iter(addresses)
        assert all(address in rest for address in decision.addresses)
        if not decision.is_allowed:
            assert f"{host}:53 is not allowed" in decision.reason
        else:
            named = [f"rule {n}" for n, r in enumerate(given_rules, 1) if r["action"] == "allow"]
            assert decision.rule in named

    @given(rule_lists, hosts, answers)
    def test_what_may_not_be_resolved_would_be_denied_whatever_it_resolved_to(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        for guards in (True, False):
            ruleset = rules(*given_rules, guards_special=guards)
            if not ruleset.may_resolve(ALICE, Target(host, 53), now=NOW).is_allowed:
                assert not ruleset.decide(ALICE, Target(host, 53), addresses, now=NOW).is_allowed

    @given(rule_lists, hosts, answers.filter(bool))
    def test_a_decision_by_name_is_the_decision_for_every_address(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        for guards in (True, False):
            ruleset = rules(*given_rules, guards_special=guards)
            by_name = ruleset.decide_name(ALICE, Target(host, 53), now=NOW)
            if by_name is not None:
                decision = ruleset.decide(ALICE, Target(host, 53), addresses, now=NOW)
                assert decision.is_allowed is by_name.is_allowed
                assert len(decision.addresses) == (len(addresses) if by_name.is_allowed else 0)

    @given(rule_lists, hosts, answers)
    def test_a_deny_of_everything_leaves_nothing_wherever_it_stands(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        for tables in ([{"action": "deny"}, *given_rules], [*given_rules, {"action": "deny"}]):
            decision = rules(*tables).decide(ALICE, Target(host, 53), addresses, now=NOW)
            assert not decision.is_allowed

    @given(rule_lists, hosts, answers, st.randoms(use_true_random=False))
    def test_the_order_of_rules_changes_the_name_and_nothing_else(
        self,
        given_rules: list[dict[str, Any]],
        host: str,
        addresses: list[str],
        random: Random,
    ) -> None:
        shuffled = given_rules.copy()
        random.shuffle(shuffled)
        first, second = (
            rules(*tables).decide(ALICE, Target(host, 53), addresses, now=NOW)
            for tables in (given_rules, shuffled)
        )
        assert first.addresses == second.addresses
        assert first.category == second.category

    @given(rule_lists, tables, hosts, answers)
    def test_one_more_deny_never_allows_more(
        self,
        given_rules: list[dict[str, Any]],
        table: dict[str, Any],
        host: str,
        addresses: list[str],
    ) -> None:
        more = rules(*given_rules, {**table, "action": "deny"})
        fewer = rules(*given_rules)
        assert set(more.decide(ALICE, Target(host, 53), addresses, now=NOW).addresses) <= set(
            fewer.decide(ALICE, Target(host, 53), addresses, now=NOW).addresses
        )

    @given(rule_lists, hosts, answers.filter(bool))
    def test_the_explanation_and_the_decision_agree(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        ruleset = rules(*given_rules)
        for address in addresses:
            decision = ruleset.decide(ALICE, Target(host, 53), [address], now=NOW)
            findings = ruleset.explain(ALICE, Target(host, 53), [address], now=NOW)
            deciding = [
                each.name
                for action in ("deny", "allow")
                for each in findings
                if each.matches and each.action == action and (action == "deny" or not each.reasons)
            ]
            assert decision.rule == (deciding[0] if deciding else DEFAULT_RULE)
            assert all(each.reasons for each in findings if not each.matches)

    @given(rule_lists, hosts, answers)
    def test_guarding_special_addresses_never_allows_more(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        guarded = rules(*given_rules).decide(ALICE, Target(host, 53), addresses, now=NOW)
        trusting = rules(*given_rules, guards_special=False).decide(
            ALICE, Target(host, 53), addresses, now=NOW
        )
        assert set(guarded.addresses) <= set(trusting.addresses)

    @given(rule_lists, hosts, answers)
    def test_a_special_address_is_allowed_only_by_a_network_inside_its_range(
        self, given_rules: list[dict[str, Any]], host: str, addresses: list[str]
    ) -> None:
        allowed = rules(*given_rules).decide(ALICE, Target(host, 53), addresses, now=NOW).addresses
        written = [
            ipaddress.ip_network(text)
            for rule in given_rules
            if rule["action"] == "allow"
            for text in rule.get("cidr", ())
        ]
        networks_meant = [n for n in written if n.prefixlen]
        for text in allowed:
            found = special(ipaddress.ip_address(text))
            if found is not None:
                assert any(
                    n.prefixlen >= found.network.prefixlen or n.version != found.network.version
                    for n in networks_meant
                )
