"""Rules that name roles and groups, and who is given them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from toppy.config.policy import PolicyRole, PolicyRule
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.ruleset import Ruleset

TARGET = Target("192.0.2.7", 53)
RULES = Ruleset(
    [PolicyRule.model_validate({"action": "allow", "host": "*", "roles": ["ops", "net"]})],
    guards_special=False,
)


def is_allowed(identity: Identity) -> bool:
    return RULES.decide(identity, TARGET, [TARGET.host], now=0.0).is_allowed


@pytest.mark.parametrize("roles", [("ops",), ("net",), ("other", "net")])
def test_any_role_of_a_rule_will_do(roles: tuple[str, ...]) -> None:
    assert is_allowed(Identity("alice", "oidc", {}, roles))


@pytest.mark.parametrize(
    "identity",
    [
        Identity("alice", "oidc"),
        Identity("alice", "oidc", {}, ("other", "OPS", "op")),
        Identity("ops", "jwt", {"roles": "ops", "role": "ops"}),
    ],
)
def test_a_claim_or_a_name_is_no_role(identity: Identity) -> None:
    assert not is_allowed(identity)


def role_rules(*roles: dict[str, Any]) -> Ruleset:
    """A rule for the role ``ops``, and who is given it."""
    return Ruleset(
        [PolicyRule.model_validate({"action": "allow", "host": "*", "roles": ["ops"]})],
        roles=[PolicyRole.model_validate({"role": "ops"} | each) for each in roles],
        guards_special=False,
    )


def has_role(ruleset: Ruleset, identity: Identity) -> bool:
    return ruleset.decide(identity, TARGET, [TARGET.host], now=0.0).is_allowed


@pytest.mark.parametrize(
    ("mapping", "identity", "is_given"),
    [
        ({"subjects": "alice"}, Identity("alice", "jwt"), True),
        ({"subjects": ["al*", "bob"]}, Identity("alan", "jwt"), True),
        ({"subjects": "alice"}, Identity("bob", "jwt"), False),
        ({"groups": "admins"}, Identity("bob", "jwt", groups=("users", "admins")), True),
        ({"groups": "admins"}, Identity("bob", "jwt", {"groups": "admins"}), False),
        ({"groups": "admins"}, Identity("bob", "jwt", groups=("Admins",)), False),
        ({"claims": {"team": "ops"}}, Identity("bob", "jwt", {"team": "ops"}), True),
        ({"claims": {"team": "ops"}}, Identity("bob", "jwt", {"team": "net"}), False),
        (
            {"subjects": "alice", "claims": {"team": "ops"}},
            Identity("alice", "jwt", {"team": "net"}),
            False,
        ),
    ],
)
def test_the_policy_gives_roles_by_subject_group_and_claim(
    mapping: dict[str, Any], identity: Identity, is_given: bool
) -> None:
    ruleset = role_rules(mapping)
    assert has_role(ruleset, identity) is is_given
    assert ruleset.with_roles(identity, TARGET).roles == (("ops",) if is_given else ())


def test_a_role_of_the_login_stays_beside_those_of_the_policy() -> None:
    ruleset = role_rules({"subjects": "alice"}, {"groups": "users"})
    alice = Identity("alice", "oidc", roles=("net", "ops"), groups=("users",))
    assert ruleset.with_roles(alice, TARGET).roles == ("net", "ops")


@pytest.mark.parametrize(
    "mapping",
    [
        {"role": "ops"},
        {"role": "", "subjects": "a"},
        {"role": "ops", "subjects": []},
        {"role": "ops", "groups": [""]},
    ],
)
def test_a_role_says_whose_it_is(mapping: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyRole.model_validate(mapping)


def test_groups_of_a_rule_are_those_of_the_token() -> None:
    ruleset = Ruleset(
        [PolicyRule.model_validate({"action": "allow", "host": "*", "groups": ["dba", "ops"]})],
        guards_special=False,
    )
    assert has_role(ruleset, Identity("a", "jwt", groups=("users", "ops")))
    assert not has_role(ruleset, Identity("a", "jwt", {"group": "ops"}, roles=("ops",)))
    (finding,) = ruleset.explain(Identity("a", "jwt"), TARGET, [TARGET.host], now=0.0)
    assert finding.reasons == ("groups: has no group, needs any of dba, ops",)
