"""A page as Markdown, for GitHub: words and tables; every chart as the table of its figures.

Names, labels, commands and answers come from models and from other people's files. They stay words: what would make a
link, an image, HTML or a cell border of them is escaped, and longer texts are quoted as code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mixquant.report.page import Block, Charts, Commands, Facts, Page, Part, Section, Table, Text, Texts


def render(page: Page) -> str:
    lines = list(_contents(page))
    for part in page.parts:
        lines += [f"# {_text(part.name)}", "", f"**{_text(part.sentence)}**", "", _text(part.about), ""]
        lines += [f"- {_text(detail)}" for detail in part.details]
        lines += [line for section in part.sections for line in _section(section)]
        lines.append("")
    return "\n".join(lines)


def _contents(page: Page) -> Iterator[str]:
    """Links to all parts and sections, by the anchors that GitHub gives to headings."""
    seen: Counter[str] = Counter()
    for part in page.parts:
        yield f"- {' · '.join(_link(title, seen) for title in _headings(part))}"
    yield ""


def _headings(part: Part) -> list[str]:
    return [part.name, *(section.title for section in part.sections)]


def _link(title: str, seen: Counter[str]) -> str:
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    number = seen[anchor]
    seen[anchor] += 1
    return f"[{_text(title)}](#{anchor}{f'-{number}' if number else ''})"


def _section(section: Section) -> Iterator[str]:
    yield from ("", f"## {_text(section.title)}", "", _text(section.lead), "")
    for block in section.blocks:
        yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Charts):
        for chart in block.charts:
            if table := chart.table:
                yield from _table(table)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Facts):
        yield from (f"- {_text(name)}: {_text(value)}" for name, value in block.rows)
    elif isinstance(block, Texts):
        for text in block.texts:
            yield from _folded(text)
    elif isinstance(block, Commands):
        yield from _fenced("\n".join(block.lines), "sh")


def _table(table: Table) -> Iterator[str]:
    yield from (f"**{_text(table.caption)}**", "", _cells(table.columns), _cells(["---"] * len(table.columns)))
    for row in table.rows:
        yield _cells([f"{row.head} ({row.tag})" if row.tag else row.head, *row.cells])
    yield ""


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _folded(text: Text) -> Iterator[str]:
    yield from ("<details>", f"<summary>{_text(text.title)}</summary>", "")
    for label, words in text.parts:
        yield from (_text(label), "", *_fenced(words), "")
    yield from ("</details>", "")


def _fenced(words: str, language: str = "") -> Iterator[str]:
    """Code between fences that are longer than any in it."""
    longest = max(map(len, re.findall("`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (fence + language, words, fence)


_SPECIAL = str.maketrans({"&": "&amp;", "<": "&lt;", **{mark: f"\\{mark}" for mark in "\\`*_~|"}})


def _text(words: str) -> str:
    """Words that stay words: no HTML, no emphasis, no cell border, no line break, no link, no image."""
    plain = " ".join(words.split()).translate(_SPECIAL)
    plain = re.sub(r"\](?=[(\[:])", r"\\]", plain)  # a bracket alone links to nothing
    plain = re.sub(r"(?i)\b(https?|ftp|mailto|xmpp):", r"\1&#58;", plain)  # GitHub links addresses by itself
    plain = re.sub(r"(?i)\b(www)\.", r"\1&#46;", plain).replace("@", "&#64;")
    return re.sub(r"^([#>+=-])(?!--)", r"\\\1", plain)
