"""The pieces of a page: one HTML file that needs nothing else, no network and no script."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from meerkat.record.run_folder import write_atomically
from meerkat.report.drawing import VARIABLES, inline, save
from meerkat.report.style import STYLE

__all__ = ["Page", "absent", "escape", "folded", "numbers", "paragraph", "pill", "table"]


Shown = tuple[str, Figure, str, str]
"""A figure in a page: its name, itself, its title and its caption."""


def _wide(figure: Figure) -> bool:
    return bool(figure.get_figwidth() > 6)


def _rows(figure: Figure) -> int:
    """Rows of ordinary figures that a tall one takes the room of."""
    return max(1, round(float(figure.get_figheight()) / 3.6))


@dataclass
class Page:
    """A page being put together, section by section; its figures are kept for a paper as well."""

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
        """Add HTML, escaped by whoever made it."""
        self._parts.append(html)

    def figures(self, *shown: Shown, before: str = "", after: str = "") -> None:
        """Add figures side by side where there is room.

        Args:
            shown: name (of its files too), figure, title, and a caption: what is seen, and how to read it.
            before: HTML to stand in the first one's place.
            after: HTML to stand after the last one.
        """
        tall = any(_rows(figure) > 1 or _wide(figure) for _, figure, _, _ in shown)
        lone = not tall and (len(shown) + bool(before) + bool(after)) % 2
        held = [self._figure(*one, lone=bool(lone) and one is shown[-1]) for one in shown]
        self._parts.append("\n".join(filter(None, ['<div class="plots">', before, *held, after, "</div>"])))

    def _figure(self, name: str, figure: Figure, title: str, caption: str, *, lone: bool) -> str:
        self._figures[name] = figure
        drawn = inline(figure, name, escape(title))
        kind = "wide" if _wide(figure) else "lone" if lone else ""
        style = f' style="grid-row:span {_rows(figure)}"' if _rows(figure) > 1 and not kind else ""
        opening = f'<figure class="{kind}"{style}>' if kind or style else "<figure>"
        said = f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption>"
        return f'{opening}<div class="plot">{drawn}</div>{said}</figure>'

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
        """Write report.html and figures/ into a folder.

        Raises:
            RunFailed: the disk refused it.
        """
        folder = root / "figures"
        folder.mkdir(exist_ok=True)
        for name, figure in self._figures.items():
            save(figure, folder / name)
        path = root / "report.html"
        text = self.html()
        write_atomically(
            path, lambda part: part.write_text(text, encoding="utf-8"), f"make room, then 'meerkat report {root}'"
        )
        return path


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{escape(text)}</p>"


def absent(text: str) -> str:
    """Why a section has nothing to show."""
    return paragraph(text, "absent")


def numbers(shown: Sequence[tuple[str, str, str]]) -> str:
    """Key numbers: (what, the number, a word more)."""
    cells = "".join(
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(value)}</b> <small>{escape(more)}</small></dd></div>"
        for what, value, more in shown
    )
    return f'<dl class="numbers">{cells}</dl>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    caption: str = "",
    strong: Collection[int] = (),
) -> str:
    """A table that scrolls on a narrow screen.

    Args:
        head: plain text.
        rows: HTML cells, escaped by whoever made them.
        text_columns: the first so many are text, to the left; the others numbers, to the right.
        strong: rows that stand out.
    """

    def cell(tag: str, i: int, html: str) -> str:
        short = text_columns < len(head)
        opening = f'{tag} class="n"' if i >= text_columns else f'{tag} class="t"' if short else tag
        return f"<{opening}>{html}</{tag}>"

    heads = "".join(cell("th", i, escape(name)) for i, name in enumerate(head))
    lines = "\n".join(
        ('<tr class="best">' if place in strong else "<tr>")
        + "".join(cell("td", i, html) for i, html in enumerate(row))
        + "</tr>"
        for place, row in enumerate(rows)
    )
    said, title = (f'<p class="caption">{escape(caption)}</p>' if caption else ""), "Table"
    return (
        f'{said}<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or title)}">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )


def folded(title: str, html: str) -> str:
    """Something long, shown on request."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


_ICONS = {"holds": "✓", "fails": "✗", "undecided": "?"}


def pill(verdict: str) -> str:
    """A verdict as a word with an icon and a colour."""
    kind = verdict if verdict in _ICONS else "undecided"
    return f'<span class="pill {kind}"><span aria-hidden="true">{_ICONS[kind]}</span> {escape(verdict)}</span>'
