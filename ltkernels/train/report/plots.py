"""More of the report's charts: points over one or two axes, and square matrices of signed numbers."""

import math
from collections.abc import Sequence

from ltkernels.train.report.charts import matrix_margin, row_label, shorten
from ltkernels.train.report.svg import COLORS, GRID, MUTED, Svg, label, ticks

_NEGATIVE, _WHITE, _POSITIVE = (166, 86, 40), (250, 250, 250), (8, 69, 120)


class Axes:
    """A frame with ticks that places points; `log_x` is for counts, which span decades."""

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        xs: Sequence[float],
        ys: Sequence[float],
        *,
        log_x: bool = False,
        size: tuple[float, float] = (440, 300),
        bare: bool = False,
    ) -> None:
        self.log_x = log_x
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = (16, 16, 46, 30) if bare else (58, 18, 46, 44)
        xs = [self._x(x) for x in xs]
        self.x_low, self.x_high = _padded(xs)
        self.y_low, self.y_high = _padded(ys)
        self.svg = Svg(*size, title)
        self.svg.text(self.left, 16, shorten(title, int(size[0] / 7.2)), bold=True)
        self.svg.text(self.left, 34, y_label, color=MUTED, size=11)
        self.svg.text(
            (self.left + size[0] - self.right) / 2, size[1] - 6, x_label, anchor="middle", color=MUTED, size=11
        )
        if not bare:
            self._ticks()

    def _x(self, x: float) -> float:
        return math.log10(max(x, 1e-9)) if self.log_x else x

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (self._x(x) - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        inner = self.height - self.top - self.bottom
        return self.left + across * (self.width - self.left - self.right), self.height - self.bottom - up * inner

    def _ticks(self) -> None:
        svg, end = self.svg, self.width - self.right
        for value in ticks(self.y_low, self.y_high):
            y = self.place(1, value)[1]
            svg.line(self.left, y, end, y, "#aaaaaa" if abs(value) < 1e-12 else GRID)
            svg.text(self.left - 6, y + 4, label(value), anchor="end", color=MUTED, size=11)
        for value in self._x_ticks():
            x = self.place(value, self.y_low)[0]
            svg.line(x, self.height - self.bottom, x, self.height - self.bottom + 4, MUTED)
            svg.text(x, self.height - self.bottom + 17, label(value), anchor="middle", color=MUTED, size=11)

    def _x_ticks(self) -> list[float]:
        if not self.log_x:
            return ticks(self.x_low, self.x_high)
        # 1, 2, 5 of each decade where there is room, else 1 alone.
        steps = (1, 2, 5) if self.x_high - self.x_low < 2.2 else (1,)
        decades = range(math.floor(self.x_low), math.ceil(self.x_high) + 1)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in values if self.x_low <= math.log10(value) <= self.x_high]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or max(0.05, 0.05 * abs(high))
    return low - pad, high + pad


def points(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]], Sequence[str]]],
    colors: Sequence[int],
    *,
    log_x: bool = False,
    errors: Sequence[Sequence[float]] | None = None,
    size: tuple[float, float] = (440, 300),
    bare: bool = False,
    radius: float = 4.2,
) -> str:
    """Scattered points. A series is (name, (x, y) pairs, a tip for each); `errors` are half-lengths of vertical bars."""
    pairs = [p for _, placed, _ in series for p in placed]
    reach = [0.0] * len(pairs) if errors is None else [e for row in errors for e in row]
    ys = [y + sign * e for (_, y), e in zip(pairs, reach) for sign in (-1, 1)]
    axes = Axes(title, x_label, y_label, [x for x, _ in pairs], ys, log_x=log_x, size=size, bare=bare)
    for i, (name, placed, tips) in enumerate(series):
        for j, ((x, y), tip) in enumerate(zip(placed, tips)):
            across, up = axes.place(x, y)
            if errors is not None and errors[i][j]:
                ends = [axes.place(x, y + sign * errors[i][j])[1] for sign in (-1, 1)]
                axes.svg.line(across, ends[0], across, ends[1], COLORS[colors[i] % len(COLORS)], 1.4)
            axes.svg.marker(across, up, colors[i], f"{name}: {tip}" if name else tip, radius)
    return axes.svg.render()


def matrix(title: str, values: Sequence[Sequence[float]], names: Sequence[str], order: Sequence[int], note: str) -> str:
    """A square matrix of numbers in [-1, 1], rows and columns in `order`; brown is negative, blue positive."""
    n = len(order)
    cell = 22 if n <= 12 else max(4, 400 // n)
    left, top = matrix_margin(names, cell), 62
    svg = Svg(max(480, left + n * cell + 12), top + n * cell + 14, title)
    svg.text(0, 16, shorten(title, 60), bold=True)
    svg.text(0, 34, note, color=MUTED, size=11)
    svg.rect(left, top, n * cell, n * cell, _tone(0.0))
    for r, row in enumerate(order):
        y = top + r * cell
        if cell >= 10:
            svg.text(left - 8, y + cell / 2 + 4, row_label(names[row], r, 0), anchor="end", size=min(12, cell))
        for c, column in enumerate(order):
            value = values[row][column]
            # What cannot be told from the background need not be drawn: a hundred classes have ten thousand cells.
            if abs(value) < 0.04:
                continue
            tip = f"{names[row]} and {names[column]}: {value:.2f}"
            gap = int(cell > 8)
            svg.rect(left + c * cell, y, cell - gap, cell - gap, _tone(value), tip)
    return svg.render()


def _tone(value: float) -> str:
    end, t = (_POSITIVE if value > 0 else _NEGATIVE), min(1.0, abs(value))
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(_WHITE, end))
