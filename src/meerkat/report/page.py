"""A page and its pieces: one HTML file with everything in it, readable without a network or scripts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from meerkat.record.files import explain_disk_errors, make_folder, write_text
from meerkat.report.drawing import inline, save
from meerkat.report.style import STYLE, VARIABLES

__all__ = ["CaptionedFigure", "Page", "absent", "escape", "folded", "key_numbers", "paragraph", "pill", "table"]


def file_name(text: str) -> str:
    """The text, fit for the name of a file."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


class CaptionedFigure(NamedTuple):
    """A figure of a page."""

    name: str
    """Unique in the page; also the name of the figure's files."""
    figure: Figure
    title: str
    caption: str
    """What is seen, and how to read it."""

    @property
    def is_wide(self) -> bool:
        """Whether it takes the page's whole width."""
        return bool(self.figure.get_figwidth() > 6)

    @property
    def row_span(self) -> int:
        """How many rows of ordinary figures it takes."""
        return max(1, round(float(self.figure.get_figheight()) / 3.6))

    def html(self, alone: bool) -> str:
        """The figure as an HTML element; one alone in its row has its caption beside it."""
        drawn = inline(self.figure, self.name, escape(self.title))
        kind = "wide" if self.is_wide else "lone" if alone else ""
        style = f' style="grid-row:span {self.row_span}"' if self.row_span > 1 and not kind else ""
        opening = f'<figure class="{kind}"{style}>' if kind or style else "<figure>"
        caption = f"<figcaption><b>{escape(self.title)}.</b> {escape(self.caption)}</figcaption>"
        return f'{opening}<div class="plot">{drawn}</div>{caption}</figure>'


@dataclass
class Page:
    """A page that is put together section by section; its figures are also written as files, for a paper."""

    title: str
    subtitle: str
    _parts: list[str] = field(default_factory=list)
    _sections: list[tuple[str, str]] = field(default_factory=list)
    _figures: dict[str, Figure] = field(default_factory=dict)

    def section(self, name: str, anchor: str) -> None:
        """Begin a section."""
        end = "</section>\n" if self._sections else ""
        self._sections.append((anchor, name))
        self._parts.append(f'{end}<section id="{anchor}">\n<h2>{escape(name)}</h2>')

    def add(self, html: str) -> None:
        """Add HTML; the caller has escaped it."""
        self._parts.append(html)

    def figures(self, *figures: CaptionedFigure, before: str = "", after: str = "") -> None:
        """Add figures, side by side where there is room, with HTML before the first and after the last."""
        self._figures |= {each.name: each.figure for each in figures}
        uneven = any(each.row_span > 1 or each.is_wide for each in figures)
        last_is_alone = not uneven and (len(figures) + bool(before) + bool(after)) % 2 == 1
        cells = [each.html(alone=last_is_alone and each is figures[-1]) for each in figures]
        self._parts.append("\n".join(filter(None, ['<div class="plots">', before, *cells, after, "</div>"])))

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in self._sections)
        light = "".join(f"--{variable}:{colour};" for colour, variable in VARIABLES.items())
        nav = f'<nav aria-label="Sections">{links}</nav>\n' if len(self._sections) > 1 else ""
        body = "\n".join([*self._parts, "</section>"] if self._sections else self._parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>:root{{{light}}}\n{STYLE}</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1><p>{escape(self.subtitle)}</p></header>\n"
            f"{nav}<main>\n{body}\n</main>\n"
            "<footer>Made by <code>meerkat report</code>; the figures are also in <code>figures/</code>, "
            "as PNG and SVG.</footer>\n</body>\n</html>\n"
        )

    def write(self, root: Path) -> Path:
        """Write report.html and figures/ into a folder. Returns the page's path.

        Raises:
            RunFailed: a file cannot be written.
        """
        folder, cure = root / "figures", f"make room, then 'meerkat report {root}'"
        with explain_disk_errors(folder, cure):
            make_folder(folder)
        for name, figure in self._figures.items():
            save(figure, folder / name)
        path = root / "report.html"
        write_text(path, self.html(), cure)
        return path


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{escape(text)}</p>"


def absent(text: str) -> str:
    """The reason why a section shows nothing."""
    return paragraph(text, "absent")


def key_numbers(numbers: Sequence[tuple[str, str, str]]) -> str:
    """Numbers in large type, each as (name, number, remark)."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(number)}</b> <small>{escape(remark)}</small></dd></div>"
        for name, number, remark in numbers
    )
    return f'<dl class="numbers">{cells}</dl>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    caption: str = "",
    bold: Collection[int] = (),
) -> str:
    """A table that scrolls on a narrow screen.

    Args:
        head: plain text.
        rows: HTML cells, which the caller has escaped.
        text_columns: so many columns are text, on the left; the others are numbers, set to the right.
        bold: indices of the rows in bold.
    """

    def cell(tag: str, column: int, html: str) -> str:
        kind = ' class="n"' if column >= text_columns else ' class="t"' if text_columns < len(head) else ""
        return f"<{tag}{kind}>{html}</{tag}>"

    def line(index: int, row: Sequence[str]) -> str:
        cells = "".join(cell("td", column, html) for column, html in enumerate(row))
        return f'<tr class="best">{cells}</tr>' if index in bold else f"<tr>{cells}</tr>"

    heads = "".join(cell("th", column, escape(name)) for column, name in enumerate(head))
    body = "\n".join(line(index, row) for index, row in enumerate(rows))
    above = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return (
        f'{above}<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or "Table")}">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, html: str) -> str:
    """Long HTML behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


_ICONS = {"holds": "✓", "fails": "✗", "undecided": "?"}


def pill(verdict: str) -> str:
    """A claim's verdict with an icon and a colour."""
    kind = verdict if verdict in _ICONS else "undecided"
    return f'<span class="pill {kind}"><span aria-hidden="true">{_ICONS[kind]}</span> {escape(verdict)}</span>'
