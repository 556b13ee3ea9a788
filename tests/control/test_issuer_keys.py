"""The issuer's keys: fetched, renewed, kept, and never asked for too often."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.control.virtual_time import run_in_virtual_time
from tests.net.oidc_provider import ISSUER, JWKS, NOW, FakeProvider, sign
from toppy.auth.authenticator import Authenticator
from toppy.auth.issuer import IssuerVerifier, NoKeysError
from toppy.auth.jwt import AuthenticationError
from toppy.control.admission import Admission
from toppy.control.issuer_keys import LEAST_INTERVAL_S, IssuerKeys
from toppy.model.grant import Denial, Grant
from toppy.net.resolver import Resolver
from toppy.policy.ruleset import Ruleset
from toppy.wire.ipc_message import AdmissionRequest, LiveTunnel

T = TypeVar("T")
TOKEN = sign(iss=ISSUER, aud="urn:gw", sub="alice", exp=NOW + 600)
NEXT_KEY = rsa.generate_private_key(65537, 2048)
NEXT_JWKS = json.dumps(
    {
        "keys": [
            {
                **jwt.algorithms.RSAAlgorithm.to_jwk(NEXT_KEY.public_key(), as_dict=True),
                "kid": "two",
            }
        ]
    }
)
NEXT_TOKEN = jwt.encode(
    {"iss": ISSUER, "aud": "urn:gw", "sub": "alice", "exp": NOW + 600},
    NEXT_KEY,
    "RS256",
    headers={"kid": "two"},
)


class Scene:
    def __init__(self, folder: Path) -> None:
        self.provider = FakeProvider()
        self.keys = IssuerKeys(folder, connect=self.provider.connect)
        self.verifier = IssuerVerifier(ISSUER, "urn:gw")
        self.keys.follow(self.verifier, 300.0)
        self.admission = Admission(
            Authenticator(oidc=self.verifier),
            Ruleset(()),
            Resolver((), 1.0),
            lambda: NOW,
            self.keys,
        )

    @property
    def fetches(self) -> int:
        return self.provider.paths().count("/jwks")

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def both() -> T:
            task = asyncio.get_running_loop().create_task(self.keys.run())
            try:
                return await main()
            finally:
                task.cancel()
                await asyncio.wait({task})

        return run_in_virtual_time(both())

    def is_good(self, token: str = TOKEN) -> bool:
        try:
            self.verifier.verify(token, NOW)
        except AuthenticationError:
            return False
        return True

    async def decide(self, token: str) -> Grant | Denial:
        return await self.admission.decide(
            AdmissionRequest(1, f"Bearer {token}", "gw", 9, "udp", True, "")
        )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_keys_are_fetched_at_the_start_and_again_and_again(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        assert scene.is_good()
        assert scene.fetches == 1
        await asyncio.sleep(1000)
        assert scene.fetches == 4

    scene.run(main)


def test_known_keys_serve_while_the_issuer_is_down(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        scene.provider.is_down = True
        await asyncio.sleep(5000)
        assert scene.is_good()
        assert "cannot be reached" in scene.keys.problem
        scene.provider.is_down = False
        await asyncio.sleep(61)
        assert scene.keys.problem == ""

    scene.run(main)


def test_the_next_control_plane_has_the_keys_although_the_issuer_is_down(
    scene: Scene, tmp_path: Path
) -> None:
    scene.run(lambda: asyncio.sleep(1))
    assert (tmp_path / "issuer-keys.json").stat().st_mode & 0o777 == 0o600
    after = Scene(tmp_path)
    assert after.is_good()
    (tmp_path / "issuer-keys.json").write_text("{")
    assert not Scene(tmp_path).is_good()


def test_a_reload_keeps_the_keys_and_another_issuer_does_not_get_them(scene: Scene) -> None:
    scene.run(lambda: asyncio.sleep(1))
    again = IssuerVerifier(ISSUER, "urn:gw")
    scene.keys.follow(again, 300.0)
    assert again.verify(TOKEN, NOW)
    other = IssuerVerifier("https://other.example", "urn:gw")
    scene.keys.follow(other, 300.0)
    assert not other.has_keys


def test_without_an_issuer_nothing_is_fetched_until_there_is_one(scene: Scene) -> None:
    async def main() -> None:
        scene.keys.follow(None, 300.0)
        await asyncio.sleep(1000)
        assert scene.fetches == 0
        scene.keys.follow(IssuerVerifier(ISSUER, "urn:gw"), 300.0)
        await asyncio.sleep(1)
        assert scene.fetches == 1

    scene.run(main)


def test_a_key_that_is_new_at_the_issuer_is_fetched_when_a_token_names_it(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(LEAST_INTERVAL_S + 1)
        scene.provider.jwks = NEXT_JWKS
        decided = await asyncio.gather(*(scene.decide(NEXT_TOKEN) for _ in range(20)))
        assert all(isinstance(each, Grant) and each.subject == "alice" for each in decided)
        assert scene.fetches == 2
        refused = await scene.decide(TOKEN)
        assert isinstance(refused, Denial)
        assert refused.status == 401

    scene.run(main)


def test_the_first_token_waits_for_the_first_keys(scene: Scene) -> None:
    async def main() -> None:
        assert isinstance(await scene.decide(TOKEN), Grant)

    scene.run(main)


def test_made_up_keys_cause_few_fetches(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        for _ in range(200):
            assert isinstance(await scene.decide(NEXT_TOKEN), Denial)
            assert not scene.admission.is_valid(f"Bearer {NEXT_TOKEN}")
            await asyncio.sleep(0.5)
        assert scene.fetches <= 2 + 100 / LEAST_INTERVAL_S

    scene.run(main)


def test_a_silent_issuer_holds_a_token_for_a_moment_only(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(LEAST_INTERVAL_S + 1)
        silent = asyncio.Event()

        async def fetch(verifier: IssuerVerifier) -> None:
            await silent.wait()

        scene.keys._fetch = fetch  # type: ignore[method-assign]
        began = asyncio.get_running_loop().time()
        assert isinstance(await scene.decide(NEXT_TOKEN), Denial)
        assert asyncio.get_running_loop().time() - began < 5
        assert isinstance(await scene.decide(TOKEN), Grant)

    scene.run(main)


def test_a_key_set_that_is_no_use_is_a_problem_and_changes_nothing(scene: Scene) -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        scene.provider.jwks = '{"keys": []}'
        await asyncio.sleep(400)
        assert "no public key" in scene.keys.problem
        assert scene.is_good()

    scene.run(main)


def live_tunnel() -> LiveTunnel:
    return LiveTunnel(
        connection=1,
        quarter_stream_id=0,
        source="",
        host="gw",
        port=9,
        protocol="udp",
        address="",
        subject="alice",
        rule="",
        opened_at=0.0,
        datagrams_to_target=0,
        datagrams_to_client=0,
        authorization=f"Bearer {TOKEN}",
    )


def test_a_live_tunnel_is_not_cut_only_because_the_keys_are_not_here_yet(scene: Scene) -> None:
    assert scene.admission.recheck(live_tunnel()) is None
    with pytest.raises(NoKeysError):
        scene.verifier.verify(TOKEN, NOW)
    scene.verifier.use_keys(NEXT_JWKS)
    cut = scene.admission.recheck(live_tunnel())
    assert cut is not None
    assert cut.status == 401
    scene.verifier.use_keys(JWKS)
    assert scene.admission.recheck(live_tunnel()) is None
