"""``toppy-gw``'s operator commands, against a gateway that answers what a test says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.cli.gateway_stub import CONFIG, Answer, GatewayStub, gateway_stub, status_facts
from toppy.cli import gateway_admin, toppy_gw
from toppy.cli.gateway_admin import GatewayAdmin, NoGatewayError, RefusedError, find_runtime_dir
from toppy.control import settings as settings_module
from toppy.errors import ConfigError

runner = CliRunner()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[GatewayStub]:
    with gateway_stub(tmp_path) as running:
        yield running


def call(stub: GatewayStub, *arguments: str) -> Result:
    return runner.invoke(toppy_gw.app, [*arguments, "--config", stub.config])


# what is asked

RELOADED = {"generation": 2, "revision": 2, "warnings": [], "duration_s": 0.75}


@pytest.mark.parametrize(
    ("arguments", "wish", "answer", "text"),
    [
        (
            ["reload"],
            {"policy_only": False},
            RELOADED,
            "generation 2 serves with revision 2, after 0.8 s\n",
        ),
        (
            ["reload", "--policy-only"],
            {"policy_only": True},
            {**RELOADED, "warnings": ["workers changed: applies at the next reload"]},
            "warning: workers changed: applies at the next reload\n"
            "generation 2 serves with revision 2, after 0.8 s\n",
        ),
        (
            ["drain", "s3"],
            {"what": "s3", "timeout_s": None},
            {"draining": ["s3"]},
            "draining: s3; each ends when its tunnels have, see: toppy-gw status\n",
        ),
        (
            ["drain", "g2", "--timeout", "0"],
            {"what": "g2", "timeout_s": 0.0},
            {"draining": []},
            "it had not begun to serve, and has been ended\n",
        ),
        (["kick", "s0g1c2t3"], {"what": "s0g1c2t3"}, {"closed": 1}, "closed 1 tunnel\n"),
        (["kick", "alice"], {"what": "alice"}, {"closed": 3}, "closed 3 tunnels\n"),
    ],
)
def test_a_command_asks_the_gateway_and_prints_its_answer(
    stub: GatewayStub,
    arguments: list[str],
    wish: dict[str, Any],
    answer: dict[str, Any],
    text: str,
) -> None:
    path = f"POST /{arguments[0]}"
    stub.answers[path] = (200, answer)
    done = call(stub, *arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout == text
    done = call(stub, *arguments, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == answer
    assert stub.asked == [(path, wish)] * 2


@pytest.mark.parametrize("what", ["status", "connections", "tunnels"])
def test_json_is_the_gateways_answer(stub: GatewayStub, what: str) -> None:
    facts = status_facts() if what == "status" else {what: [{"name": "s0g1c1"}]}
    stub.answers[f"GET /{what}"] = (200, facts)
    done = call(stub, what, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == facts


def test_status_connections_and_tunnels_are_tables_for_people(stub: GatewayStub) -> None:
    stub.answers["GET /connections"] = (200, {"connections": []})
    stub.answers["GET /tunnels"] = (200, {"tunnels": []})
    assert "toppy-gw 9.9, engine native" in call(stub, "status").stdout
    assert call(stub, "connections").stdout == "no connections\n"
    assert call(stub, "tunnels").stdout == "no tunnels\n"


# wrong usage


@pytest.mark.parametrize(
    "arguments",
    [
        *(["drain"], ["kick"], ["reload", "now"], ["stop", "--no"]),
        *(["drain", "s1", "--timeout", each] for each in ("-1", "1e400", "inf", "nan", "soon")),
    ],
)
def test_wrong_usage_exits_with_2_and_asks_nothing(stub: GatewayStub, arguments: list[str]) -> None:
    assert call(stub, *arguments).exit_code == 2
    assert stub.asked == []


# failures


@pytest.mark.parametrize(("status", "exit_code"), [(409, 1), (404, 1), (500, 1), (400, 2)])
def test_a_refusal_is_said_as_the_gateway_says_it(
    stub: GatewayStub, status: int, exit_code: int
) -> None:
    stub.answers["POST /drain"] = (status, {"error": "s9 is not there; see toppy-gw status"})
    done = call(stub, "drain", "s9")
    assert done.exit_code == exit_code
    assert done.stderr == "toppy-gw: s9 is not there; see toppy-gw status\n"
    assert done.stdout == ""


def test_a_failure_is_json_too_where_json_was_asked_for(stub: GatewayStub, tmp_path: Path) -> None:
    stub.answers["POST /drain"] = (404, {"error": "there is no worker s9"})
    done = call(stub, "drain", "s9", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"error": "there is no worker s9"}
    assert done.stderr == "toppy-gw: there is no worker s9\n"
    done = runner.invoke(toppy_gw.app, ["status", "--json", "--config", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "cannot read" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("what", ["tunnels", "connections", "kick"])
def test_workers_of_which_nothing_is_known_are_named(stub: GatewayStub, what: str) -> None:
    method = "POST" if what == "kick" else "GET"
    facts: dict[str, object] = {"closed": 1} if what == "kick" else {what: []}
    stub.answers[f"{method} /{what}"] = (200, {**facts, "unanswered": ["s0", "s3"]})
    done = call(stub, *([what, "alice"] if what == "kick" else [what]))
    assert done.exit_code == 0
    assert done.stdout.endswith("\nwarning: no answer from s0, s3: try again\n")


@pytest.mark.parametrize(
    "answer", [(404, b"Not Found"), (200, b"a page"), (200, ["a list"]), (500, {"error": 7})]
)
def test_an_answer_that_is_none_is_of_another_version(stub: GatewayStub, answer: Answer) -> None:
    stub.answers["POST /kick"] = answer
    done = call(stub, "kick", "alice")
    assert done.exit_code == 1
    assert "is it of another version than this command?" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(["status"], ["reload"], ["upgrade"], ["drain", "s1"], ["connections"], ["tunnels"]),
        *(["kick", "alice"], ["stop"]),
    ],
)
def test_without_a_gateway_every_command_says_what_to_look_at(
    tmp_path: Path, arguments: list[str]
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(CONFIG)
    done = runner.invoke(toppy_gw.app, [*arguments, "--config", str(config)])
    assert done.exit_code == 1
    assert f"no gateway answers at {tmp_path / 'run' / 'admin.sock'}" in done.stderr
    assert "is it running, with this configuration" in done.stderr


def test_a_socket_that_a_dead_gateway_left_is_no_gateway(tmp_path: Path) -> None:
    with gateway_stub(tmp_path) as stub:
        pass
    with pytest.raises(NoGatewayError, match="the one that was here has ended"):
        GatewayAdmin(stub.runtime_dir).status()


def test_a_gateway_that_ends_while_it_is_asked_is_no_gateway(stub: GatewayStub) -> None:
    stub.answers["POST /reload"] = (0, b"")
    with pytest.raises(NoGatewayError, match="it ended while it was asked"):
        GatewayAdmin(stub.runtime_dir).reload(policy_only=False)


def test_a_gateway_that_does_not_answer_in_time_is_said_to(stub: GatewayStub) -> None:
    answering = threading.Event()

    def answer() -> Answer:
        answering.wait(20)
        return 0, b""

    stub.answers["GET /status"] = answer
    try:
        with pytest.raises(RefusedError, match="has not answered within"):
            GatewayAdmin(stub.runtime_dir)._ask("GET", "/status", timeout_s=0.05)
    finally:
        answering.set()


def test_a_directory_that_this_user_may_not_look_into_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(NoGatewayError, match="Permission denied; run this command as"):
        GatewayAdmin(tmp_path).status()


# where the gateway is


@pytest.mark.parametrize("spoilt", ["wrokers = 3", "[policy\n", 'workers = "many"'])
def test_a_file_that_became_wrong_still_says_where_its_gateway_is(
    stub: GatewayStub, spoilt: str
) -> None:
    Path(stub.config).write_text(f'runtime_dir = "run"  # here\n{spoilt}\n')
    assert find_runtime_dir(stub.config, {}) == stub.runtime_dir
    stub.answers["POST /reload"] = (409, {"error": "wrokers: unknown key"})
    done = call(stub, "reload")
    assert done.exit_code == 1
    assert done.stderr == "toppy-gw: wrokers: unknown key\n"


def test_a_wrong_file_without_a_gateway_is_what_is_reported(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    for text in ('runtime_dir = "run"\nwrokers = 3\n', "wrokers = 3\n", "runtime_dir = 3\n"):
        config.write_text(text)
        with pytest.raises(ConfigError, match=r"gateway\.toml"):
            find_runtime_dir(str(config), {})
    with pytest.raises(ConfigError, match="cannot read"):
        find_runtime_dir(str(tmp_path / "none.toml"), {})


def test_the_environment_names_the_directory_of_a_wrong_file(stub: GatewayStub) -> None:
    Path(stub.config).write_text("wrokers = 3\n")
    environ = {"TOPPY_GW_RUNTIME_DIR": str(stub.runtime_dir)}
    assert find_runtime_dir(stub.config, environ) == stub.runtime_dir


def test_a_wrong_file_that_names_no_directory_means_the_default(
    stub: GatewayStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "toppy.cli.gateway_admin._DEFAULT_RUNTIME_DIR", str(stub.runtime_dir.absolute())
    )
    Path(stub.config).write_text("wrokers = 3\n")
    assert find_runtime_dir(stub.config, {}) == stub.runtime_dir
    Path(stub.config).unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        find_runtime_dir(stub.config, {})


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's configuration file would be this one; there is no gateway either."""
    system = tmp_path / "etc" / "gateway.toml"
    monkeypatch.setattr(settings_module, "SYSTEM_CONFIG", str(system))
    monkeypatch.setattr(gateway_admin, "SYSTEM_CONFIG", str(system))
    monkeypatch.setattr(gateway_admin, "_DEFAULT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("TOPPY_GW_CONFIG", raising=False)
    monkeypatch.delenv("TOPPY_GW_RUNTIME_DIR", raising=False)
    return system


def test_without_a_file_the_one_that_was_looked_for_is_named(nowhere: Path) -> None:
    done = runner.invoke(toppy_gw.app, ["status"])
    assert done.exit_code == 1
    assert done.stderr == (
        f"toppy-gw: which gateway? {nowhere} does not exist; name the gateway's file with "
        "--config FILE or TOPPY_GW_CONFIG\n"
    )


def test_without_a_file_a_gateway_in_the_default_directory_is_found(nowhere: Path) -> None:
    with gateway_stub(nowhere.parent.parent) as stub:
        assert find_runtime_dir(None, {}) == stub.runtime_dir
        elsewhere = {"TOPPY_GW_RUNTIME_DIR": str(nowhere.parent)}
        with pytest.raises(ConfigError, match="which gateway"):
            find_runtime_dir(None, elsewhere)


def test_a_file_in_a_directory_that_this_user_may_not_enter_is_named(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        patch.setattr(os, "open", refuse)
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(ConfigError) as refused:
            find_runtime_dir(None, {})
    assert str(refused.value).endswith(f"cannot read {nowhere}: Permission denied")


# upgrade


class World:
    """Time of day, and what happens at which second."""

    def __init__(self, stub: GatewayStub) -> None:
        self.now = 1000.0
        self.admin = GatewayAdmin(stub.runtime_dir, now=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1.0)


def last_reload(at: float, **changes: Any) -> dict[str, Any]:
    return {"at": at, "ok": True, "message": "revision 2 serves", "duration_s": 0.5} | changes


def test_an_upgrade_waits_for_the_new_codes_reload(stub: GatewayStub) -> None:
    world = World(stub)
    stub.answers["POST /upgrade"] = (200, {"pid": 7, "from": "9.8", "to": "9.9"})

    def status() -> Answer:
        if world.now < 1002:  # the old code still answers
            return 200, status_facts(version="9.8", last_reload=last_reload(900))
        if world.now < 1004:  # nobody does
            return 0, b""
        if world.now < 1006:
            return 200, status_facts()
        return 200, status_facts(pid=7, generation=2, revision=2, last_reload=last_reload(1005))

    stub.answers["GET /status"] = status
    assert world.admin.upgrade() == {
        "from": "9.8",
        "to": "9.9",
        "pid": 7,
        "generation": 2,
        "revision": 2,
        "duration_s": 0.5,
    }


def test_an_upgrade_whose_trial_fails_says_so(stub: GatewayStub) -> None:
    stub.answers["POST /upgrade"] = (409, {"error": "the new code does not come up"})
    done = call(stub, "upgrade")
    assert done.exit_code == 1
    assert done.stderr == "toppy-gw: the new code does not come up\n"


def test_an_upgrade_whose_reload_fails_says_so(stub: GatewayStub) -> None:
    world = World(stub)
    stub.answers["POST /upgrade"] = (200, {"pid": 7, "from": "9.8", "to": "9.9"})
    failed = last_reload(1001, ok=False, message="no free slots")
    stub.answers["GET /status"] = (200, status_facts(last_reload=failed))
    with pytest.raises(RefusedError, match="earlier workers serve on: no free slots"):
        world.admin.upgrade()


def test_an_upgrade_that_never_reloads_fails(stub: GatewayStub) -> None:
    world = World(stub)
    stub.answers["POST /upgrade"] = (200, {"pid": os.getpid(), "from": "9.8", "to": "9.9"})
    with pytest.raises(RefusedError, match="has not reloaded within 60 s"):
        world.admin.upgrade()
    assert 1060 <= world.now < 1062


def test_an_upgrade_whose_process_ends_fails_soon_even_if_nobody_reaps_it(
    stub: GatewayStub,
) -> None:
    world = World(stub)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stub.answers["GET /status"] = (200, status_facts(pid=process.pid))

    def upgrade() -> Answer:
        stub.answers["GET /status"] = (0, b"")
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return 200, {"pid": process.pid, "from": "9.8", "to": "9.9"}

    stub.answers["POST /upgrade"] = upgrade
    with pytest.raises(RefusedError, match="ended while it became the new code"):
        world.admin.upgrade()
    assert world.now < 1010
    process.wait()


# stop


def test_stop_waits_until_the_process_has_ended_even_if_nobody_reaps_it(stub: GatewayStub) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stub.answers["GET /status"] = (200, status_facts(pid=process.pid))

    def stop() -> Answer:
        assert process.stdin is not None
        process.stdin.close()
        return 200, {"stopping": True}

    stub.answers["POST /stop"] = stop
    done = call(stub, "stop")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"toppy-gw has stopped (it was process {process.pid})\n"
    assert process.wait(0) is not None


def test_a_gateway_that_does_not_stop_is_named(stub: GatewayStub) -> None:
    world = World(stub)
    stub.answers["POST /stop"] = (200, {"stopping": True})
    with pytest.raises(RefusedError, match=f"kill -9 {os.getpid()}"):
        world.admin.stop()
    assert world.now < 1013


def test_a_gateway_whose_process_cannot_be_seen_has_stopped_when_nobody_answers(
    stub: GatewayStub,
) -> None:
    world = World(stub)
    stub.answers["POST /stop"] = (200, {"stopping": True})

    def status() -> Answer:
        return (200, status_facts(pid=2**22)) if world.now < 1003 else (0, b"")

    stub.answers["GET /status"] = status
    assert world.admin.stop() == {"stopped": 2**22}
    assert world.now >= 1003
