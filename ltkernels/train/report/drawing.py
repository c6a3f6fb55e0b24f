"""What the charts share: a figure of fixed axes, colours that follow the page's, and letters of any script.

A chart is built by matplotlib and written twice: as SVG into the page, where the browser sets its texts, and as PNG for slides.
"""

import functools
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, ScaledTranslation

from ltkernels.train.report.page import clean

# Okabe and Ito's colours for the colour-blind, yellow left out (too faint on white); order = order of the variants.
COLORS = ("#0072b2", "#d55e00", "#666667", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "os^DvPX"
DASHES = ("-", "--", "-.", ":")
INK, MUTED, GRID = "#222223", "#666668", "#dddddf"
# In the page every colour is a variable of its style sheet, which has two schemes.
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "rule", **{color: f"s{i}" for i, color in enumerate(COLORS)}}

MANY_POINTS = 1500
"""Beyond so many, points are one picture inside the drawing and not as many elements."""

_PIXELS_PER_INCH = 160  # of a PNG
_SIZE = 9.0  # of letters, in points
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": _SIZE, "text.parse_math": False, "text.color": INK, "text.hinting": "none",
    "svg.fonttype": "none", "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3,
    "ytick.major.size": 0, "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5, "figure.facecolor": "none",
    "axes.facecolor": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawn figure and its name, which is the PNG file's."""

    title: str
    figure: Figure

    def svg(self) -> str:
        """An <svg> element for a page: no names that another chart has, colours as variables of the page's style."""
        buffer = io.StringIO()
        with _drawing(**{"svg.hashsalt": self.title}):
            wide = max((_unmeasured(text) for text in _texts(self.figure)), default=0)
            box = _box(self.figure)
            # The browser has letters that no font here has; they are wider than the box they were measured by.
            box = Bbox.from_extents(box.x0 - 0.06 * wide, box.y0, box.x1 + 0.06 * wide, box.y1)
            self.figure.savefig(buffer, format="svg", bbox_inches=box)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style [^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)
        text = re.sub(r"\bfont(-family)?: (?:(\d[\d.]*px) )?'[^;\"]*", _font, text)
        for color, name in _VARIABLES.items():
            text = text.replace(color, f"var(--{name})")
        label = self.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)

    def png(self, path: Path) -> None:
        """Write the picture, on white. Raises OSError."""
        with _drawing():
            self.figure.savefig(path, dpi=_PIXELS_PER_INCH, bbox_inches=_box(self.figure), facecolor="white")


def _font(found: re.Match[str]) -> str:
    # As wide as what the texts were measured by, or narrower.
    family = "'DejaVu Sans', Verdana, sans-serif"
    return f"font-family: {family}" if found[1] else f"font: {found[2]} {family}"


def _box(figure: Figure) -> Bbox:
    """All that is drawn, in inches, with a margin."""
    return figure.get_tightbbox().padded(0.08)


@contextmanager
def _drawing(**style: Any) -> Iterator[None]:
    with matplotlib.rc_context({**_STYLE, **style}), warnings.catch_warnings():
        # Letters that no font here has are the browser's to draw; a PNG has none of them (`readable`).
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def chart(draw: Callable[..., Figure]) -> Callable[..., Chart]:
    """A decorator for functions whose first argument is the chart's title and which return its figure."""

    @functools.wraps(draw)
    def drawn(title: str, *args: Any, **options: Any) -> Chart:
        title = clean(title)
        with _drawing():
            figure = draw(title, *args, **options)
            further = [entry.name for entry in _fonts_for("".join(_texts(figure)))]
            for text in figure.findobj(matplotlib.text.Text) if further else ():
                text.set(fontfamily=["DejaVu Sans", *further], fontweight="normal")
        return Chart(title, figure)

    return drawn


def axes_of(width: float, height: float, panels: int = 1, gap: float = 0.5) -> tuple[Figure, list[Any]]:
    """A figure with `panels` axes of width x height inches side by side. Labels hang over its edge: a chart is cut to what is
    drawn, so that no text is cut."""
    whole = panels * width + (panels - 1) * gap
    figure = Figure(figsize=(whole, height))
    places = [[i * (width + gap) / whole, 0, width / whole, 1] for i in range(panels)]
    return figure, [figure.add_axes(place) for place in places]


def legend_below(axes: Any, below: float, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """The legend `below` points under the axes, an entry a line."""
    if handles is None:
        handles = axes.get_legend_handles_labels()[0]
    if not handles:
        return
    place = axes.transAxes + ScaledTranslation(0, -below / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=place, borderaxespad=0, borderpad=0, **options
    )  # fmt: skip


def shorten(text: str, length: int) -> str:
    """At most `length` columns of text; letters of some scripts take two."""
    text = clean(text).replace("\n", " ")
    widths = [1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(widths) <= length:
        return text
    kept, total = "", 1
    for letter, width in zip(text, widths):
        total += width
        if total > length:
            break
        kept += letter
    return f"{kept}…"


def _texts(figure: Figure) -> Iterable[str]:
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


@functools.cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(path).get_charmap())


def _missing(text: str) -> set[int]:
    """What the font that matplotlib brings lacks."""
    own = _letters(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    return {ord(c) for c in text if ord(c) not in own and unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp")}


def _unmeasured(text: str) -> int:
    return sum(ord(c) in _missing(text) for c in text)


def _fonts_for(text: str) -> list[Any]:
    """Fonts installed here (name, fname) with letters of `text` that matplotlib's own lacks; some letters may be in none."""
    found, missing = [], _missing(text)
    for entry in font_manager.fontManager.ttflist if missing else ():
        # The font of last resort has a box for every letter, and no letter.
        if "Last Resort" not in entry.name and missing & _letters(entry.fname):
            found.append(entry)
            missing -= _letters(entry.fname)
        if not missing:
            break
    return found


def readable(names: Sequence[str]) -> list[str]:
    """The names as a PNG can show them: one whose letters no font on this machine has becomes its class number."""
    known = frozenset().union(*(_letters(entry.fname) for entry in _fonts_for("".join(names))))
    return [f"class {i}" if _missing(name) - known else name for i, name in enumerate(names)]
