"""The report's charts, each a function from plain values to an SVG string."""

from collections.abc import Sequence

from ltkernels.train.report.svg import COLORS, GRID, INK, MUTED, Svg, label, ticks

Series = tuple[str, list[tuple[float, float]]]


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def counts_and_accuracy(
    names: Sequence[str], counts: Sequence[int], order: Sequence[int], variants: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """One row per class in `order`: a bar of its training samples, and beside it a mark per variant at its recall."""
    row = 28 if len(order) <= 30 else 15
    # Marks of different variants at one recall would hide each other: they sit at different heights in the row.
    spread = (row - 9) / max(1, len(variants) - 1)
    # Long names take room from the bars: cut short, `signs_and_symbols/flags` and `signs_and_symbols/clocks` are one.
    letters = max(16, min(34, max(map(len, names))))
    left = 120 + round(6.4 * (letters - 16))
    bar_width, gap, width, top = 350 - left, 70, 460, 46
    x0 = left + bar_width + gap
    svg = Svg(x0 + width + 24, top + row * len(order) + 34, "class counts beside per-class accuracy")
    svg.text(left, 16, "training samples", bold=True)
    svg.text(x0, 16, "accuracy on the class's test samples, %", bold=True)
    bottom = top + row * len(order)
    for i in range(0, len(order), 2):
        svg.rect(0, top + i * row, svg.width, row, "#f6f7f9")
    # Positions, not bars: the axis may start above 0, and must where all classes are good, or the marks coincide.
    low = min(90, int(10 * min(min(accuracy) for _, accuracy in variants)) * 10)
    for percent in ticks(low, 100):
        x = x0 + width * (percent - low) / (100 - low)
        svg.line(x, top, x, bottom)
        svg.text(x, top - 8, label(percent), anchor="middle", color=MUTED, size=11)
        svg.text(x, bottom + 18, label(percent), anchor="middle", color=MUTED, size=11)
    largest = max(counts)
    for i, label_index in enumerate(order):
        middle = top + (i + 0.5) * row
        svg.text(left - 10, middle + 4, shorten(names[label_index], letters), anchor="end", size=12 if row > 20 else 10)
        length = bar_width * counts[label_index] / largest
        svg.rect(left, middle - row * 0.32, max(length, 1), row * 0.64, "#8a97a8")
        svg.text(left + length + 6, middle + 4, str(counts[label_index]), color=MUTED, size=11 if row > 20 else 10)
        for series, (name, accuracy) in enumerate(variants):
            x = x0 + width * (100 * accuracy[label_index] - low) / (100 - low)
            y = middle + (series - (len(variants) - 1) / 2) * spread
            tip = f"{names[label_index]}: {name} {100 * accuracy[label_index]:.1f} %"
            svg.marker(x, y, series, tip, 4.2 if row > 20 else 3)
    return svg.render()


def legend(names: Sequence[str], series: Sequence[int] | None = None, *, column: float = 400) -> str:
    """The marks of the series (0, 1, ... where not given) with their names, two in a row."""
    marks = range(len(names)) if series is None else series
    across = 2 if column <= 400 else 1
    svg = Svg(across * column, 22 * -(-len(names) // across) + 4, "legend")
    for i, (mark, name) in enumerate(zip(marks, names)):
        x, y = column * (i % across), 22 * (i // across) + 12
        svg.marker(x + 8, y, mark, size=5)
        svg.text(x + 22, y + 4, shorten(name, 56), size=13)
    return svg.render()


# Of a matrix; three letters of a name at the head of a column told nothing, and ran into each other.
_NAME_LETTERS = 18
_LETTER = 8.2  # pixels of the widest common letters at size 12
MOST_CELLS = 100
"""More classes make no matrix that anybody reads, and a page of a hundred megabytes."""


def matrix_margin(names: Sequence[str], cell: float) -> float:
    """Room for the names left of a matrix."""
    return 16 if cell < 10 else 40 + _LETTER * min(_NAME_LETTERS, max(map(len, names)))


def row_label(name: str, row: int, cell: float) -> str:
    """The name, and where the row's cells are numbered at the head, its number."""
    return shorten(name, _NAME_LETTERS) + (f"  {row + 1}" if cell >= 20 else "")


def confusion(title: str, matrix: Sequence[Sequence[int]], names: Sequence[str], order: Sequence[int]) -> str:
    """Rows are true classes, columns predictions, both in `order`; a cell's shade is its share of the row."""
    n = len(order)
    cell = 22 if n <= 12 else max(4, 264 // n)
    left, top = matrix_margin(names, cell), 62
    svg = Svg(max(300, left + n * cell + 12), top + n * cell + 14, f"confusion matrix of {title}")
    svg.text(0, 16, shorten(title, 44), bold=True)
    svg.text(0, 34, "rows: true, columns: predicted, in the same order", color=MUTED, size=11)
    svg.rect(left, top, n * cell - (cell > 8), n * cell - (cell > 8), _shade(0.0))
    for r, true in enumerate(order):
        total = max(1, sum(matrix[true]))
        y = top + r * cell
        if cell >= 10:
            svg.text(left - 8, y + cell / 2 + 4, row_label(names[true], r, cell), anchor="end", size=min(12, cell))
        for c, predicted in enumerate(order):
            count = matrix[true][predicted]
            if not count:
                continue
            share = count / total
            tip = f"{names[true]} as {names[predicted]}: {count} of {total}"
            svg.rect(left + c * cell, y, cell - (cell > 8), cell - (cell > 8), _shade(share), tip)
            if cell >= 20:
                ink = "#ffffff" if share > 0.45 else INK
                svg.text(left + (c + 0.5) * cell, y + cell / 2 + 4, str(count), anchor="middle", color=ink, size=10)
    if cell >= 20:
        for c in range(n):
            x = left + (c + 0.5) * cell - 0.5
            svg.text(x, top - 6, str(c + 1), anchor="middle", color=MUTED, size=11)
    return svg.render()


def _shade(share: float) -> str:
    """White to dark blue. The square root keeps a single confused sample visible."""
    t = share**0.5
    low, high = (247, 249, 252), (8, 69, 120)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(low, high))


def lines(title: str, x_label: str, series: Sequence[Series], colors: Sequence[int], *, width: float = 440) -> str:
    """A line chart; `colors[i]` is the number of series i's colour, every second one dashed (readable in grey)."""
    height, left, right, top, bottom = 236, 48, 16, 30, 40
    points = [p for _, values in series for p in values]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    pad = 0.06 * (max(ys) - min(ys)) or 0.05
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    svg = Svg(width, height, title)
    svg.text(0, 16, shorten(title, int(width / 8)), bold=True)
    for value in ticks(y_low, y_high):
        y = place(x_low, value)[1]
        svg.line(left, y, width - right, y, "#aaaaaa" if abs(value) < 1e-12 else GRID)
        svg.text(left - 6, y + 4, label(value), anchor="end", color=MUTED, size=11)
    for value in ticks(x_low, x_high):
        x = place(value, y_low)[0]
        svg.text(x, height - bottom + 16, label(value), anchor="middle", color=MUTED, size=11)
    svg.text((left + width - right) / 2, height - 6, x_label, anchor="middle", color=MUTED, size=11)
    for (name, values), color in zip(series, colors):
        placed = [place(x, y) for x, y in values]
        if len(placed) == 1:
            svg.marker(*placed[0], color, name)
        svg.polyline(placed, COLORS[color % len(COLORS)], dashed=color % 2 == 1)
    return svg.render()


def line_legend(names: Sequence[str], colors: Sequence[int]) -> str:
    """Line samples with their names, two in a row."""
    column = 400
    svg = Svg(2 * column, 22 * ((len(names) + 1) // 2) + 4, "legend")
    for i, (name, color) in enumerate(zip(names, colors)):
        x, y = column * (i % 2), 22 * (i // 2) + 12
        svg.polyline([(x, y), (x + 28, y)], COLORS[color % len(COLORS)], dashed=color % 2 == 1)
        svg.text(x + 36, y + 4, shorten(name, 54), size=13)
    return svg.render()


def times(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str]) -> str:
    """A bar for each (name, seconds of each of `parts`), its parts side by side, from dark to light."""
    shades = [_shade(1 - i / len(parts)) for i in range(len(parts))]
    row, top, left, width = 26, 34, 250, 420
    svg = Svg(left + width + 90, top + row * len(rows) + 6, "where the time went")
    for i, (part, shade) in enumerate(zip(parts, shades)):
        svg.rect(left + 170 * i, 8, 12, 12, shade)
        svg.text(left + 170 * i + 18, 18, part, size=12)
    longest = max(sum(seconds) for _, seconds in rows) or 1.0
    for i, (name, seconds) in enumerate(rows):
        x, y = float(left), top + i * row
        svg.text(left - 10, y + 15, shorten(name, 36), anchor="end", size=12)
        for part, value, shade in zip(parts, seconds, shades):
            svg.rect(x, y + 3, width * value / longest, row - 8, shade, f"{name}: {part} {value:.2f} s")
            x += width * value / longest
        svg.text(x + 6, y + 15, f"{sum(seconds):.1f} s", color=MUTED, size=11)
    return svg.render()
