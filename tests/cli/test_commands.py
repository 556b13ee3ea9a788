"""Both command lines: what they print and how they exit, without a gateway."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from toppy import __version__
from toppy.cli import toppy, toppy_gw
from toppy.cli.udp import run_udp

runner = CliRunner()


def test_toppy_alone_hints_at_doctor() -> None:
    result = runner.invoke(toppy.app, [])
    assert result.exit_code == 0
    assert "toppy doctor" in result.stdout


@pytest.mark.parametrize(("app", "name"), [(toppy.app, "toppy"), (toppy_gw.app, "toppy-gw")])
def test_version(app: Any, name: str) -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"{name} {__version__}\n"


@pytest.mark.parametrize("app", [toppy.app, toppy_gw.app])
def test_an_unknown_command_is_wrong_usage(app: Any) -> None:
    assert runner.invoke(app, ["no-such-command"]).exit_code == 2


def test_the_version_is_said_without_loading_the_engines() -> None:
    script = (
        "import sys; sys.argv = ['toppy', '--version']\n"
        "from toppy.cli.toppy import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'aioquic', 'zmq', 'pydantic', 'uvloop', 'rich.live'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["udp", "--help"]])
def test_the_help_shows_the_brackets_of_a_table(arguments: list[str]) -> None:
    assert "every [[forward]]" in runner.invoke(toppy.app, arguments).stdout


def test_shell_completion_is_offered() -> None:
    result = runner.invoke(toppy.app, ["--help"])
    assert "--install-completion" in result.stdout


def test_init_then_check_config(tmp_path: Path) -> None:
    made = runner.invoke(toppy_gw.app, ["init", str(tmp_path / "gw"), "--name", "gw.example"])
    assert made.exit_code == 0, made.output
    assert "next: toppy-gw run" in made.stdout
    config = str(tmp_path / "gw" / "gateway.toml")
    checked = runner.invoke(toppy_gw.app, ["check-config", "--config", config])
    assert checked.exit_code == 0, checked.output
    assert checked.stdout == f"configuration ok: {config}\n"
    again = runner.invoke(toppy_gw.app, ["init", str(tmp_path / "gw")])
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_check_config_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text("wrokers = 3\n")
    result = runner.invoke(
        toppy_gw.app, ["check-config", "--config", str(tmp_path / "gateway.toml")]
    )
    assert result.exit_code == 1
    assert "did you mean workers" in result.stderr


def test_a_client_without_a_configuration_is_told_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_udp("127.0.0.1:0", "192.0.2.1:53", None, {"HOME": str(tmp_path)})
    assert code == 1
    assert "toppy-gw init" in capsys.readouterr().err


def test_a_client_without_a_policy_is_denied_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('gateway = "gw.example"\n')
    code = run_udp("127.0.0.1:0", "192.0.2.1:53", str(config), {})
    assert code == 2
    said = capsys.readouterr()
    assert said.err.startswith("Policy denied: ")
    assert "192.0.2.1:53 is not allowed" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("target", "part"),
    [("localhost:53", None), ("name.invalid:53", 'host = "name.invalid"')],
)
def test_a_name_is_compared_with_cidr_rules_where_it_resolves(
    tmp_path: Path, target: str, part: str | None
) -> None:
    from toppy.client.policy import check_policy, parse_target
    from toppy.config.client import parse_client_config
    from toppy.errors import DeniedError

    config = parse_client_config(
        'gateway = "g"\n[[policy.allow]]\ncidr = ["127.0.0.0/8", "::1"]\nports = [53]\n', "c", {}
    )
    if part is None:
        check_policy(config, parse_target("--target", target))
        return
    with pytest.raises(DeniedError, match="not allowed") as refused:
        check_policy(config, parse_target("--target", target))
    assert part in str(refused.value)
