"""The groups of a token, as its issuer says them."""

from __future__ import annotations

from typing import Any

import pytest

from toppy.auth.jwt import identity_of


@pytest.mark.parametrize(
    ("claim", "groups"),
    [
        (["ops", "net"], ("ops", "net")),
        ("ops", ("ops",)),
        ([], ()),
        (None, ()),
        (5, ()),
        ({"ops": True}, ()),
        (["ops", 5, None, ["net"]], ("ops",)),
    ],
)
def test_groups_are_a_list_of_texts_or_one(claim: Any, groups: tuple[str, ...]) -> None:
    assert identity_of({"sub": "alice", "groups": claim}).groups == groups


def test_without_the_claim_there_are_none() -> None:
    identity = identity_of({"sub": "alice", "group": "ops", "roles": ["ops"]})
    assert (identity.groups, identity.roles) == ((), ())


def test_a_token_with_very_many_groups_has_a_bounded_number() -> None:
    many = [f"group-{number}" for number in range(10_000)]
    assert identity_of({"sub": "alice", "groups": many}).groups == tuple(many[:512])
