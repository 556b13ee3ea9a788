"""Links between the pages lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import markdown
from tests.docs.markdown import ROOT, broken_links, find_anchors, find_links, split_blocks

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_heading(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_links_images_references_and_html_are_found_and_code_is_not() -> None:
    page = """
[a](a.md) and [`b`](b.md#b "title"), ![c](c.svg) in [![d](d.svg)](d.md)
[e]: e.md
<a href="f.md">f</a> `[no](no.md)` ``[no](`no.md`)``

```
[no](no.md)
```
"""
    assert find_links(page) == [
        *("a.md", "b.md#b", "c.svg", "d.md", "d.svg", "e.md", "f.md"),
    ]


def test_anchors_are_those_of_github() -> None:
    page = "# `toppy up`: a local port\n## Rates & quotas\n## A [b](c.md)\n## Rates & quotas\n"
    assert find_anchors(page) == {
        *("toppy-up-a-local-port", "rates--quotas", "a-b", "rates--quotas-1"),
    }


def test_a_comment_in_a_block_is_no_heading() -> None:
    assert find_anchors("```\n# no\n```\n# yes\n") == {"yes"}


def test_a_block_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2"):
        split_blocks("a\n```sh\nls\n")


def test_missing_files_and_headings_and_files_outside_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setattr(markdown, "ROOT", root)
    (tmp_path / "outside.md").touch()
    (root / "other.md").write_text("# There\n")
    page = root / "page.md"
    page.write_text(
        "# Here\n[1](#here) [2](other.md#there) [3](https://example.com) [4](other.md)\n"
        "[5](#not) [6](other.md#not) [7](not.md) [8](../outside.md)\n"
    )
    assert broken_links(page) == [
        "#not: there is no such heading",
        "../outside.md: there is no such file",
        "not.md: there is no such file",
        "other.md#not: there is no such heading",
    ]
