"""The way to new code: one at a time, and not with what a trial cannot try."""

from __future__ import annotations

import asyncio

import pytest

from toppy.config.gateway import GatewayConfig, parse_gateway_config
from toppy.control.admin import AdminError
from toppy.control.upgrade import Upgrade, UpgradeError, check_nothing_needs_a_restart


def parse(text: str) -> GatewayConfig:
    return parse_gateway_config(text + "[auth]\ntoken = 'a-first-token'\n", "a.toml", {}).config


def test_there_is_one_upgrade_at_a_time() -> None:
    async def scenario() -> None:
        upgrade = Upgrade()
        under_way = [upgrade.is_under_way]
        upgrade.begin()
        under_way.append(upgrade.is_under_way)
        with pytest.raises(AdminError, match="under way already"):
            upgrade.begin()
        upgrade.give_up()
        under_way.append(upgrade.is_under_way)
        assert under_way == [False, True, False]
        upgrade.begin()

    asyncio.run(scenario())


def test_who_waits_for_its_end_goes_on_when_it_is_given_up() -> None:
    async def scenario() -> None:
        upgrade = Upgrade()
        async with asyncio.timeout(5):
            await upgrade.wait_until_over()
            upgrade.begin()
            waiting = asyncio.ensure_future(upgrade.wait_until_over())
            await asyncio.sleep(0)
            assert not waiting.done()
            upgrade.give_up()
            await waiting

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("runtime_dir = 'elsewhere'\n", "runtime_dir"),
        ("[listen]\nquic = ['127.0.0.1:1']\n", "listen.quic"),
        ("[audit]\npath = 'elsewhere'\n", "audit.path"),
    ],
)
def test_a_setting_that_takes_a_restart_is_named(text: str, key: str) -> None:
    with pytest.raises(UpgradeError, match=f"^{key} changed .* restart"):
        check_nothing_needs_a_restart(parse(""), parse(text))


def test_what_a_reload_applies_is_no_obstacle() -> None:
    check_nothing_needs_a_restart(parse(""), parse("workers = 3\n[log]\nlevel = 'debug'\n"))
