"""docs/learn.md: every command works and prints what the page shows, every lesson has its quiz."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Block, split_blocks

PAGE = (ROOT / "docs" / "learn.md").read_text()
PROSE, BLOCKS = split_blocks(PAGE)
COMMANDS = [index for index, block in enumerate(BLOCKS) if block.language == "sh"]
UDP_PORTS = ("4433", "5007", "5008", "5009")
TCP_PORTS = ("8080",)
DEADLINE_S = 100.0
"""For all commands, on a loaded machine; alone they take some seconds."""
_MARK = "=== block"


def _replace_ports(text: str, ports: dict[str, str]) -> str:
    return re.sub(rf"\b({'|'.join(ports)})\b", lambda found: ports[found[1]], text)


def _free_ports() -> dict[str, str]:
    """Free ports in place of the page's, which another test or program may have."""
    with contextlib.ExitStack() as opened:
        found = {}
        for names, kind in ((UDP_PORTS, socket.SOCK_DGRAM), (TCP_PORTS, socket.SOCK_STREAM)):
            for name in names:
                sock = opened.enter_context(socket.socket(socket.AF_INET, kind))
                sock.bind(("127.0.0.1", 0))
                found[name] = str(sock.getsockname()[1])
        return found


def _is_shown(expected: str, printed: str) -> bool:
    """Whether a printed line is the one that the page shows, where ``…`` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    return re.fullmatch(pattern, printed) is not None


def _missing(expected: str, printed: str) -> list[str]:
    """Lines of ``expected`` that are not in ``printed``, in that order; spaces do not count."""
    lines = iter([" ".join(line.split()) for line in printed.splitlines()])
    return [
        line
        for line in (" ".join(line.split()) for line in expected.splitlines())
        if not any(_is_shown(line, each) for each in lines)
    ]


@dataclass(frozen=True, slots=True)
class Lessons:
    """What the page's commands have printed, block by block; the last one may have failed."""

    outputs: dict[int, str]
    exit_code: int
    ports: dict[str, str]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Lessons:
    """All commands, in one shell that ends at the first that fails, in a directory of their own."""
    directory = tmp_path_factory.mktemp("learn")
    ports = _free_ports()
    script = "set -eu\n" + "".join(
        f"echo '{_MARK} {index}'\n{_replace_ports(BLOCKS[index].text, ports)}\n"
        for index in COMMANDS
    )
    environ = {name: text for name, text in os.environ.items() if not name.startswith("TOPPY_")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{environ['PATH']}", "HOME": str(directory)}
    log = directory / "lessons.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            exit_code = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            exit_code = -signal.SIGTERM
        if exit_code != 0:  # the gateway and others of the lessons may still be there
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
    outputs = {}
    for part in log.read_text().split(f"{_MARK} ")[1:]:
        index, _, output = part.partition("\n")
        outputs[int(index)] = output
    return Lessons(outputs, exit_code, ports)


def _name(index: int) -> str:
    return f"block-{COMMANDS.index(index) + 1}"


@pytest.mark.xdist_group("learn")
@pytest.mark.parametrize("index", COMMANDS, ids=_name)
def test_commands_succeed_and_print_what_the_page_shows(lessons: Lessons, index: int) -> None:
    where = f"docs/learn.md, line {BLOCKS[index].line}"
    assert index in lessons.outputs, f"{where}: an earlier command has failed"
    output = lessons.outputs[index]
    has_failed = lessons.exit_code != 0 and index == max(lessons.outputs)
    assert not has_failed, f"{where}: exit code {lessons.exit_code}:\n{output}"
    shown = _replace_ports(BLOCKS[index + 1].text, lessons.ports)
    assert _missing(shown, output) == [], f"{where} printed:\n{output}"


@pytest.mark.parametrize("index", COMMANDS, ids=_name)
def test_output_is_shown_below_every_command(index: int) -> None:
    shown: Block = BLOCKS[index + 1]
    assert shown.language == "text"
    assert [line for line in shown.text.splitlines() if line.strip(" …")]


def test_every_block_with_output_follows_a_command() -> None:
    outputs = [index for index, block in enumerate(BLOCKS) if block.language == "text"]
    assert outputs == [index + 1 for index in COMMANDS]


def _lessons_of_the_page() -> dict[str, str]:
    """Their texts without blocks, by heading."""
    parts = re.split(r"^## (\d\. .*)$", PROSE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_there_are_seven_lessons() -> None:
    numbers = [heading.partition(".")[0] for heading in _lessons_of_the_page()]
    assert numbers == ["1", "2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize("heading", _lessons_of_the_page(), ids=lambda text: text[0])
def test_a_lesson_has_something_to_run_and_two_or_three_questions_with_answers(
    heading: str,
) -> None:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert any(block.language == "sh" for block in split_blocks(section)[1])
    quiz = re.findall(
        r"<details><summary>(.+?\?.*?)</summary>\n\n(.+?)\n</details>", section, re.DOTALL
    )
    assert 2 <= len(quiz) <= 3
    assert section.count("<details>") == section.count("</details>") == len(quiz)


def test_a_line_that_is_shown_must_be_printed_in_its_place() -> None:
    assert _missing("a  …  c\nd", "x\na b c\nd\n") == []
    assert _missing("a\nb", "a\n") == ["b"]
    assert _missing("a", "ab\n") == ["a"]
