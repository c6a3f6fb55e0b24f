"""What the report's sections share: tables, percentages, the order of the classes, the page around them."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #222;
  background: #fff; max-width: 1000px; margin: 32px auto 64px; padding: 0 24px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p { margin: 8px 0; max-width: 100ch; }
.sub, .note { color: #555; } .note { font-size: 13.5px; }
.scroll { overflow-x: auto; } .row { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #999; }
th small, td small { font-weight: 400; color: #666; display: block; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td.left, th.left { text-align: left; }
tr.chosen td { background: #eef5fb; } svg { font-family: inherit; max-width: 100%; height: auto; }
dt { font-weight: 600; margin-top: 8px; } dd { margin: 0 0 0 20px; max-width: 76ch; }
@media (max-width: 700px) {
  body { margin-top: 16px; padding: 0 12px; } .row { overflow-x: auto; flex-wrap: nowrap; } svg { max-width: none; flex: none; }
}
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e4e4; } .sub, .note, th small, td small { color: #aaa; } th, td { border-color: #444; }
  tr.chosen td { background: #22364a; } svg { background: #fff; border-radius: 6px; }
}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document; `title` is plain text, sections are HTML.

    Characters that names may hold and a page may not (controls, halves of surrogate pairs, those that turn the direction of what
    follows) become U+FFFD.
    """
    text = (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def percent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: int = -1) -> str:
    """Cells are HTML already; row number `marked` is shaded."""
    body = "".join(
        f"<tr{' class=chosen' if i == marked else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    return f"<div class=scroll><table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table></div>"


def by_frequency(summary: dict[str, Any]) -> list[int]:
    """Labels from the most to the least frequent class, ties by label."""
    counts = summary["class_counts"]
    return sorted(range(len(counts)), key=lambda c: (-counts[c], c))
