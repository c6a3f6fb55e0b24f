"""A few SVG primitives: enough for the report's charts, with every text escaped in one place."""

import math
from html import escape

# Okabe and Ito's colours for the colour-blind, yellow left out (too faint on white); order = order of the variants.
COLORS = ("#0072b2", "#d55e00", "#666666", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK, MUTED, GRID = "#222222", "#666666", "#dddddd"


def num(value: float) -> str:
    """A coordinate with two decimals at most: shorter files, the same picture."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Svg:
    """Collects elements of one drawing of `width` x `height` pixels; `title` is what a screen reader says."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str = GRID, width: float = 1) -> None:
        points = f'x1="{num(x1)}" y1="{num(y1)}" x2="{num(x2)}" y2="{num(y2)}"'
        self.parts.append(f'<line {points} stroke="{color}" stroke-width="{num(width)}"/>')

    def rect(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        shape = f'x="{num(x)}" y="{num(y)}" width="{num(max(width, 0))}" height="{num(height)}" fill="{fill}"'
        self.parts.append(f"<rect {shape}><title>{escape(tip)}</title></rect>" if tip else f"<rect {shape}/>")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        color: str = INK,
        size: int = 12,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{num(x)}" y="{num(y)}" text-anchor="{anchor}" fill="{color}" font-size="{size}"{weight}>'
            f"{escape(text)}</text>"
        )

    def polyline(self, points: list[tuple[float, float]], color: str, dashed: bool = False) -> None:
        path = " ".join(f"{num(x)},{num(y)}" for x, y in points)
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>')

    def marker(self, x: float, y: float, series: int, tip: str = "", size: float = 4.5) -> None:
        """The mark of series 0, 1, ...: colour and shape both tell it apart."""
        color, s = COLORS[series % len(COLORS)], size
        shapes = (
            f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(s)}"',
            f'<rect x="{num(x - s * 0.9)}" y="{num(y - s * 0.9)}" width="{num(s * 1.8)}" height="{num(s * 1.8)}"',
            f'<path d="M{num(x)} {num(y + s * 1.2)}l{num(s * 1.2)} {num(-s * 2.2)}h{num(-s * 2.4)}z"',
            f'<path d="M{num(x)} {num(y - s * 1.2)}l{num(s * 1.2)} {num(s * 2.2)}h{num(-s * 2.4)}z"',
            f'<path d="M{num(x)} {num(y - s * 1.35)}l{num(s * 1.35)} {num(s * 1.35)}l{num(-s * 1.35)} {num(s * 1.35)}'
            f'l{num(-s * 1.35)} {num(-s * 1.35)}z"',
        )
        body = f'{shapes[series % len(shapes)]} fill="{color}" fill-opacity="0.85" stroke="white" stroke-width="0.8"'
        self.parts.append(f"{body}><title>{escape(tip)}</title></{body[1:].split(' ', 1)[0]}>")

    def render(self) -> str:
        size = (
            f'width="{num(self.width)}" height="{num(self.height)}" viewBox="0 0 {num(self.width)} {num(self.height)}"'
        )
        return f'<svg {size} role="img" aria-label="{escape(self.title)}">{"".join(self.parts)}</svg>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    first = -(-low // step)
    count = int((high - first * step) / step + 1e-9) + 1
    return [(first + i) * step for i in range(count)]


def label(value: float) -> str:
    """A tick's number without needless digits."""
    return f"{value:.6g}"
