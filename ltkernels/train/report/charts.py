"""The charts of the pages, each from plain values to a `drawing.Chart`."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ltkernels.train.report.drawing import (
    COLORS,
    DASHES,
    GRID,
    INK,
    MANY_POINTS,
    MARKERS,
    MUTED,
    axes_of,
    chart,
    legend_below,
    shorten,
)  # fmt: skip

MOST_CELLS = 100
"""More classes make no matrix that anybody reads."""
_MOST_ROWS = 40  # classes with a row of their own
_LETTERS = 28
_BAR = "#8a97a8"
_NEGATIVE, _POSITIVE = "#b8601f", "#0b62ad"
_SERIES_LETTERS = 56
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")

Points = Sequence[tuple[float, float]]


def _style(number: int) -> dict[str, Any]:
    """Colour and shape both tell a series from another."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "none",
        "mew": 0,
    }


@chart
def classes(
    title: str,
    names: Sequence[str],
    counts: Sequence[int],
    order: Sequence[int],
    variants: Sequence[tuple[str, Sequence[float]]],
) -> Figure:
    """Training samples beside the recall of every class in `order`: a row a class, or for many classes over their rank."""
    if len(order) <= _MOST_ROWS:
        return _rows(names, counts, order, variants)
    figure, (left, right) = axes_of(3.3, 2.3, 2, gap=0.65)
    rank = np.arange(1, len(order) + 1)
    left.fill_between(rank, [counts[c] for c in order], 0.7, color=_BAR, lw=0, step="mid")
    left.set(yscale="log", ylim=(0.7, None), title="training samples")
    left.yaxis.set_major_formatter(_PLAIN)
    left.yaxis.set_minor_formatter(NullFormatter())
    for number, (name, recall) in enumerate(variants):
        values = 100 * np.array([recall[c] for c in order])
        style = {**_style(number), "label": shorten(name, _SERIES_LETTERS)}
        right.plot(rank, values, **style, ms=2.5, alpha=0.45, rasterized=len(order) * len(variants) > MANY_POINTS)
        window = max(5, len(order) // 15)
        means = [values[max(0, i - window) : i + window + 1].mean() for i in range(len(values))]
        right.plot(rank, means, color=style["color"], linestyle=DASHES[number % len(DASHES)])
    right.set(title="accuracy, %; lines: mean of neighbours", ylim=(-3, 103))
    for axes in (left, right):
        axes.set_xlabel("classes, from the most to the least frequent")
    legend_below(right, 38, markerscale=2)
    return figure


def _rows(
    names: Sequence[str],
    counts: Sequence[int],
    order: Sequence[int],
    variants: Sequence[tuple[str, Sequence[float]]],
) -> Figure:
    figure, (left, right) = axes_of(1.8, max(0.6, 0.23 * len(order)), 2, gap=0.25)
    right.set_position([0.5, 0, 0.85, 1])
    places = np.arange(len(order))
    left.barh(places, [counts[c] for c in order], height=0.62, color=_BAR)
    for place, c in enumerate(order):
        left.annotate(
            f"{counts[c]}", (counts[c], place), (3, 0), textcoords="offset points", va="center", color=MUTED, size=8
        )
    left.set(yticks=places, yticklabels=[shorten(names[c], _LETTERS) for c in order], title="training samples")
    left.tick_params(axis="y", colors=INK)
    left.xaxis.set_major_locator(NullLocator())
    left.spines[["left", "bottom"]].set_visible(False)
    left.grid(False)
    left.set_xlim(0, 1.3 * max(counts))
    # Marks of different variants at one recall would hide each other: they sit at different heights in the row.
    for number, (name, recall) in enumerate(variants):
        shift = 0.0 if len(variants) == 1 else 0.56 * (number / (len(variants) - 1) - 0.5)
        values = [100 * recall[c] for c in order]
        right.plot(values, places + shift, **_style(number), label=shorten(name, _SERIES_LETTERS), alpha=0.9)
    right.set(yticks=places - 0.5, yticklabels=[], title="accuracy on the class's test samples, %")
    for axes in (left, right):
        axes.set_ylim(len(order) - 0.4, -0.6)
    legend_below(right, 24)
    return figure


@chart
def matrix_of_confusions(
    title: str, matrix: Sequence[Sequence[int]], names: Sequence[str], order: Sequence[int]
) -> Figure:
    """Rows are true classes, columns predictions, both in `order`; a cell's shade is its share of the row."""
    cells = np.array(matrix, dtype=float)[np.ix_(order, order)]
    share = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    # The square root keeps a single confused sample visible.
    figure, axes = _square(title, _tinted(np.sqrt(share)), names, order, "predicted class")
    axes.set_ylabel("true class")
    if len(order) <= 12:
        for r, c in np.argwhere(cells > 0):
            axes.text(
                c,
                r,
                f"{cells[r, c]:.0f}",
                ha="center",
                va="center",
                size=7,
                color="white" if share[r, c] > 0.45 else INK,
            )
    return figure


@chart
def matrix_of_cosines(
    title: str, values: Sequence[Sequence[float]], names: Sequence[str], order: Sequence[int]
) -> Figure:
    """A square matrix of numbers in [-1, 1], rows and columns in `order`; brown is negative, blue positive."""
    figure, axes = _square(title, _tinted(np.array(values, dtype=float)[np.ix_(order, order)]), names, order, "")
    handles = [Patch(color=_tinted(np.array(v)), label=f"{v:g}") for v in (1.0, 0.5, -0.5, -1.0)]
    legend_below(axes, 26, handles, ncols=4, handlelength=1, columnspacing=1)
    return figure


def _tinted(values: np.ndarray) -> np.ndarray:
    """(..., 4): the colour of the sign, as opaque as the number is large: over a light page and over a dark one."""
    tint = np.empty((*values.shape, 4))
    tint[..., :3] = np.where((values < 0)[..., None], to_rgb(_NEGATIVE), to_rgb(_POSITIVE))
    tint[..., 3] = np.abs(values).clip(0, 1)
    return tint


def _square(
    title: str, image: np.ndarray, names: Sequence[str], order: Sequence[int], below: str
) -> tuple[Figure, Any]:
    n = len(order)
    size = 0.23 * n if n <= 15 else max(3.2, 0.145 * n if n <= _MOST_ROWS else 0)
    figure, (axes,) = axes_of(max(size, 0.9), max(size, 0.9))
    axes.imshow(image, interpolation="none", aspect="auto")
    axes.grid(False)
    axes.spines[:].set_visible(True)  # not set(visible=...), which matplotlib 3.7 has not for several spines
    axes.spines[:].set_color(GRID)
    axes.set_title(fill(shorten(title, 90), max(24, int(9 * size))))
    if n <= _MOST_ROWS:
        heads = rows = [names[c] for c in order]
        if max(map(len, rows)) > 2:  # names at the head of columns run into each other: their numbers
            heads = [str(i + 1) for i in range(n)]
            rows = [f"{shorten(name, _LETTERS)}  {head}" for name, head in zip(rows, heads)]
        axes.set_yticks(range(n), rows, size=9 if n <= 15 else 7)
        step = 1 if n <= 15 else 5
        axes.set_xticks(range(0, n, step), heads[::step])
        axes.tick_params(axis="y", colors=INK)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_major_formatter(FuncFormatter(lambda place, _: f"{place + 1:.0f}"))
    axes.tick_params(length=0)
    axes.set_xlabel(below)
    return figure, axes


@chart
def lines(
    title: str, x_label: str, y_label: str, series: Sequence[tuple[str, Points, int]], width: float = 3.3
) -> Figure:
    """Curves; a series is (name, points, number of its style)."""
    figure, (axes,) = axes_of(width, 1.9)
    for name, placed, number in series:
        mark = MARKERS[number % len(MARKERS)] if len(placed) == 1 else None
        dash = DASHES[number % len(DASHES)]
        axes.plot(
            *zip(*placed), dash, color=COLORS[number % len(COLORS)], marker=mark, label=shorten(name, _SERIES_LETTERS)
        )
    axes.set_title(fill(shorten(title, 80), int(12 * width)))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend_below(axes, 38, handlelength=2.6)
    return figure


@chart
def points(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, Points, int]],
    *,
    log_x: bool = False,
    width: float = 3.3,
    bare: bool = False,
) -> Figure:
    """Scattered points. `bare` leaves the numbers of the axes out."""
    figure, (axes,) = axes_of(width, 2.3)
    many = sum(len(placed) for _, placed, _ in series) > MANY_POINTS
    for name, placed, number in series:
        style = {**_style(number), "ms": 4 if len(placed) > 100 else 5.5, "rasterized": many}
        axes.plot(*zip(*placed), label=shorten(name, _SERIES_LETTERS), alpha=0.8, **style)
    axes.set_title(fill(shorten(title, 80), int(12 * width)))
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(_PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
    if bare:
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
    if any(name for name, _, _ in series):
        legend_below(axes, 24 if bare else 38)
    return figure


@chart
def reliability(title: str, series: Sequence[tuple[str, dict[str, Sequence[float]], int]]) -> Figure:
    """Accuracy against confidence, by bins (see `metrics.reliability`), with one standard error; on the diagonal they agree."""
    figure, (axes,) = axes_of(2.5, 2.2)
    axes.plot([0, 100], [0, 100], color=MUTED, lw=1, linestyle=":", label="accuracy equal to confidence")
    for name, found, number in series:
        there = np.array(found["samples"]) > 0
        samples, right, sums = (np.array(found[key], dtype=float)[there] for key in ("samples", "right", "confidence"))
        smoothed = (right + 1) / (samples + 2)  # a bin with every sample right is not known without error
        error = 100 * np.sqrt(smoothed * (1 - smoothed) / samples)
        style = {**_style(number), "linestyle": DASHES[number % len(DASHES)], "ms": 4.5, "lw": 1.2}
        axes.errorbar(
            100 * sums / samples,
            100 * right / samples,
            yerr=error,
            label=shorten(name, _SERIES_LETTERS),
            elinewidth=1,
            **style,
        )
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="confidence, %", ylabel="accuracy, %")
    axes.set_title(fill(shorten(title, 80), 30))
    legend_below(axes, 38, [axes.lines[0], *axes.containers], handlelength=2.6)
    return figure
