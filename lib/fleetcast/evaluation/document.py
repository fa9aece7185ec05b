"""A report as a document: sections of words, tables and plots, written as one HTML page and as Markdown.

    pages("Backtest default", ["ridge is best."], [Section("The ladder", tables=(table,))])

Both are written from the same sections, so they cannot disagree.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fleetcast.evaluation.page import Picture, template
from fleetcast.store import Store

#: The folder of the plots beside the Markdown page.
PLOTS = "plots"


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""
    words: frozenset[str] = frozenset()
    """Columns of words, the first aside; all others are figures."""
    folded: bool = False
    """Shown on demand, where a page can."""
    marked: frozenset[str] = frozenset()
    """Rows to stress, by their name."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: words, then tables, then plots."""

    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    level: int = 2


@dataclass(frozen=True)
class Pages:
    """The report in the forms in which it is read."""

    html: str
    """One page that needs nothing but itself."""
    markdown: str
    """The same words and tables; its plots are the files below."""
    plots: dict[str, bytes]
    """File name → PNG."""

    def write(self, store: Store, folder: str) -> str:
        """Writes them as report.html, report.md and plots below a folder; returns where the page is."""
        files = {"report.html": self.html.encode(), "report.md": self.markdown.encode()}
        files |= {f"{PLOTS}/{name}": image for name, image in self.plots.items()}
        for name, content in files.items():
            with store.write(f"{folder}/{name}") as file:
                file.write(content)
        return f"{store.uri}/{folder}/report.html"


def pages(title: str, verdicts: Sequence[str], sections: Sequence[Section]) -> Pages:
    """The document; `verdicts` stand above all else."""
    page = template("document.html.j2").render(title=title, verdicts=verdicts, sections=sections)
    files = {_file(picture): picture.png for section in sections for picture in section.pictures}
    return Pages(page, _markdown_page(title, verdicts, sections), files)


def _file(picture: Picture) -> str:
    return re.sub(r"[^a-z0-9]+", "-", picture.title.lower()).strip("-") + ".png"


def _markdown_page(title: str, verdicts: Sequence[str], found: Sequence[Section]) -> str:
    lines = [f"# {_plain(title)}", "", *(f"- {_plain(words)}" for words in verdicts), ""]
    for section in found:
        lines += [f"{'#' * section.level} {_plain(section.title)}", ""]
        for words in section.words:
            lines += [_plain(words), ""]
        for table in section.tables:
            lines += ([f"**{_plain(table.title)}**", ""] if table.title else []) + [*_markdown(table), ""]
        for picture in section.pictures:
            lines += [f"![{_plain(picture.alt)}]({PLOTS}/{_file(picture)})", ""]
    return "\n".join(lines)


def _markdown(table: Table) -> list[str]:
    rule = ["---" if i == 0 or column in table.words else "--:" for i, column in enumerate(table.columns)]
    return ["| " + " | ".join(map(_plain, row)) + " |" for row in (table.columns, rule, *table.rows)]


def _plain(text: str) -> str:
    """Text that no Markdown reader takes for HTML or the end of a cell."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
