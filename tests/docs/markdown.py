"""The few things of Markdown that the documentation's tests look at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"(`{3,})([a-z]*)")
_HEADING = re.compile(r"#{1,6} +(.*?) *#*")
_CODE_SPAN = re.compile(r"(`+).+?\1")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^()\s>]+)[^()]*\)")
_IMAGE = re.compile(r"!\[[^\[\]]*\]\(\s*([^()\s]+)[^()]*\)")
"""On its own, because one that is itself a link is inside that link."""
_REFERENCE = re.compile(r"^ {0,3}\[[^\[\]]+\]: +(\S+)", re.MULTILINE)
_HTML_LINK = re.compile(r"""<(?:a|img)\s[^>]*?(?:href|src)=["']([^"']+)["']""")
_LINK_TEXT = re.compile(r"\[([^\[\]]*)\]\([^()]*\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; ``line`` is that of its fence, from 1."""

    language: str
    line: int
    text: str


def split_blocks(page: str) -> tuple[str, list[Block]]:
    """(the page with empty lines in place of fenced blocks, these blocks).

    Raises ``ValueError`` for a block that has no end.
    """
    prose: list[str] = []
    blocks: list[Block] = []
    inside: list[str] = []
    opened: tuple[str, str, int] | None = None
    for number, line in enumerate(page.splitlines(), 1):
        fence = _FENCE.fullmatch(line.strip())
        if opened is None and fence is None:
            prose.append(line)
            continue
        prose.append("")
        if opened is None and fence is not None:
            opened, inside = (fence[1], fence[2], number), []
        elif opened is not None and line.strip() == opened[0]:
            blocks.append(Block(opened[1], opened[2], "\n".join(inside)))
            opened = None
        else:
            inside.append(line)
    if opened is not None:
        raise ValueError(f"the block of line {opened[2]} has no end")
    return "\n".join(prose), blocks


def find_links(page: str) -> list[str]:
    """The targets of links and images, each once, sorted; code is no link."""
    prose = _CODE_SPAN.sub("`", split_blocks(page)[0])
    patterns = (_LINK, _IMAGE, _REFERENCE, _HTML_LINK)
    return sorted({found for pattern in patterns for found in pattern.findall(prose)})


def find_anchors(page: str) -> set[str]:
    """What ``#…`` may name on a page: its headings, as GitHub makes anchors of them."""
    anchors: set[str] = set()
    for line in split_blocks(page)[0].splitlines():
        heading = _HEADING.fullmatch(line)
        if heading is None:
            continue
        text = _LINK_TEXT.sub(r"\1", heading[1]).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        anchor, copies = slug, 0
        while anchor in anchors:
            copies += 1
            anchor = f"{slug}-{copies}"
        anchors.add(anchor)
    return anchors


def broken_links(path: Path) -> list[str]:
    """What a page's relative links say that is not there: files, folders, headings of pages."""
    broken = []
    page = path.read_text()
    for link in find_links(page):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or not target.resolve().is_relative_to(ROOT.resolve()):
            broken.append(f"{link}: there is no such file")
        elif anchor and target.suffix == ".md" and anchor not in find_anchors(target.read_text()):
            broken.append(f"{link}: there is no such heading")
    return broken
