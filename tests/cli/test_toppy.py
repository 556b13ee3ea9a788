"""The ``toppy`` command line: what it knows, what it says, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from tests.client.gateway import write_config
from toppy import __version__
from toppy.cli import toppy as toppy_module
from toppy.cli import toppy_gw
from toppy.cli.toppy import app, main

RUNNER = CliRunner()


def test_without_a_command_it_hints_at_doctor_and_exits_with_0() -> None:
    result = RUNNER.invoke(app, [])
    assert result.exit_code == 0
    assert "toppy doctor" in result.output


def test_the_version_is_printed() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"toppy {__version__}\n"


def groups_of(program: typer.Typer) -> dict[tuple[str, ...], list[str]]:
    """Every group of commands by the words that lead to it, with its commands' names."""
    found: dict[tuple[str, ...], list[str]] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), get_command(program))]
    while waiting:
        words, group = waiting.pop()
        found[words] = [name for name, command in group.commands.items() if not command.hidden]
        waiting += [
            ((*words, name), command)
            for name, command in group.commands.items()
            if hasattr(command, "commands")
        ]
    return found


@pytest.mark.parametrize("program", [app, toppy_gw.app], ids=["toppy", "toppy-gw"])
def test_help_names_every_command(program: typer.Typer) -> None:
    groups = groups_of(program)
    assert {("audit",), ()} <= set(groups)
    for words, names in groups.items():
        result = RUNNER.invoke(program, [*words, "--help"])
        assert result.exit_code == 0
        # a name is alone at the beginning of its line, or its box's
        shown = {line.strip("│ ").partition(" ")[0] for line in result.output.splitlines()}
        assert set(names) <= shown, f"{' '.join(words)} --help"


@pytest.mark.parametrize("program", [app, toppy_gw.app], ids=["toppy", "toppy-gw"])
def test_every_command_says_what_it_does(program: typer.Typer) -> None:
    for words, names in groups_of(program).items():
        for name in names:
            result = RUNNER.invoke(program, [*words, name, "--help"])
            assert result.exit_code == 0
            usage, _, rest = result.output.strip().partition("\n")
            assert usage.startswith("Usage:")
            assert len(rest.strip(" │╭─╮\n").split("\n")[0].split()) > 2, f"{words} {name}"


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in RUNNER.invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["--unknown"],
        ["up", "--target", "127.0.0.1:22"],
        ["udp", "--listen", "127.0.0.1:0"],
        ["udp", "--target", "127.0.0.1:9"],
        ["doctor", "extra"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, arguments).exit_code == 2


def test_doctor_prints_json_and_exits_with_1_when_a_check_fails(tmp_path: Path) -> None:
    environ = {"TOPPY_CONFIG": str(tmp_path / "none.toml")}
    result = RUNNER.invoke(app, ["doctor", "--json"], env=environ)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert set(report) == {"version", "overall", "checks"}
    assert report["overall"] == "fail"


def test_doctor_prints_lines_and_exits_with_0_when_nothing_fails(tmp_path: Path) -> None:
    config = write_config(tmp_path, ("127.0.0.1", 9))
    environ = {"TOPPY_DOCTOR_NET": "pass", "TOPPY_DOCTOR_TUN": "skip"}
    result = RUNNER.invoke(app, ["doctor", "--config", str(config)], env=environ)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "doctor: warn"


def test_the_entry_point_exits_with_the_commands_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["toppy", "unknown"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_the_version_is_told_without_the_heavy_parts() -> None:
    program = (
        f"import sys, {toppy_module.__name__}\n"
        "heavy = {'aioquic', 'pydantic', 'uvloop', 'cryptography', 'structlog', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
