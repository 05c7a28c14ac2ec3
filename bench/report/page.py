"""One self-contained HTML page: tables, figures inside it, no script, nothing fetched."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from linattn.bench.report.summaries import Table

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 4px; border-top: 2px solid #1b1b1b; padding-top: 14px; }
h3 { font-size: 16px; margin: 26px 0 8px; }
p { margin: 6px 0; }
nav a { margin-right: 16px; }
.note { color: #555; font-size: 13px; overflow-wrap: anywhere; }
.flags { border-left: 4px solid #b3261e; background: #fdf0ef; padding: 8px 14px; margin: 12px 0; }
.clear { border-left: 4px solid #2e7d32; background: #f0f7f0; padding: 8px 14px; margin: 12px 0; }
.flags ul { margin: 4px 0; padding-left: 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
th { border-bottom: 2px solid #888; }
th.number, td.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
td.long { min-width: 220px; }
tbody tr:nth-child(even) { background: #f6f6f6; }
figure { margin: 18px 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 13px; }
details { margin: 12px 0; }
summary { cursor: pointer; }
@media print { details { display: none; } figure { break-inside: avoid; } }
"""
NUMBER = re.compile(r"[<>]? ?-?[\d.,]+(e[-+]?\d+)?[x %]*( \[.*\])?( \(not bracketed\))?|-")
LONG = 45
"""Cells of more characters than this may be broken into lines."""


@dataclass
class Section:
    """One part of the page: a heading, a line below it, and what follows, as HTML."""

    heading: str
    note: str
    parts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Return the target of links to it."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")


def page(title: str, note: str, sections: Sequence[Section]) -> str:
    """Build the whole page; headings and notes are plain text, parts are HTML."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.heading)}</a>' for section in sections)
    body = "\n".join(
        f'<h2 id="{section.anchor}">{escape(section.heading)}</h2>\n<p class="note">{escape(section.note)}</p>\n'
        + "\n".join(section.parts)
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n'
    )


def heading(text: str) -> str:
    """Write a heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def table(content: Table) -> str:
    """Write a table, numbers to the right."""
    columns = zip(content.head, *content.rows, strict=True)
    head = "".join(_cell("th", name, numbers=all(map(_is_number, cells))) for name, *cells in columns)
    rows = "\n".join(
        f"<tr>{''.join(_cell('td', cell, numbers=_is_number(cell)) for cell in row)}</tr>" for row in content.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def collapsible(summary: str, content: str) -> str:
    """Wrap something long that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def notice(lines: Sequence[str], *, alarm: bool) -> str:
    """Write a box: an alarm, or that there is none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    inside = f"<ul>{items}</ul>" if alarm else escape(" ".join(lines))
    return f'<div class="{"flags" if alarm else "clear"}">{inside}</div>'


def picture(figure: Figure, caption: str) -> str:
    """Put a figure as SVG inside the page: an image of its own, so that names in one cannot meet those in another."""
    content = io.BytesIO()
    # Without a date the same results give the same page.
    figure.savefig(content, format="svg", metadata={"Date": None})
    data = base64.b64encode(content.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _is_number(cell: str) -> bool:
    return not cell or NUMBER.fullmatch(cell.replace("**", "")) is not None


def _cell(tag: str, text: str, *, numbers: bool) -> str:
    kind = "number" if numbers else "long" if len(text) > LONG else "short"
    content = re.sub(r"[*][*](.+?)[*][*]", r"<b>\1</b>", escape(text))
    return f'<{tag} class="{kind}">{content}</{tag}>'
