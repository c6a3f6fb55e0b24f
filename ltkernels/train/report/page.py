"""The frame of a page: Jinja2 templates that escape every value, one style sheet, one script whose hash the page names.

The browser runs no other script and loads nothing: the page's Content-Security-Policy says so.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent / "templates"


def percent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    return environment


def page(template: str, **context: Any) -> str:
    """The document that a template makes of `context`; title and intro are plain text. Raises ValueError where the context lacks
    what the template shows."""
    script = (_FOLDER / "tables.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fixed = {"script": jinja2.utils.markupsafe.Markup(script), "script_hash": f"sha256-{digest}"}
    style = jinja2.utils.markupsafe.Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
    try:
        text = _environment().get_template(template).render(**context, **fixed, style=style)
    except jinja2.TemplateError as error:
        raise ValueError(f"the page cannot be made: {error}") from error
    return clean(text)


def clean(text: str) -> str:
    """Characters that names may hold and a page may not (controls, halves of surrogate pairs, those that turn the direction of what
    follows) become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def table(
    label: str, head: Sequence[str], rows: Sequence[Sequence[Any]], marked: int = -1, sortable: bool = False
) -> dict[str, Any]:
    """What parts.html shows as a table: a head `"text|second line"`; cells as described there; row number `marked` is shaded."""
    heads = [dict(zip(("text", "small"), (*text.split("|", 1), ""))) for text in head]
    return {"label": label, "head": heads, "rows": rows, "marked": marked, "sortable": sortable}


def bar(value: float | None) -> dict[str, Any]:
    """A cell of a share in per cent with a bar as long."""
    return {"text": percent(value), "key": -1 if value is None else value, "bar": value}


def by_frequency(counts: Sequence[int]) -> list[int]:
    """Labels from the most to the least frequent class, ties by label."""
    return sorted(range(len(counts)), key=lambda c: (-counts[c], c))
