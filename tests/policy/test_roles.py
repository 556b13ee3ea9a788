"""Rules that name roles."""

from __future__ import annotations

import pytest

from toppy.config.policy import PolicyRule
from toppy.model.identity import Identity
from toppy.model.target import Target
from toppy.policy.ruleset import Ruleset

TARGET = Target("192.0.2.7", 53)
RULES = Ruleset(
    [PolicyRule.model_validate({"action": "allow", "host": "*", "roles": ["ops", "net"]})],
    guards_special=False,
)


def is_allowed(identity: Identity) -> bool:
    return RULES.decide(identity, TARGET, [TARGET.host]).is_allowed


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
